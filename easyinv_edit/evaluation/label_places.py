"""Where labels stand so that none covers another: each takes the nearest free place about its point."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""(left, bottom, right, top)."""

NEAREST, FARTHEST, STEP = 10, 480, 6
"""Distances from a point to the middle of its label's nearer edge that are tried, in pixels."""
TURNS = (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8)
"""Directions in sixteenths of a turn: to the right of the point first."""
DETOUR = 40
"""How many pixels farther a label goes so as not to stand on a line."""


def place(
    anchors: Sequence[Point],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    solid: Sequence[Box],
    lines: Sequence[Box] = (),
) -> list[Box | None]:
    """Boxes of the given (width, height) near their anchors and within the area, overlapping neither each other nor what is
    solid, and lines only where a place without them is more than DETOUR farther. Earlier labels choose first; None for one that
    finds no place."""
    taken, found = list(solid), list[Box | None]()
    for anchor, size in zip(anchors, sizes, strict=True):
        box = _nearest(anchor, size, area, taken, lines)
        found.append(box)
        taken += [] if box is None else [box]
    return found


def _nearest(anchor: Point, size: tuple[float, float], area: Box, taken: Sequence[Box], lines: Sequence[Box]) -> Box | None:
    """The best free place of one label."""
    best, least = None, math.inf
    for distance, box in _around(anchor, size, area):
        if distance >= least:
            break
        if not any(overlap(box, other) for other in taken):
            cost = distance + DETOUR * any(overlap(box, other) for other in lines)
            best, least = (box, cost) if cost < least else (best, least)
    return best


def _around(anchor: Point, size: tuple[float, float], area: Box) -> Iterator[tuple[float, Box]]:
    """(distance, place) about a point, nearest first."""
    width, height = size
    for distance in range(NEAREST, FARTHEST, STEP):
        for turn in TURNS:
            dx, dy = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            x = anchor[0] + dx * (distance + width / 2) - width / 2
            y = anchor[1] + dy * (distance + height / 2) - height / 2
            if area[0] <= x and area[1] <= y and x + width <= area[2] and y + height <= area[3]:
                yield distance, (x, y, x + width, y + height)


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes share a point inside of one of them."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
