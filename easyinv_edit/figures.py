"""Pictures side by side under their labels: what the comparison of an edit looks like."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from easyinv_edit.errors import ImageError

SMALL = 256  # `strip` magnifies pictures lower than this by whole pixels
GAP = 4  # white pixels around the pictures of a `strip`


def strip(pictures: Sequence[Image.Image], labels: Sequence[str] | None = None, height: int | None = None) -> Image.Image:
    """One row of pictures of the same height with white gaps, each under its label.

    labels: one per picture, cut to its width; height: of every picture, by default the tallest one's, magnified by a whole
    number to at least SMALL. Raises ImageError for no pictures or another number of labels.
    """
    if not pictures or (labels is not None and len(labels) != len(pictures)):
        given = f"{len(pictures)} pictures and {'no' if labels is None else len(labels)} labels"
        raise ImageError(f"strip: {given}; give at least one picture, and one label for each or none")
    tallest = max(picture.height for picture in pictures)
    height = height or tallest * max(1, -(-SMALL // tallest))
    columns = [_scaled(picture.convert("RGB"), height) for picture in pictures]
    font = ImageFont.load_default(size=max(12, height // 20))
    top = GAP if labels is None else 2 * GAP + math.ceil(font.getbbox("Ág")[3])
    row = Image.new("RGB", (sum(column.width + GAP for column in columns) + GAP, top + height + GAP), "white")
    left, draw = GAP, ImageDraw.Draw(row)
    for column, label in zip(columns, labels or [""] * len(columns), strict=True):
        row.paste(column, (left, top))
        draw.text((left, GAP), _shortened(label, column.width, font), fill="black", font=font)
        left += column.width + GAP
    return row


def stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other on white, left-aligned. Raises ImageError for none."""
    if not rows:
        raise ImageError("stack: no pictures; give at least one")
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        page.paste(row.convert("RGB"), (0, top))
        top += row.height
    return page


def _scaled(picture: Image.Image, height: int) -> Image.Image:
    """The picture at that height; a small one magnified by a whole number keeps its pixels visible as squares."""
    size = max(1, round(picture.width * height / picture.height)), height
    squares = picture.height < SMALL and height % picture.height == 0
    return picture.resize(size, Image.Resampling.NEAREST if squares else Image.Resampling.LANCZOS)


def _shortened(label: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The label on one line, its end replaced by an ellipsis where it is wider than `width` pixels."""
    text = " ".join(label.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
