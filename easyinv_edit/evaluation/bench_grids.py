"""Pictures as a table: a row per method, a column per picture, labels beside and above, every cell of one size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from easyinv_edit.errors import ImageError

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Cell = Image.Image | str
"""A picture, or what to say in the place of one."""

GAP, APART = 4, 12
"""White pixels around every cell, and as many more before a row or column that stands apart."""
SMALL, LARGE = 128, 192
"""Pixels of a cell's longer side: lower pictures are magnified by a whole number, higher ones made smaller."""
LETTERS, LABEL = 13, 180
"""Height of the text and widest label of a row in pixels."""
NAME_LINES, LINES = 2, 3
"""Most lines of a column's name, and of its detail and a title."""
NOTHING, FRAME, SOFT = "#e8e8e8", "#bdbdbd", "#505050"
"""Colours of a cell without a picture, of the lines around cells, and of details."""
JOINTS = "-_/,"
"""Signs after which a long word is broken."""


@dataclass(frozen=True)
class Row:
    """label: beside it; cells: from left to right; apart: whether it begins a new block."""

    label: str
    cells: Sequence[Cell]
    apart: bool = False


@dataclass(frozen=True)
class Head:
    """The top of a column. name, and detail below it: both wrapped; apart: whether the column begins a new block."""

    name: str
    detail: str = ""
    apart: bool = False


def shrunk(picture: Image.Image) -> Image.Image:
    """The picture with sides of at most LARGE pixels."""
    longest = max(picture.size)
    return picture if longest <= LARGE else _resized(picture, LARGE / longest)


def cell_size(pictures: Iterable[Image.Image]) -> tuple[int, int]:
    """(width, height) of the cells that show these pictures: the largest sides, magnified by a whole number to SMALL."""
    sides = [picture.size for picture in pictures]
    width, height = max(w for w, _ in sides), max(h for _, h in sides)
    times = -(-SMALL // max(width, height))
    return width * times, height * times


def page(rows: Sequence[Row], heads: Sequence[Head], title: str = "") -> Image.Image:
    """The table as an RGB picture on white.

    Cells end GAP pixels before the right and the lower edge; pictures higher than LARGE are made smaller, and one of another
    shape than its cell stands in the middle of it. Raises ImageError for rows of another length than the heads, and for a
    table without a picture.
    """
    cells = _checked(rows, heads)
    size, font = cell_size(cell for row in cells for cell in row if not isinstance(cell, str)), label_font(LETTERS)
    line = line_height(font)
    labels = [wrapped(row.label, font, LABEL, size[1] // line) for row in rows]
    lefts = _starts([head.apart for head in heads], 3 * GAP + max(_width(lines, font) for lines in labels), size[0])
    heading = wrapped(title, font, lefts[-1] - 2 * GAP, LINES)
    names = [wrapped(head.name, font, size[0], NAME_LINES) for head in heads]
    details = [wrapped(head.detail, font, size[0], LINES) for head in heads]
    under = GAP + len(heading) * line + (GAP if heading else 0)
    below = under + max(map(len, names)) * line
    tops = _starts([row.apart for row in rows], below + max(map(len, details)) * line + GAP, size[1])
    sheet = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    _write(sheet, (GAP, GAP), heading, font)
    for x, name, detail in zip(lefts, names, details, strict=False):
        _write(sheet, (x, under), name, font)
        _write(sheet, (x, below), detail, font, SOFT)
    for y, lines, row in zip(tops, labels, cells, strict=False):
        _write(sheet, (GAP, y + (size[1] - len(lines) * line) // 2), lines, font)
        for x, cell in zip(lefts, row, strict=False):
            _fill(sheet, (x, y), size, cell, font)
    return sheet


def _checked(rows: Sequence[Row], heads: Sequence[Head]) -> list[list[Cell]]:
    """The cells, no picture too large. Raises ImageError."""
    if lengths := sorted({len(row.cells) for row in rows} - {len(heads)}):
        raise ImageError(
            f"page: {len(heads)} heads over rows of {', '.join(map(str, lengths))} cells; give a cell for each head"
        )
    if all(isinstance(cell, str) for row in rows for cell in row.cells):
        raise ImageError("page: no pictures; give at least one")
    return [[cell if isinstance(cell, str) else shrunk(cell) for cell in row.cells] for row in rows]


def _starts(apart: Sequence[bool], first: int, side: int) -> list[int]:
    """Where each cell begins, and last where the table ends."""
    steps = [side + GAP + (APART if new else 0) for new in [*apart[1:], False]]
    return list(accumulate(steps, initial=first))


def _fill(sheet: Image.Image, corner: tuple[int, int], size: tuple[int, int], cell: Cell, font: Font) -> None:
    """One cell in a thin frame, which lies in the gap: the picture in its middle, or grey with what there is to say."""
    (x, y), (width, height) = corner, size
    frame = (x - 1, y - 1, x + width, y + height)
    if isinstance(cell, str):
        ImageDraw.Draw(sheet).rectangle(frame, NOTHING, FRAME)
        lines = wrapped(cell, font, width - 2 * GAP, LINES)
        middle = x + (width - _width(lines, font)) // 2, y + (height - len(lines) * line_height(font)) // 2
        _write(sheet, middle, lines, font, SOFT)
        return
    ImageDraw.Draw(sheet).rectangle(frame, "white", FRAME)
    shown = _resized(cell, min(width / cell.width, height / cell.height))
    sheet.paste(shown, (x + (width - shown.width) // 2, y + (height - shown.height) // 2))


def _resized(picture: Image.Image, scale: float) -> Image.Image:
    """The picture at a scale; a whole number keeps its pixels visible as squares."""
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    way = Image.Resampling.NEAREST if scale == int(scale) else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, way)


# --- text ---------------------------------------------------------------------------------------------------------------


def label_font(size: int) -> Font:
    """Letters of `size` pixels: those that matplotlib brings, where it is there, because PIL's own know no more than ASCII."""
    found = find_spec("matplotlib")
    file = None if found is None or found.origin is None else Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(file, size) if file is not None and file.exists() else ImageFont.load_default(size)


def line_height(font: Font) -> int:
    """Pixels from one line of text to the next."""
    return int(font.getbbox("Ág")[3]) + 2


def one_line(text: str) -> str:
    """The text on one line, without what cannot be drawn: line breaks and halves of characters."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """The text in at most `most` lines of at most `width` pixels, broken at spaces where there are some; an ellipsis stands for
    what is left over. No lines for an empty text."""
    lines: list[str] = []
    rest = one_line(text)[: most * width]  # no letter is narrower than a pixel
    while rest and len(lines) < most:
        lines.append(_first_line(rest, font, width))
        rest = rest[len(lines[-1]) :].lstrip()
    if rest and lines:
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "…"
    return lines


def _first_line(text: str, font: Font, width: int) -> str:
    """As much of the text as fits: up to a space, else up to a sign that joins words, else cut; never less than a letter."""
    end = len(text)
    while end > 1 and font.getlength(text[:end]) > width:
        end -= 1
    if end == len(text):
        return text
    space = text.rfind(" ", 1, end + 1)
    join = max(text.rfind(sign, 1, end) for sign in JOINTS)
    return text[: space if space > 0 else join + 1 if join > 0 else end]


def _width(lines: Sequence[str], font: Font) -> int:
    """Pixels of the widest line, 0 for none."""
    return max((int(font.getlength(line)) + 1 for line in lines), default=0)


def _write(sheet: Image.Image, corner: tuple[int, int], lines: Sequence[str], font: Font, fill: str = "black") -> None:
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * line_height(font)), line, fill=fill, font=font)
