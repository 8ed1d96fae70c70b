"""One self-contained HTML page of a benchmark's run, or of one edit.

A run's folder holds run.json (the request), config.yaml, environment.json, summary.json ("title", "kind", "columns", "tables",
"published", "notes") and results.jsonl, a line for each item and variant: "item", "group", "variant", prompts, numbers by the
names of columns, "pictures" {what it shows: path in the folder}, or "error". An edit's folder holds result.json ("recipe",
"images" {name: file}, costs, "versions") and pictures, as `EditResult.save` writes them. What of this is missing or torn is
told on the page. Pictures are embedded, large ones as thumbnails; the page asks nothing of the network.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from easyinv_edit import images
from easyinv_edit.errors import ImageError, InputError
from easyinv_edit.result import write_text

Row = Mapping[str, Any]
RUN_FILES = ("run.json", "results.jsonl", "summary.json")
BLOCKS = (
    ("configuration", "Configuration as it was given", "config.yaml"),
    ("request", "Request with every key", "run.json"),
    ("environment", "Environment", "environment.json"),
)
SHARED = ("source", "truth", "mask")
"""Pictures that belong to an item, not to a variant."""
PLACES = {name: place for place, name in enumerate((*SHARED, "result"))}
"""What pictures of an item come first; others follow."""
CEILING = "autoencoder alone"
NO_COLUMNS = ("kind", "item", "group", "variant", "inversion", "steps", "dtype", "control")
PNG = b"\x89PNG\r\n\x1a\n"
KEPT, FIGURE_KEPT = 2**16, 2**20
"""PNG files of up to so many bytes are embedded as they are; others as JPEG."""
FIGURE_SIDE = 2000


@dataclass(frozen=True)
class Column:
    """better: "higher", "lower" or None for neither; digits: after the point, None for four that count."""

    name: str
    unit: str = ""
    better: str | None = None
    digits: int | None = None


@dataclass(frozen=True)
class Cell:
    """value: what it is sorted by, None where there is none; fewer: of how many items where these are not all of the line's."""

    text: str
    value: float | None = None
    fewer: int | None = None
    best: bool = False


@dataclass(frozen=True)
class Line:
    """source: where a published line is from, empty for ours; reason: why it is not comparable, as a number counted from 1;
    error: why a result is none."""

    name: str
    cells: tuple[Cell, ...] = ()
    source: str = ""
    reason: int | None = None
    error: str = ""

    @property
    def ranked(self) -> bool:
        """Whether it can be the best: published lines and the ceiling stand apart."""
        return not self.source and not self.name.startswith(CEILING)


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Picture:
    """data: a data URI of `size` (width, height), None where the picture is missing, and then `lack` says why."""

    label: str
    alt: str
    file: str
    shared: bool = False
    data: str | None = None
    size: tuple[int, int] = (0, 0)
    lack: str = ""


@dataclass(frozen=True)
class Item:
    """texts: (label, prompt); table: its numbers, None where there are none."""

    name: str
    group: str
    texts: tuple[tuple[str, str], ...]
    pictures: tuple[Picture, ...]
    table: Table | None = None


@dataclass(frozen=True)
class Page:
    """What the template shows. facts: (label, text); blocks: (anchor, title, file, text or None where the file is missing);
    reasons: of lines whose protocol differs; count: of items there are; side: of pictures in pixels; stretched: whether an
    edit's source has other proportions than its result."""

    title: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    tables: tuple[Table, ...]
    reasons: tuple[str, ...]
    figures: tuple[Picture, ...]
    items: tuple[Item, ...]
    blocks: tuple[tuple[str, str, str, str | None], ...]
    count: int
    side: int
    stretched: bool = False

    @property
    def pictures(self) -> list[Picture]:
        """Those of items, and figures."""
        return [*self.figures, *(picture for item in self.items for picture in item.pictures)]


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
        return _edit_page(folder, limit, side)
    raise InputError(f"{folder}: holds neither a run ({', '.join(RUN_FILES)}) nor an edit (result.json); give a folder of one")


def render(page: Page) -> str:
    """The page as HTML. Everything that comes from files is escaped."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("report.html.j2").render(page=page)
    return text.encode("utf-8", "replace").decode()  # JSON may hold halves of characters, which no file can


# --- a run ----------------------------------------------------------------------------------------------------------------


def _run_page(folder: Path, limit: int, side: int) -> Page:
    rows, torn = _results(folder / "results.jsonl")
    summary, request, environment = (_content(folder / f"{name}.json") for name in ("summary", "run", "environment"))
    if not rows and not _dicts(summary.get("tables")):
        raise InputError(f"{folder}: the run has no results yet; let it finish an item first")
    columns = tuple(map(_column, _dicts(summary.get("columns")))) or _columns_of(rows)
    tables, reasons = _tables(summary, columns)
    items = _by_item(rows)
    notes = [str(note) for note in _list(summary.get("notes"))]
    return Page(
        title=str(summary.get("title") or request.get("title") or folder.resolve().name),
        facts=_facts(_run_facts(request, environment)),
        notes=(*notes, *_lacks(folder, environment, torn)),
        tables=tables,
        reasons=reasons,
        figures=tuple(_figures(folder)),
        items=tuple(_item(folder, name, items[name], columns, side) for name in _chosen(items, limit)),
        blocks=tuple((anchor, title, file, _block(folder / file)) for anchor, title, file in BLOCKS),
        count=len(items),
        side=side,
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
        "started": _moment(environment.get("started")),
        "finished": _moment(environment.get("finished")),
    }


def _lacks(folder: Path, environment: Row, torn: int) -> Iterable[str]:
    """What is not there, in words."""
    if not (folder / "summary.json").is_file():
        yield "there is no summary.json, so there are no tables: the run is not finished; the command that began it goes on"
    elif not _content(folder / "summary.json"):
        yield "summary.json cannot be read, so there are no tables; the command of the run writes it again"
    elif environment and environment.get("finished") is None:
        yield "environment.json knows no end of the run: it goes on or was stopped, and the tables may be of fewer results"
    if torn:
        yield f"lines of results.jsonl that cannot be read and are left out: {torn}"


def _results(file: Path) -> tuple[list[Row], int]:
    """The rows that name an item and a variant, the last one of each pair, and how many lines are none."""
    lines = [line for line in (_text(file) or "").split("\n") if line.strip()]
    read = [_parsed(line) for line in lines]
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
        Line(row["variant"], error=str(row["error"])) if "error" in row else Line(row["variant"], _cells(row, own))
        for row in rows
    ]
    table = _ranked(f"Numbers of {name}", own, lines) if own or any(line.error for line in lines) else None
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
        yield replace(_picture(folder, file, label, f"{item}: {label}", side), shared=place < len(SHARED))


# --- tables ---------------------------------------------------------------------------------------------------------------


def _column(given: Row) -> Column:
    digits, better = given.get("digits"), given.get("better")
    return Column(
        str(given.get("name", "")),
        str(given.get("unit") or ""),
        better if better in ("higher", "lower") else None,
        digits if type(digits) is int and 0 <= digits <= 12 else None,
    )


def _columns_of(rows: Sequence[Row]) -> tuple[Column, ...]:
    """Columns where there is no summary to describe them: whatever is a number in some row."""
    names = dict.fromkeys(key for row in rows for key, value in row.items() if _number(value) is not None)
    return tuple(Column(name) for name in names if name not in NO_COLUMNS)


def _tables(summary: Row, columns: Sequence[Column]) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """The tables, with published lines in the first one, and the reasons that keep these from being comparable."""
    counted = (Column("n", digits=0), *columns)
    published = _dicts(summary.get("published"))
    reasons = list(dict.fromkeys(_reason(row) for row in published if not row.get("same_protocol")))
    tables = []
    for number, given in enumerate(_dicts(summary.get("tables"))):
        ours = [Line(str(row.get("variant", "")), _cells(row, counted)) for row in _dicts(given.get("rows"))]
        theirs = [_published(row, counted, reasons) for row in published if number == 0]
        title = str(given.get("title") or given.get("group") or "all items")
        tables.append(_ranked(title, counted, _beside(ours, theirs)))
    return tuple(tables), tuple(reasons)


def _reason(row: Row) -> str:
    return str(row.get("why") or "the protocol is another one")


def _published(row: Row, columns: Sequence[Column], reasons: Sequence[str]) -> Line:
    reason = None if row.get("same_protocol") else reasons.index(_reason(row)) + 1
    return Line(str(row.get("variant", "")), _cells(row, columns), str(row.get("source") or "published"), reason)


def _beside(ours: Sequence[Line], theirs: Sequence[Line]) -> list[Line]:
    """Each line of ours with the published ones of its variant below it; the others last."""
    names = {line.name for line in ours}
    pairs = [[line, *(other for other in theirs if other.name == line.name)] for line in ours]
    return [line for pair in pairs for line in pair] + [line for line in theirs if line.name not in names]


def _cells(row: Row, columns: Sequence[Column]) -> tuple[Cell, ...]:
    return tuple(_cell(row.get(column.name), column, row.get(f"{column.name} n")) for column in columns)


def _cell(value: Any, column: Column, fewer: Any) -> Cell:
    number, count = _number(value), _number(fewer)
    if number is None:
        return Cell(value if isinstance(value, str) else "")
    text = f"{number:.4g}" if column.digits is None else f"{number:.{column.digits}f}"
    return Cell(text, number, None if count is None else int(count))


def _ranked(title: str, columns: Sequence[Column], lines: Sequence[Line]) -> Table:
    """The table with the best of ours marked in each column, as far as its digits tell; means of fewer items do not count."""
    best: list[str | None] = []
    for index, column in enumerate(columns):
        cells = [line.cells[index] for line in lines if line.ranked and line.cells]
        found = {cell.value: cell.text for cell in cells if cell.value is not None and cell.fewer is None}
        choose = max if column.better == "higher" else min
        best.append(found[choose(found)] if column.better and len(set(found.values())) > 1 else None)

    def marked(line: Line) -> Line:
        cells = zip(line.cells, best, strict=False)
        return replace(line, cells=tuple(replace(c, best=c.fewer is None and c.text == top) for c, top in cells))

    return Table(title, tuple(columns), tuple(marked(line) if line.ranked else line for line in lines))


# --- an edit --------------------------------------------------------------------------------------------------------------


def _edit_page(folder: Path, limit: int, side: int) -> Page:
    content = _content(folder / "result.json")
    recipe, files = content.get("recipe"), content.get("images")
    if not isinstance(recipe, dict) or not isinstance(files, dict):
        raise InputError(f"{folder / 'result.json'}: holds no edit (no recipe and images); give an edit's output folder")
    prompts = [str(prompt) for prompt in _list(recipe.get("prompts"))]
    edited = [name for name in files if name.startswith("edited")]
    flags = zip(edited, _list(content.get("flagged")), strict=False)
    again = "recipe.yaml" if recipe.get("image") else "recipe.yaml with its image added"
    record = {key: content.get(key) for key in ("model", "versions")}
    return Page(
        title="; ".join(prompts) or folder.resolve().name,
        facts=_facts(_edit_facts(content, recipe)),
        notes=tuple(f"the safety checker made {name} black" for name, flagged in flags if flagged is True),
        tables=(),
        reasons=(),
        figures=(),
        items=(_edit_item(folder, recipe, files, edited, prompts, side),)[:limit],
        blocks=(
            ("recipe", f"Recipe, to be run again as a file {again}", "result.json", _pretty(recipe)),
            ("environment", "Environment", "result.json", _pretty(record)),
        ),
        count=1,
        side=side,
        stretched=recipe.get("fit") == "stretch",
    )


def _edit_item(
    folder: Path, recipe: Row, files: Mapping[str, Any], edited: Sequence[str], prompts: Sequence[str], side: int
) -> Item:
    """The source, its reconstruction and the edited pictures, each of these with its prompt."""
    own = [name for name in ("source", "reconstruction") if name in files]
    made = [_picture(folder, str(files[name]), name, f"the {name} picture", side) for name in [*own, *edited]]
    source_prompt = recipe.get("source_prompt")
    texts = [] if source_prompt is None else [("source prompt", str(source_prompt))]
    texts += [(f"prompt of {name}" if len(edited) > 1 else "prompt", text) for name, text in zip(edited, prompts, strict=False)]
    pictures = tuple(replace(picture, shared=picture.label in own) for picture in made)
    return Item("Source and result", "", tuple(texts), pictures)


def _edit_facts(content: Row, recipe: Row) -> dict[str, Any]:
    def part(key: str, name: str, unit: str = "") -> str | None:
        value = content[key].get(name) if isinstance(content.get(key), dict) else None
        return None if value is None else f"{value}{unit}"

    def named(key: str) -> Any:
        return recipe[key].get("name") if isinstance(recipe.get(key), dict) else recipe.get(key)

    memory = _number(content.get("peak_memory_bytes"))
    return {
        "model": recipe.get("model") or part("model", "name"),
        "inversion": named("inversion"),
        "control": named("control"),
        "steps": recipe.get("num_inference_steps"),
        "guidance": recipe.get("guidance_scale"),
        "evaluations to invert": part("evaluations", "invert"),
        "evaluations to edit": part("evaluations", "edit"),
        "seconds to invert": part("seconds", "invert"),
        "seconds to edit": part("seconds", "edit"),
        "reconstruction": part("reconstruction", "psnr", " dB"),
        CEILING: part("reconstruction", "vae_psnr", " dB"),
        "peak memory": f"{memory / 1e9:.2f} GB" if memory else None,
    }


# --- pictures and files ---------------------------------------------------------------------------------------------------


def _figures(folder: Path) -> Iterable[Picture]:
    for file in sorted((folder / "figures").glob("*.png")):
        title = file.stem.replace("-", " ").replace("_", " ")
        yield _picture(folder, f"figures/{file.name}", title, f"figure: {title}", FIGURE_SIDE, FIGURE_KEPT)


def _picture(folder: Path, file: str, label: str, alt: str, side: int, kept: int = KEPT) -> Picture:
    """A picture of the folder: a PNG file as it is, anything larger or heavier than `kept` as a JPEG of at most `side` pixels.

    One that is elsewhere counts as missing, for a page goes further than its folder.
    """
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        return Picture(label, alt, file, lack="is outside of the folder")
    try:
        content, picture = (folder / path).read_bytes(), images.load(folder / path)
    except ImageError:
        return Picture(label, alt, file, lack="cannot be read")
    except (OSError, ValueError):  # the latter for paths that no file can have
        return Picture(label, alt, file, lack="is missing")
    kind = "png"
    if max(picture.size) > side or len(content) > kept or not content.startswith(PNG):
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        content, kind = _jpeg(picture), "jpeg"
    data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(label, alt, file, data=data, size=picture.size)


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def _text(path: Path) -> str | None:
    """A file's text, None where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _parsed(text: str) -> dict[str, Any]:
    """A JSON object, empty where the text is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _content(path: Path) -> dict[str, Any]:
    return _parsed(_text(path) or "")


def _block(path: Path) -> str | None:
    """What a collapsible block shows: JSON indented, anything else as it is."""
    text, content = _text(path), _content(path)
    return _pretty(content) if content else text


def _pretty(content: Row) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _facts(given: Row) -> tuple[tuple[str, str], ...]:
    """Labels and texts of what is known."""
    texts = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in given.items()}
    return tuple((key, str(value)) for key, value in texts.items() if value not in (None, ""))


def _moment(value: Any) -> str:
    """A time of environment.json for people."""
    return str(value or "").replace("T", " ").replace("+00:00", " UTC")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON knows whole numbers of any length
        return None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in _list(value) if isinstance(each, dict)]
