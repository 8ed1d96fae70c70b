"""What a report's page shows: tables, items and their pictures, as plain values for the template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CEILING = "autoencoder alone"
"""The line of what the model's autoencoder alone makes of a picture."""
Row = Mapping[str, Any]


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
    """head: what its lines are."""

    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    head: str = "variant"


@dataclass(frozen=True)
class Board:
    """A leaderboard. texts: what its numbers are; tables: the ranking, and the grid of controls by inversions."""

    texts: tuple[str, ...]
    tables: tuple[Table, ...]


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
    edit's source has other proportions than its result; board: None where there is none."""

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
    board: Board | None = None

    @property
    def pictures(self) -> list[Picture]:
        """Those of items, and figures."""
        return [*self.figures, *(picture for item in self.items for picture in item.pictures)]
