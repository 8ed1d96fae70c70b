"""The figures of a benchmark run, from what its folder holds: grids of the pictures, middle latents, quality against cost."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from easyinv_edit.errors import EasyInvWarning, InputError
from easyinv_edit.evaluation import pareto
from easyinv_edit.evaluation.bench_grids import Cell, Head, Row, page
from easyinv_edit.evaluation.bench_strips import strips
from easyinv_edit.evaluation.run_folder import Run, read
from easyinv_edit.evaluation.variants import CEILING
from easyinv_edit.images import save_png

FOLDER = "figures"
LEVEL = "latent"
"""Among a result's pictures: the latent of the middle level, decoded."""
MOST_ROWS = 16
"""Variants on a page."""
MOST_LATENTS = 3
"""Items whose middle latents are shown: each takes three columns."""
QUALITY = ("PSNR", "inside", "background PSNR", "truth PSNR")
"""What a plot of quality shows, the first that is measured; else the first other column that says which way is better."""
COSTS = {
    "inversion": {"evaluations": "inverting", "sampling evaluations": "sampling back"},
    "edits": {"inversion evaluations": "inverting", "evaluations": "editing"},
}
"""By kind of benchmark: columns whose sum is what a picture costs, and what that is spent on."""
NO_QUALITY = ("evaluations", "sampling evaluations", "inversion evaluations", "seconds", "inversion seconds", "x DDIM")


def draw(folder: Path, *, items: int = 8) -> list[Path]:
    """Draw everything the run's results allow into its folder `figures` and return the files, each whole or not there at all.

    grid*.png: a column per item, at most `items`, and a row per variant below the source and the true result; for each group of
    items by itself; where one page is not enough for all variants, a page with every control of each inversion, and one with
    every inversion under each control. grid-guided*.png: the same, sampled back at an edit's guidance. strips.png: where
    controls are for some groups only, a row per control and group, with the prompt alone beside it. latents*.png: source, the
    middle level's latent decoded, and result. pareto*.png: quality against evaluations, a plot per table; without
    matplotlib a warning stands for them. The same folder gives the same bytes. Raises InputError where items is below 1 or the
    folder cannot be written.
    """
    if items < 1:
        raise InputError(f"items={items}: give a number of columns, 1 or more")
    run = read(Path(folder))
    made: list[Path] = []
    for figures in (_grids(run, "result", items), _grids(run, "guided", items), strips(run), _latents(run, items), _plots(run)):
        for name, picture in figures:
            target = _free(run.folder / FOLDER, name, made)
            save_png(picture, target)
            made.append(target)
    return made


# --- grids --------------------------------------------------------------------------------------------------------------


def _grids(run: Run, key: str, most: int) -> Iterator[tuple[str, Image.Image]]:
    """(name, page) of the grids of one kind of picture: "result", or "guided"."""
    guided = ("guided", "at an edit's guidance") if key == "guided" else ("", "")
    for group, members in run.groups().items():
        items = _with_pictures(run, members, key)[:most]
        variants = [v for v in run.variants if any(run.tells(v, item, key) for item in items)]
        for part in _parts(run, variants):
            rows = list(_variant_rows(run, part, items, key))
            if _shows(rows):
                heads, title = [_head(run, item) for item in items], _title(run, guided[1], group, *part.words)
                yield _joined("grid", guided[0], group, *part.names), page([*_references(run, items), *rows], heads, title)


def _with_pictures(run: Run, items: Sequence[str], key: str) -> list[str]:
    """Those items that some variant has such a picture of."""
    shown = {row["item"] for row in run.rows if key in (row.get("pictures") or {})}
    return [item for item in items if item in shown]


@dataclass(frozen=True)
class _Part:
    """The variants of one page. by: "control" or "inversion", which tells blocks of rows apart; name: the one that all have in
    common, where it tells pages apart; number, count: of the pages of that name."""

    variants: Sequence[str]
    by: str
    name: str = ""
    number: int = 1
    count: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, str(self.number) if self.count > 1 else ""

    @property
    def words(self) -> tuple[str, ...]:
        return self.name, f"page {self.number} of {self.count}" if self.count > 1 else ""


def _parts(run: Run, variants: Sequence[str]) -> Iterator[_Part]:
    """Variants page by page: all of them, one control after the other, where a page is enough; else all controls of each
    inversion, plain sampling first, and all inversions under each control."""
    if len(variants) <= MOST_ROWS:
        yield _Part([variant for own in _by(run, "control", variants).values() for variant in own], "control")
        return
    shown: set[str] = set()
    for inversion, own in _by(run, "inversion", variants).items():
        if len(_by(run, "control", own)) > 1:
            shown.update(own)
            yield from _cut(sorted(own, key=lambda v: run.parts[v].get("control") != "none"), "inversion", inversion)
    for control, own in _by(run, "control", variants).items():
        if len(_by(run, "inversion", own)) > 1 or not shown.issuperset(own):
            yield from _cut(own, "control", control)


def _by(run: Run, key: str, variants: Sequence[str]) -> dict[str, list[str]]:
    """Variants by their control or inversion."""
    found: dict[str, list[str]] = {}
    for variant in variants:
        found.setdefault(str(run.parts[variant].get(key) or ""), []).append(variant)
    return found


def _cut(own: Sequence[str], by: str, name: str) -> Iterator[_Part]:
    """Evenly into pages of at most MOST_ROWS."""
    count = -(-len(own) // MOST_ROWS)
    for i in range(count):
        yield _Part(own[len(own) * i // count : len(own) * (i + 1) // count], by, name, i + 1, count)


def _title(run: Run, *parts: str) -> str:
    return ", ".join(filter(None, (run.title, *parts)))


def _shows(rows: Sequence[Row]) -> bool:
    """Whether there is a picture in them."""
    return any(isinstance(cell, Image.Image) for row in rows for cell in row.cells)


def _references(run: Run, items: Sequence[str]) -> Iterator[Row]:
    """The source on top, and the true result below it where there is one."""
    for key, label in (("source", "source"), ("truth", "true result")):
        cells = [run.shared(item, key) for item in items]
        if any(cells):
            yield Row(label, cells)


def _variant_rows(run: Run, part: _Part, items: Sequence[str], key: str) -> Iterator[Row]:
    """A row per variant; those of another control (or inversion) than the one above stand apart."""
    before: Any = ...
    for variant in part.variants:
        here = run.parts[variant].get(part.by)
        yield Row(variant, [run.picture(variant, item, key) for item in items], apart=here != before)
        before = here


def _head(run: Run, item: str) -> Head:
    """The item's name, and the prompt it is edited with."""
    prompt = next((str(row.get("prompt") or "") for row in run.rows if row["item"] == item), "")
    return Head(item, prompt if run.kind == "edits" else "")


def _latents(run: Run, most: int) -> Iterator[tuple[str, Image.Image]]:
    """(name, page): three columns per item, a row per variant."""
    items = _with_pictures(run, list(dict.fromkeys(row["item"] for row in run.rows)), LEVEL)[: min(most, MOST_LATENTS)]
    variants = [v for v in run.variants if any(run.tells(v, item, LEVEL) for item in items)]
    heads = [Head(n, d, bool(n)) for item in items for n, d in ((item, "source"), ("", "middle level"), ("", "result"))]
    for part in _parts(run, variants):
        rows = [Row(variant, [cell for item in items for cell in _three(run, variant, item)]) for variant in part.variants]
        if _shows(rows):
            yield _joined("latents", *part.names), page(rows, heads, _title(run, "latent of the middle level", *part.words))


def _three(run: Run, variant: str, item: str) -> tuple[Cell, Cell, Cell]:
    """What a variant has to show of an item's way."""
    return run.shared(item, "source"), run.picture(variant, item, LEVEL), run.picture(variant, item, "result")


# --- quality against cost -----------------------------------------------------------------------------------------------


def _plots(run: Run) -> Iterator[tuple[str, Image.Image]]:
    """(name, plot) of every table with two variants or more that have both numbers; a warning where matplotlib is missing."""
    for table in run.tables:
        if (plot := plot_of(run, table)) is None:
            continue
        try:
            yield _joined("pareto", str(table.get("group") or "")), pareto.draw(plot)
        except InputError as error:
            warnings.warn(f"no plot of quality against evaluations: {error}", EasyInvWarning, stacklevel=3)
            return


def plot_of(run: Run, table: Mapping[str, Any]) -> pareto.Plot | None:
    """What is plotted of a table; None where it has not two variants with a quality and a number of evaluations."""
    columns = {str(column["name"]): column for column in run.summary.get("columns", []) if column.get("better")}
    usual = [name for name in (*QUALITY, *columns) if name in columns and name not in NO_QUALITY]
    quality = next((name for name in usual if any(_number(row.get(name)) is not None for row in table["rows"])), None)
    spent = {name: what for name, what in COSTS.get(run.kind, {}).items() if any(_number(r.get(name)) for r in table["rows"])}
    if quality is None or not spent:
        return None
    points, ceilings, digits = [], {}, columns[quality]["digits"]
    for row in table["rows"]:
        value, costs = _number(row.get(quality)), [_number(row.get(name)) for name in spent]
        if value is None:
            continue
        value = round(value, digits)  # as in the table: a difference that it does not show puts nothing on the front
        if str(row["variant"]).startswith(CEILING):
            ceilings[f"{row['variant']}: {value:.{digits}f}"] = value
        elif None not in costs and (cost := sum(filter(None, costs))) > 0:
            points.append(pareto.Point(*_named(run, str(row["variant"])), cost, value))
    if len(points) < 2:
        return None
    unit = f", {columns[quality]['unit']}" if columns[quality].get("unit") else ""
    lower = columns[quality]["better"] == "lower"
    return pareto.Plot(
        points,
        ceilings,
        title=_title(run, str(table.get("group") or "")),
        cost_title=f"evaluations per picture: {' + '.join(spent.values())}",
        quality_title=f"{quality}{unit} ({'lower is better, axis turned round' if lower else 'higher is better'})",
        lower=lower,
    )


def _named(run: Run, variant: str) -> tuple[str, str]:
    """(label, series) of a variant: by its control where it is an edit, by T and dtype where these are in its name."""
    parts = run.parts.get(variant, {})
    inversion, control = str(parts.get("inversion")), str(parts.get("control"))
    if variant.endswith(f" + {control}"):
        return variant.removesuffix(f" + {control}"), control
    if variant.startswith(f"{inversion}, "):
        return inversion, variant.removeprefix(f"{inversion}, ")
    return variant, ""


def _number(value: Any) -> float | None:
    """The value where it is a finite number."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


# --- files --------------------------------------------------------------------------------------------------------------


def _joined(*parts: str) -> str:
    """Parts of a figure's name with what file names should not have left out; short enough for every file system."""
    slugs = [re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts]
    return "-".join(filter(None, slugs)).encode()[:150].decode(errors="ignore")


def _free(folder: Path, name: str, taken: Sequence[Path]) -> Path:
    """The file of that name, numbered where another figure of the run has it already, were it in other letters' case."""
    others = {path.name.casefold() for path in taken}
    names = (f"{name}.png", *(f"{name}-{number}.png" for number in range(2, len(taken) + 2)))
    return folder / next(each for each in names if each.casefold() not in others)
