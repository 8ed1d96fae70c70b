"""Strips of a run whose controls are each for some kinds of edits: a row per control and kind that shows it at one glance."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from easyinv_edit.evaluation.bench_grids import Head, Row, page
from easyinv_edit.evaluation.run_folder import Run
from easyinv_edit.evaluation.variants import BASELINE

SCENES = 2
"""Items in a row: the first of the kind."""
COLUMNS = ("source", "prompt alone", "edit", "true result")


def strips(run: Run) -> Iterator[tuple[str, Image.Image]]:
    """("strips", page) of a run of edits in which some control is not for every group of items and some line has none."""
    groups = run.groups()
    chosen = [
        (variant, plain, group, items)
        for variant in run.variants
        if (plain := _plain(run, variant)) is not None
        for group, members in groups.items()
        if (items := [item for item in members if run.tells(variant, item, "result")][:SCENES])
    ]
    lines = {variant for variant, *_ in chosen}
    if run.kind != "edits" or len(chosen) == len(lines) * len(groups):
        return
    rows = [Row(_label(run, variant, group), _cells(run, variant, plain, items)) for variant, plain, group, items in chosen]
    heads = [Head(name, apart=name == COLUMNS[0]) for _ in range(SCENES) for name in COLUMNS]
    if any(isinstance(cell, Image.Image) for row in rows for cell in row.cells):
        yield "strips", page(rows, heads, run.title)


def _plain(run: Run, variant: str) -> str | None:
    """The line without control after the same inversion; None for itself."""
    own = run.parts[variant]
    if own.get("control") in (None, BASELINE):
        return None
    same = [v for v in run.variants if all(run.parts[v].get(key) == own.get(key) for key in ("inversion", "steps", "dtype"))]
    return next((v for v in same if run.parts[v].get("control") == BASELINE), None)


def _label(run: Run, variant: str, group: str) -> str:
    """The edit and the control, and the inversion where there are several."""
    inversions = {parts.get("inversion") for parts in run.parts.values()}
    name = variant if len(inversions) > 1 else str(run.parts[variant].get("control"))
    return f"{group}: {name}" if group else name


def _cells(run: Run, variant: str, plain: str, items: list[str]) -> list[Image.Image | str]:
    cells: list[Image.Image | str] = []
    for item in items:
        made = (run.picture(line, item, "result") for line in (plain, variant))
        cells += [run.shared(item, "source"), *made, run.shared(item, "truth")]
    return cells + [""] * (SCENES * len(COLUMNS) - len(cells))
