"""One self-contained HTML page of a benchmark's run, or of one edit.

A run's folder holds run.json (the request), config.yaml, environment.json, summary.json ("title", "kind", "columns", "tables",
"published", "notes"), perhaps leaderboard.json ("title", "judged", "rows"), and
results.jsonl, a line for each item and variant: "item", "group", "variant", prompts, numbers by the names of columns,
"pictures" {what it shows: path in the folder}, or "error". An edit's folder holds result.json ("recipe",
"images" {name: file}, costs, "versions") and pictures, as `EditResult.save` writes them. What of this is missing or torn is
told on the page. Pictures are embedded, large ones as thumbnails; the page asks nothing of the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from easyinv_edit.errors import InputError
from easyinv_edit.evaluation.report_board import board_of
from easyinv_edit.evaluation.report_edit import edit_page
from easyinv_edit.evaluation.report_files import (
    block_of,
    content_of,
    dicts_of,
    facts_of,
    figures_of,
    list_of,
    moment_of,
    parsed_of,
    picture_of,
    text_of,
)
from easyinv_edit.evaluation.report_page import Column, Item, Line, Page, Picture, Row
from easyinv_edit.evaluation.report_tables import cells_of, column_of, columns_of, ranked_of, tables_of
from easyinv_edit.result import write_text

RUN_FILES = ("run.json", "results.jsonl", "summary.json")
BOARD = "leaderboard.json"
BLOCKS = (
    ("configuration", "Configuration as it was given", "config.yaml"),
    ("request", "Request with every key", "run.json"),
    ("environment", "Environment", "environment.json"),
)
SHARED = ("source", "truth", "mask")
"""Pictures that belong to an item, not to a variant."""
PLACES = {name: place for place, name in enumerate((*SHARED, "result"))}
"""What pictures of an item come first; others follow."""


def write(folder: Path, output: Path, limit: int = 50, side: int = 384) -> dict[str, Any]:
    """Write the page of a folder, whole or not at all; returns what it holds, JSON-able.

    limit: of how many items pictures and numbers are shown; side: the longest side of their pictures, in pixels. Raises
    InputError where the folder holds no results or the page cannot be written.
    """
    page = read(folder, limit, side)
    text = render(page)
    write_text(output, text)
    missing = sum(picture.data is None for picture in page.pictures)
    return {
        "file": str(output),
        "items": page.count,
        "shown": len(page.items),
        "pictures": len(page.pictures) - missing,
        "missing": missing,
        "bytes": len(text.encode()),
    }


def read(folder: Path, limit: int, side: int) -> Page:
    """The page of a run's or an edit's folder. Raises InputError where it is neither, or holds nothing yet."""
    if not folder.is_dir():
        reason = "is no folder" if folder.exists() else "there is no such folder"
        raise InputError(f"{folder}: {reason}; give the output folder of a benchmark or of an edit")
    if any((folder / name).is_file() for name in RUN_FILES):
        return _run_page(folder, limit, side)
    if (folder / "result.json").is_file():
        return edit_page(folder, limit, side)
    raise InputError(f"{folder}: holds neither a run ({', '.join(RUN_FILES)}) nor an edit (result.json); give a folder of one")


def render(page: Page) -> str:
    """The page as HTML. Everything that comes from files is escaped."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("report.html.j2").render(page=page)
    return text.encode("utf-8", "replace").decode()  # JSON may hold halves of characters, which no file can


def _run_page(folder: Path, limit: int, side: int) -> Page:
    rows, torn = _results(folder / "results.jsonl")
    summary, request, environment = (content_of(folder / f"{name}.json") for name in ("summary", "run", "environment"))
    if not rows and not dicts_of(summary.get("tables")):
        raise InputError(f"{folder}: the run has no results yet; let it finish an item first")
    columns = tuple(map(column_of, dicts_of(summary.get("columns")))) or columns_of(rows)
    tables, reasons = tables_of(summary, columns)
    items = _by_item(rows)
    notes = [str(note) for note in list_of(summary.get("notes"))]
    return Page(
        title=str(summary.get("title") or request.get("title") or folder.resolve().name),
        facts=facts_of(_run_facts(request, environment)),
        notes=(*notes, *_lacks(folder, environment, torn)),
        tables=tables,
        reasons=reasons,
        figures=tuple(figures_of(folder)),
        items=tuple(_item(folder, name, items[name], columns, side) for name in _chosen(items, limit)),
        blocks=tuple((anchor, title, file, block_of(folder / file)) for anchor, title, file in BLOCKS),
        count=len(items),
        side=side,
        board=board_of(content_of(folder / BOARD), columns),
    )


def _run_facts(request: Row, environment: Row) -> dict[str, Any]:
    data = request.get("data")
    return {
        "kind": request.get("kind"),
        "pictures": data.get("set") if isinstance(data, dict) else None,
        "model": request.get("model"),
        "steps": request.get("num_inference_steps"),
        "guidance": request.get("guidance_scale"),
        "device": environment.get("gpu") or environment.get("cpu") or environment.get("device"),
        "precision": environment.get("dtypes"),
        "started": moment_of(environment.get("started")),
        "finished": moment_of(environment.get("finished")),
    }


def _lacks(folder: Path, environment: Row, torn: int) -> Iterable[str]:
    """What is not there, in words."""
    if not (folder / "summary.json").is_file():
        yield "there is no summary.json, so there are no tables: the run is not finished; the command that began it goes on"
    elif not content_of(folder / "summary.json"):
        yield "summary.json cannot be read, so there are no tables; the command of the run writes it again"
    elif environment and environment.get("finished") is None:
        yield "environment.json knows no end of the run: it goes on or was stopped, and the tables may be of fewer results"
    if (folder / BOARD).is_file() and not content_of(folder / BOARD):
        yield f"{BOARD} cannot be read and is left out; remove it, and the command of the run writes it again"
    if torn:
        yield f"lines of results.jsonl that cannot be read and are left out: {torn}"


def _results(file: Path) -> tuple[list[Row], int]:
    """The rows that name an item and a variant, the last one of each pair, and how many lines are none."""
    lines = [line for line in (text_of(file) or "").split("\n") if line.strip()]
    read = [parsed_of(line) for line in lines]
    sound = [row for row in read if isinstance(row.get("item"), str) and isinstance(row.get("variant"), str)]
    return list({(row["item"], row["variant"]): row for row in sound}.values()), len(lines) - len(sound)


def _by_item(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["item"], []).append(row)
    return found


def _chosen(items: Mapping[str, Sequence[Row]], limit: int) -> list[str]:
    """So many items in their order, from every group about as many: a benchmark's first items are often all of one group."""
    before: Counter[str] = Counter()
    turns = {}
    for name, rows in items.items():
        group = str(rows[0].get("group"))
        turns[name] = before[group]
        before[group] += 1
    kept = set(sorted(items, key=lambda name: turns[name])[:limit])
    return [name for name in items if name in kept]


def _item(folder: Path, name: str, rows: Sequence[Row], columns: Sequence[Column], side: int) -> Item:
    own = tuple(column for column in columns if any(column.name in row for row in rows))
    lines = [
        Line(row["variant"], error=str(row["error"])) if "error" in row else Line(row["variant"], cells_of(row, own))
        for row in rows
    ]
    table = ranked_of(f"Numbers of {name}", own, lines) if own or any(line.error for line in lines) else None
    return Item(name, str(rows[0].get("group") or ""), _prompts(rows), tuple(_pictures(folder, name, rows, side)), table)


def _prompts(rows: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    """The item's prompts, each with the variants that had it where these differ."""
    found: list[tuple[str, str]] = []
    for key, label in (("source_prompt", "source prompt"), ("prompt", "prompt")):
        by_text: dict[str, list[str]] = {}
        for row in rows:
            if isinstance(row.get(key), str):
                by_text.setdefault(row[key], []).append(row["variant"])
        several = len(by_text) > 1
        found += [(f"{label} of {_listed(names)}" if several else label, text) for text, names in by_text.items()]
    return tuple(found)


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names) if len(names) < 4 else f"{names[0]}; {names[1]} and {len(names) - 2} more"


def _pictures(folder: Path, item: str, rows: Sequence[Row], side: int) -> Iterable[Picture]:
    """The item's own pictures, every variant's result, then what else variants have."""
    files: dict[str, tuple[int, str]] = {}
    for row in rows:
        given = row.get("pictures")
        for what, file in given.items() if isinstance(given, dict) else ():
            label = what if what in SHARED else row["variant"] + ("" if what == "result" else f", {what}")
            files.setdefault(label, (PLACES.get(what, len(PLACES)), str(file)))
    for label, (place, file) in sorted(files.items(), key=lambda each: each[1][0]):
        yield replace(picture_of(folder, file, label, f"{item}: {label}", side), shared=place < len(SHARED))
