"""Tables of pictures: where their cells lie, what is in them, and how text is broken into lines."""

from __future__ import annotations

import pytest
from PIL import Image

from easyinv_edit.errors import ImageError
from easyinv_edit.evaluation.bench_grids import (
    APART,
    FRAME,
    GAP,
    LARGE,
    NOTHING,
    Head,
    Row,
    cell_size,
    label_font,
    page,
    shrunk,
    wrapped,
)
from tests.evaluation.bench_folder import CELL, HIGH, WIDE, cell, magnified, noise, pixels


def test_cells_are_of_one_size_and_hold_the_pictures_magnified() -> None:
    rows = [[noise(10 * r + c) for c in range(3)] for r in range(2)]
    made = page([Row(f"row {r}", cells) for r, cells in enumerate(rows)], [Head(f"column {c}") for c in range(3)], "title")
    for r, cells in enumerate(rows):
        for c, picture in enumerate(cells):
            assert (pixels(cell(made, 2 - c, 1 - r)) == magnified(picture)).all()


def test_a_row_a_column_and_a_new_block_take_the_room_they_should() -> None:
    def size(rows: int, columns: int, apart_row: bool = False, apart_column: bool = False) -> tuple[int, int]:
        cells = [[noise(0)] * columns] * rows
        heads = [Head("x", "y", apart_column and c == columns - 1) for c in range(columns)]
        return page([Row("label", own, apart_row and r == rows - 1) for r, own in enumerate(cells)], heads).size

    width, height = size(2, 3)
    assert size(2, 4) == (width + CELL[0] + GAP, height)
    assert size(3, 3) == (width, height + CELL[1] + GAP)
    assert size(2, 3, apart_row=True) == (width, height + APART)
    assert size(2, 3, apart_column=True) == (width + APART, height)


def test_around_every_cell_there_is_a_frame_and_white() -> None:
    white = Image.new("RGB", (WIDE, HIGH), "white")
    made = pixels(page([Row("", [white, white])], [Head(""), Head("")]))
    edge = made[-GAP - CELL[1] // 2]  # a line of pixels through the middles of the cells
    grey = tuple(int(FRAME[i : i + 2], 16) for i in (1, 3, 5))
    dark = {x for x, colour in enumerate(edge) if tuple(colour) != (255, 255, 255)}
    right = made.shape[1] - GAP
    left = right - CELL[0]
    assert dark == {right, left - 1, left - GAP, left - GAP - CELL[0] - 1}
    assert {tuple(edge[x]) for x in dark} == {grey}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), (128, 128)),
        ((50, 20), (150, 60)),
        ((150, 100), (150, 100)),
        ((512, 256), (LARGE, LARGE // 2)),
        ((100, 400), (LARGE // 4, LARGE)),
        ((1, 1), (128, 128)),
    ],
)
def test_small_pictures_are_magnified_by_whole_numbers_and_large_ones_made_smaller(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert cell_size([shrunk(noise(0, size))]) == expected
    one, two = (page([Row("", [noise(0, size)])] * rows, [Head("")]) for rows in (1, 2))
    assert two.height - one.height == expected[1] + GAP


def test_a_picture_of_another_shape_stands_in_the_middle_of_its_cell() -> None:
    tall, wide = noise(1, (16, 32)), noise(2, (32, 32))
    made = page([Row("", [tall, wide])], [Head(""), Head("")])
    found = pixels(cell(made, 1, 0, size=(128, 128)))
    assert (found[:, 32:96] == magnified(tall)).all()
    assert (found[:, :32] == 255).all()
    assert (found[:, 96:] == 255).all()


def test_labels_stand_beside_the_middles_of_their_rows() -> None:
    made = pixels(page([Row("", [noise(0)]), Row("label", [noise(1)])], [Head("")]))
    beside = made[:, : -CELL[0] - 2 * GAP]
    inked = [y for y, colours in enumerate(beside) if (colours != 255).any()]
    middle = made.shape[0] - GAP - CELL[1] / 2
    assert middle - 10 < inked[0] < middle < inked[-1] < middle + 10


def test_words_stand_in_the_place_of_a_picture_on_grey() -> None:
    made = page([Row("", [noise(0), "error"])], [Head(""), Head("")])
    found = pixels(cell(made, 0, 0))
    grey = tuple(int(NOTHING[i : i + 2], 16) for i in (1, 3, 5))
    assert tuple(found[0, 0]) == grey
    assert (found != grey).any()
    empty = pixels(cell(page([Row("", [noise(0), ""])], [Head(""), Head("")]), 0, 0))
    assert (empty == grey).all()


def test_a_table_without_pictures_or_with_uneven_rows_is_refused() -> None:
    with pytest.raises(ImageError, match="no pictures"):
        page([Row("a", ["error"])], [Head("x")])
    with pytest.raises(ImageError, match="2 heads over rows of 1 cells"):
        page([Row("a", [noise(0)])], [Head("x"), Head("y")])


@pytest.mark.parametrize(
    "text", ["one two three four five six seven", "prompt_to_prompt+plug_and_play, blend", "x" * 400, "a\n b\t c"]
)
@pytest.mark.parametrize("width", [40, 90, 400])
def test_wrapped_lines_fit_and_leave_out_only_what_an_ellipsis_stands_for(text: str, width: int) -> None:
    font = label_font(13)
    lines = wrapped(text, font, width, 3)
    assert 1 <= len(lines) <= 3
    assert all(font.getlength(part) <= width for part in lines)
    joined, whole = "".join(lines).replace(" ", ""), "".join(text.split())
    assert joined == whole or (joined.endswith("…") and whole.startswith(joined[:-1]))
    assert joined.endswith("…") == (joined != whole)


def test_words_stay_whole_and_joined_ones_break_after_their_joint() -> None:
    font = label_font(13)
    width = int(font.getlength("easyinv + masa"))
    assert wrapped("easyinv + masactrl", font, width, 3) == ["easyinv +", "masactrl"]
    assert wrapped("scene-24000-shape", font, int(font.getlength("scene-24000-sh")), 3) == ["scene-24000-", "shape"]
    assert wrapped("a one two", font, int(font.getlength("a one")) + 1, 3) == ["a one", "two"]
    assert wrapped("", font, 100, 3) == []
    assert wrapped("half \ud800 here", font, 400, 1) == ["half ? here"]
