"""Which row of a UNet batch is which: named rows instead of `chunk` arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from attention_control.errors import ControlError

Role = Literal["source", "target"]
Half = Literal["unconditional", "conditional"]


@dataclass(frozen=True)
class StreamRow:
    """One row: source or target, which of them (a second source, 1, is the style's), and which half of its guidance pair."""

    role: Role
    index: int
    half: Half


@dataclass(frozen=True)
class Streams:
    """The rows of one UNet call, in batch order. Any number of targets, guided or not; at most two sources."""

    rows: tuple[StreamRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def targets(self) -> list[int]:
        """Batch positions of all target rows."""
        return [i for i, row in enumerate(self.rows) if row.role == "target"]

    def source_of(self, position: int, index: int = 0) -> int:
        """The batch position of the row of source `index` that a row reads.

        A source row reads itself. A target row reads the source row of its own guidance half where there is one, else the
        only source row: that is exact where the source's prompt makes both halves equal. Raises ControlError where the
        batch holds no such source.
        """
        row = self.rows[position]
        if row.role == "source" and row.index == index:
            return position
        found = {s.half: i for i, s in enumerate(self.rows) if (s.role, s.index) == ("source", index)}
        if not found:
            what = "source row" if index == 0 else "style row (a second source)"
            raise ControlError(f"the batch has no {what} to read from; keep the source branch in the sampled rows")
        return found.get(row.half, next(iter(found.values())))


def layout(rows: Sequence[tuple[Role, int, Half]]) -> Streams:
    """Streams from plain tuples, in batch order."""
    return Streams(tuple(StreamRow(*row) for row in rows))
