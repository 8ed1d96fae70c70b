"""Strips: which rows there are, what they show, and when there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from easyinv_edit.evaluation.bench_figures import draw
from easyinv_edit.evaluation.bench_strips import COLUMNS, SCENES
from tests.evaluation.bench_folder import Folder, cell, magnified, names, pixels, sheet

ALL = ("source", "result", "truth")


@pytest.fixture
def edits(tmp_path: Path) -> Folder:
    """Three edits of shape and one of place; without control, under one control for both and one for shape only."""
    folder = Folder(tmp_path / "run", "edits")
    for item, group in (("a", "shape"), ("b", "shape"), ("c", "shape"), ("d", "place")):
        for control in ("none", "wide", *(["narrow"] if group == "shape" else [])):
            folder.add(item, f"ddim + {control}", ALL, group, inversion="ddim", control=control)
    return folder


def test_a_row_per_control_and_group_shows_the_first_items(edits: Folder) -> None:
    folder = edits.write()
    assert "strips.png" in names(draw(folder))
    made = sheet(folder, "strips")
    rows = [("ddim + wide", "ab"), ("ddim + wide", "d"), ("ddim + narrow", "ab")]
    for r, (variant, items) in enumerate(rows):
        for i, item in enumerate(items):
            shown = [edits.picture(item, "", "source"), edits.picture(item, "ddim + none"), edits.picture(item, variant)]
            for c, picture in enumerate([*shown, edits.picture(item, "", "truth")]):
                right = SCENES * len(COLUMNS) - 1 - (i * len(COLUMNS) + c)
                found = cell(made, right, len(rows) - 1 - r, (1 - i, 0))
                assert (pixels(found) == magnified(picture)).all(), (variant, item, c)


@pytest.mark.parametrize("left_out", ["ddim + narrow", "ddim + none"])
def test_there_are_none_where_grids_show_it_all_or_nothing_can_be_compared(edits: Folder, left_out: str) -> None:
    edits.rows = [row for row in edits.rows if row["variant"] != left_out]
    assert "strips.png" not in names(draw(edits.write()))


def test_there_are_none_of_inversions(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for group in ("", "white"):
        folder.add(f"a{group}", "ddim", group=group, inversion="ddim")
    assert "strips.png" not in names(draw(folder.write()))
