"""The report: one sound, self-contained page of whatever a run's or an edit's folder holds, or one line of error."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from easyinv_edit.errors import InputError
from easyinv_edit.evaluation import leaderboard, report, report_page, report_tables
from easyinv_edit.pipeline import EditPipeline
from tests.helpers import Command

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert(1)</script> \"x\" onload='y' &amp; <img src=http://example.org/a.png>"
TAG = "a <i>cone</i>"
NONE = "\N{EN DASH}"
"""Stands where there is no number."""
VOID = {"meta", "link", "img", "input", "br"}
COLUMNS = [
    {"name": "PSNR", "unit": "dB", "better": "higher", "digits": 2},
    {"name": "MSE", "unit": "", "better": "lower", "digits": 5},
    {"name": "noise", "unit": "", "better": None, "digits": 3},
]
TABLE = [
    {"variant": "autoencoder alone", "n": 4, "PSNR": 40.0, "MSE": 0.0, "noise": None},
    {"variant": "easyinv", "n": 4, "PSNR": 29.104, "MSE": 0.00125, "noise": 1.0},
    {"variant": "ddim", "n": 4, "PSNR": 29.961, "MSE": 0.00101, "noise": 1.01},
    {"variant": "renoise", "n": 4, "PSNR": 35.0, "PSNR n": 3, "MSE": None, "noise": float("nan")},
]
PUBLISHED = [
    {"variant": "easyinv", "source": "arXiv 1, Table 1", "same_protocol": False, "why": "T is 50 there", "PSNR": 30.189},
    {"variant": "elsewhere", "source": "arXiv 2, Table 2", "same_protocol": True, "why": "", "MSE": 0.5},
]


def picture(seed: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


def make_rows(folder: Path, variants: tuple[str, ...] = ("easyinv", "ddim"), items: int = 4) -> list[dict[str, Any]]:
    """Rows of edits in two groups, one after the other, and their pictures."""
    rows = []
    for index in range(items):
        for number, variant in enumerate(variants):
            files = {"source": f"pictures/{index}.png", "result": f"pictures/{index}-{number}.png"}
            for path in files.values():
                picture(10 * index + number).save(folder / path)
            group = "shape" if 2 * index < items else "turn"
            known = {"kind": "edits", "item": f"item {index}", "group": group, "variant": variant, "steps": 25}
            texts = {"prompt": f"prompt {index}", "source_prompt": f"source {index}"}
            numbers = {"PSNR": 20 + index - number, "MSE": 0.01, "noise": None}
            rows.append({**known, **texts, **numbers, "pictures": files})
    return rows


def write_rows(folder: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def make_run(folder: Path, **summary: Any) -> Path:
    """A finished run."""
    for name in ("pictures", "figures"):
        (folder / name).mkdir(parents=True)
    picture(99, 200).save(folder / "figures" / "pareto.png")
    write_rows(folder, make_rows(folder))
    groups = [{"title": name, "group": name, "rows": TABLE[1:]} for name in ("shape", "turn")]
    tables = [{"title": "all edits", "group": "", "rows": TABLE}, *groups]
    content = {"title": "A run", "kind": "edits", "columns": COLUMNS, "tables": tables, "published": PUBLISHED, "notes": ["x"]}
    environment = {"cpu": "some CPU", "dtypes": ["float32"], "started": "2026-01-02T03:04:05+00:00", "finished": "2026"}
    files = {"run.json": {"kind": "edits"}, "environment.json": environment, "summary.json": {**content, **summary}}
    for name, text in files.items():
        (folder / name).write_text(json.dumps(text))
    (folder / "config.yaml").write_text("kind: edits  # a comment\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""


class Parsed(HTMLParser):
    """Elements in their order, each with all the text in it. Raises where elements are not closed in turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.all: list[Element] = []
        self.open: list[Element] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        self.all.append(Element(tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(self.all[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def of(self, tag: str, **attributes: str) -> list[Element]:
        given = {name.replace("_", "-").rstrip("-"): value for name, value in attributes.items()}
        return [e for e in self.all if e.tag == tag and given.items() <= e.attributes.items()]


def page_of(folder: Path, limit: int = 50, side: int = 384) -> Parsed:
    return Parsed(report.render(report.read(folder, limit, side)))


def rows_of(parsed: Parsed, caption: str) -> dict[str, list[Element]]:
    """The cells of a table by the text of each row's head."""
    inside = [e for e in parsed.all if e.tag in ("caption", "tr", "th", "td")]
    start = next(i for i, e in enumerate(inside) if e.tag == "caption" and e.text == caption)
    found: dict[str, list[Element]] = {}
    for element in inside[start + 1 :]:
        if element.tag == "caption":
            break
        if element.attributes.get("scope") == "row":
            found[" ".join(element.text.split())] = []
        elif element.tag == "td":
            list(found.values())[-1].append(element)
    return found


def texts(cells: list[Element]) -> list[str]:
    return [" ".join(cell.text.split()) for cell in cells]


def shown(element: Element) -> Image.Image:
    """The picture of a data URI."""
    head, data = (element.attributes["src"] or "").split(",", 1)
    decoded = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert head == f"data:image/{(decoded.format or '').lower()};base64"
    return decoded


# --- the page as a whole --------------------------------------------------------------------------------------------------


def assert_sound(parsed: Parsed, text: str) -> None:
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    ids = [e.attributes["id"] for e in parsed.all if "id" in e.attributes]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    links = {e.attributes["href"] for e in parsed.of("a")}
    assert links <= {f"#{name}" for name in ids}
    pictures = parsed.of("img")
    assert all(e.attributes["alt"] and (e.attributes["src"] or "").startswith("data:image/") for e in pictures)
    assert all(shown(e).size == (int(e.attributes["width"] or 0), int(e.attributes["height"] or 0)) for e in pictures)
    loading = ("src", "srcset", "poster", "action", "data", "background", "href", "style")
    asked = [value for e in parsed.all for name, value in e.attributes.items() if name in loading and e.tag != "a"]
    assert [value for value in asked if not (value or "").startswith("data:")] == []
    assert {e.tag for e in parsed.all} & {"iframe", "object", "embed", "base", "form"} == set()
    (style,) = parsed.of("style")
    assert not re.search(r"url\(|@import|@font-face", style.text)
    (script,) = parsed.of("script")
    assert not re.search(r"fetch|XMLHttp|import\(|innerHTML|eval|WebSocket|sendBeacon", script.text)
    assert all(e.attributes.get("scope") for e in parsed.of("th"))
    assert all(e.attributes.get("aria-label") for e in parsed.of("input") + parsed.of("nav") + parsed.of("div", role="region"))
    assert len(parsed.of("title")) == len(parsed.of("h1")) == len(parsed.of("main")) == 1


def test_a_run_is_one_sound_page(run: Path) -> None:
    text = report.render(report.read(run, 50, 384))
    parsed = Parsed(text)
    assert_sound(parsed, text)
    assert parsed.of("h1")[0].text == "A run"
    assert [e.text.strip() for e in parsed.of("li")] == ["x", "T is 50 there"]
    assert [e.attributes["id"] for e in parsed.of("article")] == [f"item-{n}" for n in range(1, 5)]
    assert len(parsed.of("img")) == 1 + 4 * 3
    assert [e.attributes["alt"] for e in parsed.of("img")][:3] == ["figure: pareto", "item 0: source", "item 0: easyinv"]
    assert [e.attributes["data-shared"] for e in parsed.of("figure")] == ["no", *["yes", "no", "no"] * 4]
    facts = dict(zip([e.text for e in parsed.of("dt")], [e.text for e in parsed.of("dd")], strict=True))
    assert facts["device"] == "some CPU"
    assert facts["started"] == "2026-01-02 03:04:05 UTC"


def test_prompts_stand_at_each_item(run: Path) -> None:
    dt, dd = page_of(run).of("dt"), page_of(run).of("dd")
    pairs = [(a.text, b.text) for a, b in zip(dt, dd, strict=True)]
    assert [pair for pair in pairs if "prompt" in pair[0]] == [
        pair for n in range(4) for pair in (("source prompt", f"source {n}"), ("prompt", f"prompt {n}"))
    ]


def test_prompts_that_differ_name_their_variants(run: Path) -> None:
    rows = make_rows(run, ("a", "b", "c", "d", "e"), 1)
    for row in rows[1:]:
        row["source_prompt"] = ""
    write_rows(run, rows)
    (item,) = report.read(run, 50, 384).items
    assert item.texts == (("source prompt of a", "source 0"), ("source prompt of b; c and 2 more", ""), ("prompt", "prompt 0"))
    assert "(empty)" in page_of(run).of("article")[0].text


def test_configuration_and_environment_are_folded_blocks(run: Path) -> None:
    parsed = page_of(run)
    blocks = [e for e in parsed.of("details") if "id" in e.attributes]
    assert [(e.attributes["id"], "open" in e.attributes) for e in blocks] == [
        ("configuration", False),
        ("request", False),
        ("environment", False),
    ]
    pre = [e.text for e in parsed.of("pre")]
    assert pre[0].strip() == "kind: edits  # a comment"
    assert json.loads(pre[2])["cpu"] == "some CPU"


def test_the_same_folder_makes_the_same_page(run: Path) -> None:
    assert report.render(report.read(run, 3, 64)) == report.render(report.read(run, 3, 64))


def test_a_page_that_lacks_something_is_refused(run: Path) -> None:
    """The template is strict: a field it does not find is an error, never a gap."""
    page = report.read(run, 1, 384)
    with pytest.raises(UndefinedError):
        report.render(replace(page, items=(object(),)))  # type: ignore[arg-type]


def test_the_template_is_installed_with_the_package() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    home = ROOT / "easyinv_edit" / "evaluation"
    found = [path.relative_to(home).as_posix() for path in (home / "templates").iterdir()]
    assert found == ["templates/report.html.j2"]
    assert any(fnmatch(found[0], pattern) for pattern in package["easyinv_edit.evaluation"])


# --- what comes from files is escaped -------------------------------------------------------------------------------------


def test_nothing_of_a_file_becomes_markup(run: Path) -> None:
    rows = make_rows(run)
    for row in rows:
        row |= {"item": row["item"] + EVIL, "group": EVIL, "variant": row["variant"] + EVIL, "prompt": EVIL}
    rows[0]["pictures"]["source"] = EVIL
    rows[1] |= {"error": EVIL, "source_prompt": EVIL}
    write_rows(run, rows)
    before = page_of(make_run(run.parent / "tame"))
    tables = [{"title": EVIL, "group": "", "rows": [{"variant": EVIL, "PSNR": EVIL, EVIL: 1}]}]
    columns = [{"name": "PSNR", "unit": EVIL}, {"name": EVIL}]
    published = [{"variant": EVIL, "source": EVIL, "why": EVIL}]
    summary = {"title": EVIL, "notes": [EVIL], "columns": columns, "tables": tables, "published": published}
    (run / "summary.json").write_text(json.dumps(summary))
    for name in ("run.json", "environment.json", "config.yaml"):
        (run / name).write_text(json.dumps({"model": EVIL, "cpu": EVIL}))
    text = report.render(report.read(run, 50, 384))
    parsed = Parsed(text)
    assert_sound(parsed, text)
    assert len(parsed.of("script")) == len(before.of("script")) == 1
    attributes = [{name for element in page.all for name in element.attributes} for page in (parsed, before)]
    assert attributes[0] - attributes[1] == {"colspan"}  # of the line that failed
    assert parsed.of("h1")[0].text == EVIL
    assert sum(EVIL in e.text for e in parsed.of("dd")) >= 4
    assert f"failed: {EVIL}" in [e.text for e in parsed.of("td")]


def test_half_a_character_does_not_stop_the_page(run: Path) -> None:
    rows = make_rows(run)
    rows[0]["prompt"] = "\ud83d"
    write_rows(run, rows)
    facts = report.write(run, run / "report.html")
    assert (run / "report.html").stat().st_size == facts["bytes"]


# --- tables ---------------------------------------------------------------------------------------------------------------


def test_numbers_have_their_columns_digits_and_their_full_value(run: Path) -> None:
    cells = rows_of(page_of(run), "all edits")
    assert texts(cells["easyinv"]) == ["4", "29.10", "0.00125", "1.000"]
    assert [cell.attributes["data-value"] for cell in cells["easyinv"]] == ["4.0", "29.104", "0.00125", "1.0"]
    assert texts(cells["renoise"]) == ["4", "35.00 (3)", NONE, NONE]


def test_what_is_no_number_has_no_value_to_sort_by(run: Path) -> None:
    rows = rows_of(page_of(run), "all edits")
    lacking = [cell for cells in rows.values() for cell in cells if "data-value" not in cell.attributes]
    assert len(lacking) == 2 + 1 + 3 + 3
    assert set(texts(lacking)) == {NONE}


def test_heads_say_how_they_are_sorted(run: Path) -> None:
    heads = page_of(run).of("th", scope="col")[:5]
    assert [e.attributes["data-sort"] for e in heads] == ["text", *["number"] * 4]
    assert [e.attributes.get("data-better") for e in heads] == [None, "", "higher", "lower", ""]
    assert texts(heads) == ["variant", "n", "PSNR dB ↑, higher is better", "MSE ↓, lower is better", "noise"]


def test_the_best_of_ours_is_marked(run: Path) -> None:
    """Neither the ceiling, nor a published number, nor a mean of fewer items: of the others ddim is the best in both."""
    parsed = page_of(run)
    assert [e.text for e in parsed.of("strong")][:2] == ["29.96", "0.00101"]
    assert all("29.96" in rows_of(parsed, title)["ddim"][1].text for title in ("all edits", "shape", "turn"))


def test_equal_as_far_as_digits_tell_is_equally_good(run: Path) -> None:
    def strong(*values: float | None) -> list[str]:
        rows = [{"variant": str(i), "n": 4, "PSNR": value} for i, value in enumerate(values)]
        column = report_page.Column("PSNR", better="higher", digits=1)
        (table,), _ = report_tables.tables_of({"tables": [{"rows": rows}]}, [column])
        return [line.name for line in table.lines if line.cells[1].best]

    assert strong(1.0, 2.04, 2.01) == ["1", "2"]
    assert strong(2.04, 2.01) == []  # nothing to choose from
    assert strong(None, 3.0, 2.0) == ["1"]


def test_published_lines_stand_below_ours_with_the_reason(run: Path) -> None:
    parsed = page_of(run)
    names = list(rows_of(parsed, "all edits"))
    assert names == [
        "autoencoder alone",
        "easyinv",
        "easyinv arXiv 1, Table 1 published, other protocol 1",
        "ddim",
        "renoise",
        "elsewhere arXiv 2, Table 2 published",
    ]
    assert len(parsed.of("tr", class_="published other")) == len(parsed.of("tr", class_="published")) == 1
    (reason,) = parsed.of("li", id="reason-1")
    assert reason.text == "T is 50 there"
    assert list(rows_of(parsed, "shape")) == ["easyinv", "ddim", "renoise"]


def test_an_items_numbers_are_only_those_it_has(run: Path) -> None:
    rows = make_rows(run)
    for row in rows:
        del row["MSE"]
    write_rows(run, rows)
    cells = rows_of(page_of(run), "Numbers of item 2")
    assert {name: texts(found) for name, found in cells.items()} == {"easyinv": ["22.00", NONE], "ddim": ["21.00", NONE]}


# --- pictures and limits --------------------------------------------------------------------------------------------------


def test_a_small_png_is_embedded_as_it_is(run: Path) -> None:
    (element,) = page_of(run, limit=1).of("img", alt="item 0: ddim")
    data = base64.b64decode((element.attributes["src"] or "").split(",")[1])
    assert data == (run / "pictures" / "0-1.png").read_bytes()


def test_a_large_picture_is_a_thumbnail_of_its_proportions(run: Path) -> None:
    smooth = np.linspace(0, 255, 400)[None, :, None] * np.ones((200, 1, 3))
    Image.fromarray(smooth.astype(np.uint8)).save(run / "pictures" / "0.png")
    (element,) = page_of(run, limit=1, side=100).of("img", alt="item 0: source")
    small = shown(element)
    assert (small.format, small.size) == ("JPEG", (100, 50))
    ramp = np.asarray(small).astype(float).mean((0, 2))
    assert np.abs(ramp - (np.arange(100) + 0.5) * 2.55).max() < 3


def test_another_format_is_embedded_as_jpeg(run: Path) -> None:
    """Whatever its name says: a browser is told what a picture is."""
    Image.new("RGB", (16, 16), "red").save(run / "pictures" / "0.png", format="WEBP", lossless=True)
    (element,) = page_of(run, limit=1).of("img", alt="item 0: source")
    assert np.abs(np.asarray(shown(element)).astype(int) - (255, 0, 0)).max() <= 2


def test_a_heavy_png_is_a_jpeg_of_its_size(run: Path) -> None:
    picture(1, 200).save(run / "pictures" / "0.png")  # noise: 120 kB
    (element,) = page_of(run, limit=1).of("img", alt="item 0: source")
    assert (shown(element).format, shown(element).size) == ("JPEG", (200, 200))


def test_figures_keep_their_detail(run: Path) -> None:
    picture(1, 450).save(run / "figures" / "grid_of-methods.png")
    (element,) = page_of(run, limit=0).of("img", alt="figure: grid of methods")
    assert (shown(element).format, shown(element).size) == ("PNG", (450, 450))


@pytest.mark.parametrize(
    ("limit", "names"), [(0, []), (1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_a_limit_takes_items_from_every_group(run: Path, limit: int, names: list[int]) -> None:
    facts = report.write(run, run / "report.html", limit)
    parsed = Parsed((run / "report.html").read_text())
    assert [e.text.split("·")[0].strip() for e in parsed.of("h3")] == [f"item {n}" for n in names]
    assert (facts["items"], facts["shown"], facts["pictures"]) == (4, len(names), 1 + 3 * len(names))
    told = f"{len(names)} of 4 items are shown" in parsed.of("section", id="items")[0].text
    assert told == (len(names) < 4)


# --- what is missing or torn ----------------------------------------------------------------------------------------------


def test_pictures_that_are_missing_say_so(run: Path) -> None:
    (run / "pictures" / "0.png").unlink()
    (run / "pictures" / "0-0.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    picture(1).save(run.parent / "secret.png")
    rows = make_rows(run)[:2]
    (run / "pictures" / "0.png").unlink()
    (run / "pictures" / "0-0.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    rows[1]["pictures"]["result"] = "../secret.png"
    rows[1]["pictures"]["guided"] = str(run.parent / "secret.png")
    write_rows(run, rows)
    facts = report.write(run, run / "report.html")
    parsed = Parsed((run / "report.html").read_text())
    assert texts(parsed.of("div", class_="missing")) == [
        "pictures/0.png is missing",
        "pictures/0-0.png cannot be read",
        "../secret.png is outside of the folder",
        f"{run.parent / 'secret.png'} is outside of the folder",
    ]
    assert (facts["pictures"], facts["missing"]) == (1, 4)


def test_items_without_pictures_keep_their_numbers(run: Path) -> None:
    rows = make_rows(run)
    for row in rows[2:]:
        del row["pictures"]
    write_rows(run, rows)
    articles = page_of(run).of("article")
    assert ["No pictures" in e.text for e in articles] == [False, True, True, True]
    assert all(f"{20 + n}.00" in article.text for n, article in enumerate(articles))


def test_torn_lines_and_results_tried_again(run: Path) -> None:
    """A line cut short and lines that are no result are counted; of two results of one pair the later one counts."""
    rows = make_rows(run)
    failed = {**{k: rows[0][k] for k in ("item", "group", "variant")}, "error": "it became NaN"}
    write_rows(run, [failed, {"variant": "no item"}, *rows], '{"item": "item 9", "var')
    parsed = page_of(run)
    assert "lines of results.jsonl that cannot be read and are left out: 2" in texts(parsed.of("li"))
    assert "it became NaN" not in parsed.of("main")[0].text
    assert len(parsed.of("article")) == 4


def test_a_failed_result_is_a_line_with_its_reason(run: Path) -> None:
    rows = make_rows(run)[:2]
    rows[1] = {**{k: rows[1][k] for k in ("item", "group", "variant", "prompt")}, "error": "it became NaN"}
    write_rows(run, rows)
    cells = rows_of(page_of(run), "Numbers of item 0")
    assert [(cell.text, cell.attributes["colspan"]) for cell in cells["ddim"]] == [("failed: it became NaN", "3")]


def test_a_run_that_goes_on_has_no_tables_yet(run: Path) -> None:
    for name in ("summary.json", "environment.json", "config.yaml"):
        (run / name).unlink()
    parsed = page_of(run)
    assert "the run is not finished" in parsed.of("li")[0].text
    assert parsed.of("section", id="tables") == []
    assert parsed.of("h1")[0].text == "run"
    assert texts(parsed.of("p", class_="error")) == ["config.yaml is missing", "environment.json is missing"]
    assert texts(rows_of(parsed, "Numbers of item 1")["ddim"]) == ["20", "0.01"]  # no summary: numbers, but no digits


@pytest.mark.parametrize(("name", "note"), [("summary.json", "summary.json cannot be read"), ("environment.json", None)])
def test_a_torn_file_is_shown_as_it_is(run: Path, name: str, note: str | None) -> None:
    (run / name).write_text('{"title": "A r')
    parsed = page_of(run)
    assert note is None or note in parsed.of("li")[0].text
    assert name == "summary.json" or '{"title": "A r' in [e.text.strip() for e in parsed.of("pre")]


JUNK: tuple[Any, ...] = (None, True, -1, 1e999, 10**400, float("nan"), "", "\0", "a/../b", [], [1], {}, {"name": {}}, EVIL)


def spoiled(value: Any, draw: random.Random) -> Any:
    """A copy in which about one part in eight is something else."""
    if draw.random() < 0.125:
        return draw.choice(JUNK)
    if isinstance(value, dict):
        return {key: spoiled(below, draw) for key, below in value.items()}
    return [spoiled(below, draw) for below in value] if isinstance(value, list) else value


def test_whatever_files_hold_a_page_or_one_line_comes_of_it(run: Path) -> None:
    pages, draw = 0, random.Random(0)
    make_board(run)
    names = ("run.json", "environment.json", "summary.json", "leaderboard.json")
    files = {name: json.loads((run / name).read_text()) for name in names}
    rows = make_rows(run)
    for _ in range(60):
        for name, content in files.items():
            (run / name).write_text(json.dumps(spoiled(content, draw)))
        write_rows(run, [spoiled(row, draw) for row in rows])
        try:
            text = report.render(report.read(run, 50, 384))
        except InputError:
            continue
        assert_sound(Parsed(text), text)
        pages += 1
    assert pages > 40


# --- a leaderboard --------------------------------------------------------------------------------------------------------


def make_board(run: Path) -> dict[str, Any]:
    """A leaderboard of two inversions with and without a control, as a run writes it."""
    rows = [
        {"kind": "edits", "item": f"{task} {i}", "group": task, "variant": f"{inversion} + {control}", "inversion": inversion,
         "control": control, "inside": 10.0 + i * (control != "none") - (inversion == "ddim"), "target": 1.0}
        for task, n in (("shape", 3), ("turn", 2)) for i in range(n)
        for inversion, control in (("ddim", "none"), ("ddim", "masactrl"), ("easyinv", "none"))
    ]  # fmt: skip
    content = {"title": "Gain over ddim + none", "judged": {"shape": 0.9876}, "rows": leaderboard.leaderboard(rows[:-2])}
    (run / "leaderboard.json").write_text(json.dumps(content))
    return content


def test_a_leaderboard_has_a_part_of_its_own(run: Path) -> None:
    content = make_board(run)
    text = report.render(report.read(run, 50, 384))
    parsed = Parsed(text)
    assert_sound(parsed, text)
    assert parsed.of("nav")[0].text.split() == ["Tables", "Leaderboard", "Figures", "Items", "How", "it", "was", "made"]
    (section,) = parsed.of("section", id="leaderboard")
    assert "Gain over ddim + none" in section.text
    assert "The judge reads rightly off the true results: shape 0.988." in section.text
    cells = rows_of(parsed, "Ranking by gain")
    ranked = {row["variant"]: row for row in content["rows"]}
    assert list(cells) == list(ranked)
    best, lost = cells["easyinv + none"], cells["ddim + masactrl"]
    assert texts(best)[:4] == ["1", "+1.00", "+1.00 ± 0.00", "+1.00 (1)"]
    assert texts(lost)[2:4] == ["+1.00 ± 0.58", "+0.00 (1)"]
    assert float(lost[2].attributes["data-value"] or 0) == ranked["ddim + masactrl"]["tasks"]["shape"]["gain"] == 1.0
    grid = rows_of(parsed, "Gain by control and inversion")
    assert {name: texts(row) for name, row in grid.items()} == {
        "none": ["+1.00", "+0.00 ± 0.00"], "masactrl": [NONE, "+0.50"],
    }  # fmt: skip
    assert "+1.00" in [e.text for e in parsed.of("strong")], "the best is marked"


def test_a_run_without_a_leaderboard_has_no_such_part(run: Path) -> None:
    assert page_of(run).of("section", id="leaderboard") == []
    (run / "leaderboard.json").write_text("{")
    parsed = page_of(run)
    assert parsed.of("section", id="leaderboard") == []
    assert "leaderboard.json cannot be read and is left out" in parsed.of("li")[1].text


# --- an edit --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(untrained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an edit of two prompts saves."""
    pipe = EditPipeline.from_pretrained(untrained_folder)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a blue cube", TAG]
    made = pipe(picture(1, 80), prompts, "a red ball", inversion="ddim", num_inference_steps=2)
    folder = tmp_path_factory.mktemp("edit")
    replace(made, flagged=[False, True]).save(folder)
    return folder


def test_an_edit_is_a_sound_page_too(edit: Path) -> None:
    text = report.render(report.read(edit, 50, 384))
    parsed = Parsed(text)
    assert_sound(parsed, text)
    names = ["source", "reconstruction", "edited-1", "edited-2"]
    assert [e.text for e in parsed.of("figcaption")] == names
    assert [e.attributes["data-shared"] for e in parsed.of("figure")] == ["yes", "yes", "no", "no"]
    pairs = dict(zip([e.text for e in parsed.of("dt")], [e.text for e in parsed.of("dd")], strict=True))
    assert (pairs["source prompt"], pairs["prompt of edited-1"], pairs["prompt of edited-2"]) == (
        "a red ball",
        "a blue cube",
        TAG,
    )
    assert (pairs["inversion"], pairs["control"], pairs["evaluations to invert"]) == ("ddim", "masactrl", "2")
    assert pairs["reconstruction"].endswith(" dB")
    assert texts(parsed.of("li")) == ["the safety checker made edited-2 black"]
    recipe, environment = (json.loads(e.text) for e in parsed.of("pre"))
    assert recipe == json.loads((edit / "result.json").read_text())["recipe"]
    assert "torch" in environment["versions"]


def test_whatever_an_edits_file_holds_a_page_or_one_line_comes_of_it(edit: Path, tmp_path: Path) -> None:
    pages, draw, content = 0, random.Random(1), json.loads((edit / "result.json").read_text())
    for _ in range(60):
        (tmp_path / "result.json").write_text(json.dumps(spoiled(content, draw)))
        try:
            text = report.render(report.read(tmp_path, 50, 384))
        except InputError:
            continue
        assert_sound(Parsed(text), text)
        pages += 1
    assert pages > 20


# --- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_one_file_and_tells_of_it(run: Path, command: Command) -> None:
    before = set(run.rglob("*"))
    code, printed, errors = command("report", str(run))
    assert (code, errors) == (0, "")
    assert set(run.rglob("*")) - before == {run / "report.html"}
    assert printed.startswith(f"{run / 'report.html'}: 4 of 4 items, 13 pictures, 0.")
    (run / "pictures" / "3.png").unlink()
    assert "12 pictures, 1 missing" in command("report", str(run))[1]


def test_the_command_as_json_to_another_place(run: Path, tmp_path: Path, command: Command) -> None:
    page = tmp_path / "new" / "page.html"
    code, printed, _ = command("report", str(run), "-o", str(page), "--items", "1", "--side", "32", "--json")
    facts = {"file": str(page), "items": 4, "shown": 1, "pictures": 4, "missing": 0, "bytes": page.stat().st_size}
    assert (code, json.loads(printed)) == (0, facts)
    assert not (run / "report.html").exists()


def _nothing(folder: Path) -> list[str]:
    return [str(folder / "nowhere")]


def _a_file(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return [str(folder / "file")]


def _empty(folder: Path) -> list[str]:
    return [str(folder)]


def _no_results(folder: Path) -> list[str]:
    (folder / "run.json").write_text("{}")
    return [str(folder)]


def _no_edit(folder: Path) -> list[str]:
    (folder / "result.json").write_text('{"rows": []}')
    return [str(folder)]


def _output_in_a_file(folder: Path) -> list[str]:
    make_run(folder / "run")
    return [str(folder / "run"), "-o", str(folder / "run" / "config.yaml" / "page.html")]


def _output_a_folder(folder: Path) -> list[str]:
    make_run(folder / "run")
    return [str(folder / "run"), "-o", str(folder / "run" / "pictures")]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_nothing, "there is no such folder; give"),
        (_a_file, "is no folder; give"),
        (_empty, "holds neither a run"),
        (_no_results, "the run has no results yet"),
        (_no_edit, "holds no edit"),
        (_output_in_a_file, "cannot be written"),
        (_output_a_folder, "cannot be written"),
    ],
)
def test_what_cannot_be_reported_is_one_line(
    make: Callable[[Path], list[str]], told: str, tmp_path: Path, command: Command
) -> None:
    arguments = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, printed, errors = command("report", *arguments)
    assert (code, printed, len(errors.splitlines())) == (2, "", 1), errors
    assert errors.startswith("error: ")
    assert told in errors
    assert sorted(tmp_path.rglob("*")) == before
