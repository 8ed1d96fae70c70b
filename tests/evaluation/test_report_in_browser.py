"""The report's page in Debian's Chromium: nothing is fetched, tables sort, sliders cut, and it reads without script too."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from easyinv_edit.evaluation import report
from tests.evaluation.test_report import COLUMNS, TABLE, make_rows, make_run, write_rows

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: browser)")
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there (Debian's package chromium)")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]  # containers have little shared memory
        launched = driver.chromium.launch(executable_path=str(CHROMIUM), args=options)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose sources are red, the results of one method blue and of the other green."""
    folder = make_run(tmp_path_factory.mktemp("page") / "run")
    rows = make_rows(folder)
    for row in rows:
        for what, colour in (("source", RED), ("result", BLUE if row["variant"] == "easyinv" else GREEN)):
            Image.new("RGB", (32, 16), colour).save(folder / row["pictures"][what])
    del rows[-1]["pictures"]["result"]
    write_rows(folder, rows)
    report.write(folder, folder / "report.html")
    return folder / "report.html"


class Watched:
    """A page and what it did that it should not."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        self.page.set_default_timeout(120_000)  # ms; the machine may be busy
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(f"{message.type}: {message.text}"))
        self.page.goto(file.as_uri())

    def names(self, table: int = 0) -> list[str]:
        """The first words of a table's rows."""
        heads = self.page.locator("table").nth(table).locator("tbody th").all_inner_texts()
        return [" ".join(head.split()) for head in heads]

    def head(self, name: str) -> Any:
        return self.page.locator("table").first.get_by_role("columnheader", name=name).first

    def colour(self, locator: Any, x: float) -> tuple[int, ...]:
        """The colour at a share of an element's width, near its upper edge."""
        drawn = Image.open(io.BytesIO(locator.screenshot())).convert("RGB")
        return drawn.getpixel((round(x * (drawn.width - 1)), drawn.height // 8))


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Watched]:
    watched = Watched(browser, file)
    yield watched
    asked = [url for url in watched.requests if not url.startswith(("file:", "data:"))]
    assert (asked, watched.errors) == ([], [])
    assert file.as_uri() in watched.requests
    watched.page.close()


def test_every_picture_is_drawn_and_nothing_is_fetched(opened: Watched, tmp_path: Path) -> None:
    drawn = opened.page.locator("img").evaluate_all("all => all.map(i => i.complete && i.naturalWidth > 0)")
    assert len(drawn) == 1 + 3 * 4 - 1 + 2 * 4  # figure, items, and two in each slider
    assert all(drawn)
    opened.page.screenshot(path=str(tmp_path / "report.png"), full_page=True)
    with Image.open(tmp_path / "report.png") as page:
        assert page.width == 1280
        assert page.height > 1000


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_sticks_out_however_long_names_are(browser: Any, tmp_path: Path, width: int) -> None:
    folder = make_run(tmp_path / "run")
    rows = make_rows(folder, ("a_name_without_a_gap_" * 5, "a name of several words " * 5))
    for row in rows:
        row["item"] += "_without_a_gap" * 9
    write_rows(folder, rows)
    report.write(folder, folder / "report.html")
    watched = Watched(browser, folder / "report.html")
    watched.page.set_viewport_size({"width": width, "height": 900})
    assert watched.page.evaluate("document.scrollingElement.scrollWidth") == width
    room = watched.page.locator(".compared").first.bounding_box()
    left, right = (each.bounding_box() for each in watched.page.locator(".comparer").first.locator("select").all())
    assert left["x"] + left["width"] < right["x"]
    assert right["x"] + right["width"] <= room["x"] + room["width"]
    watched.page.close()


def test_a_head_sorts_its_column_best_first(opened: Watched) -> None:
    before, head = opened.names(), opened.head("PSNR")
    head.get_by_role("button").click()
    down = opened.names()
    assert [name.split()[0] for name in down] == ["autoencoder", "renoise", "easyinv", "ddim", "easyinv", "elsewhere"]
    assert head.get_attribute("aria-sort") == "descending"
    head.get_by_role("button").click()
    assert [*reversed(down[:-1]), down[-1]] == opened.names()  # what has no number stays last
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").click()
    assert opened.names() == before
    assert head.get_attribute("aria-sort") is None


def test_heads_are_sorted_from_the_keyboard(opened: Watched) -> None:
    opened.page.locator("table").first.locator("button").first.focus()
    for key in ("Tab", "Tab", "Tab", "Enter"):
        opened.page.keyboard.press(key)
    assert opened.head("MSE").get_attribute("aria-sort") == "ascending"
    assert [name.split()[0] for name in opened.names()][:3] == ["autoencoder", "ddim", "easyinv"]
    opened.page.keyboard.press("Shift+Tab")
    opened.page.keyboard.press("Space")
    assert opened.head("PSNR").get_attribute("aria-sort") == "descending"
    assert opened.head("MSE").get_attribute("aria-sort") is None


def test_numbers_are_not_sorted_as_text(browser: Any, tmp_path: Path) -> None:
    rows = [{**TABLE[1], "variant": f"T={value}", "PSNR": value} for value in (9, 100, -2, 25.5, 1e-3)]
    folder = make_run(tmp_path / "run", columns=COLUMNS, tables=[{"title": "all", "rows": rows}], published=[])
    report.write(folder, folder / "report.html", 0)
    watched = Watched(browser, folder / "report.html")
    watched.head("PSNR").get_by_role("button").click()
    assert watched.names() == ["T=100", "T=25.5", "T=9", "T=0.001", "T=-2"]
    watched.head("variant").get_by_role("button").click()
    assert watched.names()[-3:] == ["T=9", "T=25.5", "T=100"]
    watched.page.close()


def test_the_slider_cuts_the_left_picture(opened: Watched) -> None:
    """Source left, first result right; by keyboard, then by mouse."""
    frame = opened.page.locator(".frame").first
    assert (opened.colour(frame, 0.4), opened.colour(frame, 0.6)) == (RED, BLUE)
    frame.locator("input").focus()
    opened.page.keyboard.press("Home")
    assert frame.locator(".left").evaluate("e => getComputedStyle(e).clipPath") == "inset(0px 100% 0px 0px)"
    assert opened.colour(frame, 0.1) == BLUE
    for _ in range(30):
        opened.page.keyboard.press("ArrowRight")
    assert (opened.colour(frame, 0.2), opened.colour(frame, 0.4)) == (RED, BLUE)
    assert frame.locator("input").get_attribute("aria-valuetext") == "30% source, 70% easyinv"
    box = frame.bounding_box()
    opened.page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 0.9 * box["height"])
    assert abs(int(frame.locator("input").input_value()) - 80) <= 1
    assert (opened.colour(frame, 0.7), opened.colour(frame, 0.9)) == (RED, BLUE)


def test_any_two_pictures_are_compared(opened: Watched) -> None:
    comparer = opened.page.locator(".comparer").first
    assert comparer.locator(".frame").evaluate("e => e.clientWidth / e.clientHeight") == 2  # as the picture's
    comparer.get_by_label("right").last.select_option("ddim")
    assert opened.colour(comparer.locator(".frame"), 0.9) == GREEN
    comparer.get_by_label("left").last.select_option("easyinv")
    assert opened.colour(comparer.locator(".frame"), 0.1) == BLUE


@pytest.mark.parametrize(("fit", "above"), [("pad", GREEN), ("stretch", RED)])
def test_a_source_of_other_proportions_lies_on_its_result(browser: Any, tmp_path: Path, fit: str, above: Any) -> None:
    """A wide picture between two borders, as it is padded to a square: its result has no borders. Or one made square."""
    source = Image.new("RGB", (64, 64), RED)
    source.paste(GREEN, (0, 16, 64, 48))
    source.save(tmp_path / "source.png")
    Image.new("RGB", (96, 48), BLUE).save(tmp_path / "edited.png")
    files = {"source": "source.png", "edited": "edited.png"}
    (tmp_path / "result.json").write_text(json.dumps({"recipe": {"fit": fit, "prompts": ["x"]}, "images": files}))
    report.write(tmp_path, tmp_path / "report.html")
    watched = Watched(browser, tmp_path / "report.html")
    frame = watched.page.locator(".frame")
    for _ in range(2):
        assert frame.evaluate("e => e.clientWidth / e.clientHeight") == 2
        assert {watched.colour(frame, 0.1), watched.colour(frame, 0.9)} == {above, BLUE}
        watched.page.get_by_label("left").last.select_option("edited")
        watched.page.get_by_label("right").last.select_option("source")
    watched.page.close()


def test_one_choice_changes_every_item_that_has_it(opened: Watched) -> None:
    opened.page.get_by_label("Right picture in every item").select_option("ddim")
    frames = opened.page.locator(".frame").all()
    assert [opened.colour(frame, 0.9) for frame in frames] == [GREEN, GREEN, GREEN, BLUE]
    assert [opened.colour(frame, 0.1) for frame in frames] == [RED] * 4


def test_links_lead_to_their_items(opened: Watched) -> None:
    opened.page.get_by_role("link", name="item 3").first.click()
    opened.page.wait_for_function("document.querySelector('#item-4').getBoundingClientRect().top < innerHeight")
    assert opened.page.url.endswith("#item-4")


def luminance(colour: str) -> float:
    parts = [int(colour.lstrip("#")[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_of_text_is_readable(browser: Any, file: Path, tmp_path: Path, scheme: str) -> None:
    """At least 4.5 to 1, as WCAG 2 asks of text, on both grounds."""
    watched = Watched(browser, file, color_scheme=scheme)
    style = "getComputedStyle(document.documentElement).getPropertyValue"
    names = ("paper", "shade", "ink", "soft", "link", "alert")
    colours = {name: watched.page.evaluate(f"n => {style}(n).trim()", f"--{name}") for name in names}
    colours = {n: c if len(c) == 7 else "#" + "".join(2 * part for part in c[1:]) for n, c in colours.items()}
    for ground in names[:2]:
        for text in names[2:]:
            dark, light = sorted(luminance(colours[name]) for name in (ground, text))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, text)
    watched.page.screenshot(path=str(tmp_path / f"{scheme}.png"))
    with Image.open(tmp_path / f"{scheme}.png") as drawn:
        assert (sum(drawn.convert("RGB").getpixel((2, 2))) > 384) == (scheme == "light")
    watched.page.close()


def test_without_script_pictures_stand_side_by_side(browser: Any, file: Path) -> None:
    watched = Watched(browser, file, java_script_enabled=False)
    assert watched.page.locator("button, select, .frame").count() == 0
    boxes = [each.bounding_box() for each in watched.page.locator("#item-1 img").all()]
    assert len({box["y"] for box in boxes}) == 1
    assert [a["x"] + a["width"] < b["x"] for a, b in pairwise(boxes)] == [True, True]
    assert watched.names()[0] == "autoencoder alone"
    watched.page.close()


def test_what_is_folded_is_printed(opened: Watched) -> None:
    folded = opened.page.locator("details:not([open])")
    assert folded.count() == 3
    opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert folded.count() == 0
    opened.page.emulate_media(media="print")
    assert not opened.page.locator(".comparer").first.is_visible()
    assert opened.page.locator("#item-1 img").nth(2).is_visible()
    opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert folded.count() == 3


def test_a_script_in_a_prompt_stays_text(browser: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = make_rows(folder)
    evil = "</pre></script><script>document.title = 'hacked'</script><img src=http://127.0.0.1:9/x onerror=alert(1)>"
    for row in rows:
        row |= {"prompt": evil, "variant": row["variant"] + evil}
    write_rows(folder, rows)
    (folder / "run.json").write_text(json.dumps({"model": evil}))
    report.write(folder, folder / "report.html")
    watched = Watched(browser, folder / "report.html")
    assert watched.page.title() == "A run"
    assert watched.page.locator("#item-1 .comparer option").last.inner_text() == f"ddim{evil}"
    assert [url for url in watched.requests if not url.startswith(("file:", "data:"))] == watched.errors == []
    watched.page.close()
