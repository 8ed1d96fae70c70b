"""From routes and rows to what one processor does in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_control.cross_maps import CrossMaps
from attention_control.processor import RowPlan
from attention_control.routes import Route, Supplier
from attention_control.run import CrossEdit
from attention_control.streams import StreamRow, Streams

INDEX = {"source": 0, "style": 1}


def row_plan(
    route: Route, streams: Streams, reference: tuple[Streams, Tensor] | None, size: tuple[int, int], maps: CrossMaps
) -> RowPlan:
    """The plan of a route for a batch, with the source's rows in it or given as a reference."""
    before = Streams(()) if reference is None else reference[0]
    seen = Streams((*before.rows, *streams.rows))
    offset = len(before)
    simple = reference is None and route.mask is None and not route.adain and route.away == 1
    every = range(len(streams))
    routed = [i for i in every if simple or _is_routed(streams.rows[i], route)]

    def rows(supplier: Supplier) -> list[int]:
        return [_supplied(seen, offset + i, supplier, route) for i in routed]

    key_mask, query_mask = _masks(route, streams, routed, size, maps)
    return RowPlan(
        routed=routed,
        query=rows(route.query),
        key=rows(route.key),
        value=rows(route.value),
        source=rows("source") if route.adain or route.away != 1 else (),
        share=route.share,
        adain=route.adain,
        away=route.away,
        reference=None if reference is None else reference[1],
        key_mask=key_mask,
        query_mask=query_mask,
    )


def _is_routed(row: StreamRow, route: Route) -> bool:
    if route.halves == "conditional" and row.half != "conditional":
        return False
    return row.role == "target" or (route.on == "all" and row.index == 0)


def _supplied(seen: Streams, position: int, supplier: Supplier, route: Route) -> int:
    if supplier == "own" or not _is_routed(seen.rows[position], route):
        return position
    return seen.source_of(position, INDEX[supplier])


def _masks(
    route: Route, streams: Streams, routed: Sequence[int], size: tuple[int, int], maps: CrossMaps
) -> tuple[Tensor | None, Tensor | None]:
    """(foreground of the source's keys, foreground of each row), (routed rows, tokens) each."""
    if route.mask is None:
        return None, None
    keys = route.mask.source(size, maps)
    queries = [route.mask.target(streams.rows[i].index, size, maps) for i in routed]
    key_mask = None if keys is None else keys.flatten().expand(len(routed), -1)
    known = [q for q in queries if q is not None]
    if not known:
        return key_mask, None
    return key_mask, torch.stack([(torch.ones(size, device=known[0].device) if q is None else q).flatten() for q in queries])


@dataclass(frozen=True, eq=False)
class CrossCall:
    """What is watched and changed at one cross-attention site in one call: the conditional rows of source and targets.

    step: which of the run's, 0-dim; maps: where what is seen is kept, or None; size: the site's grid.
    """

    step: Tensor
    streams: Streams
    edits: Sequence[CrossEdit]
    maps: CrossMaps | None
    size: tuple[int, int]

    @property
    def watched(self) -> list[int]:
        """Conditional rows."""
        rows = enumerate(self.streams.rows)
        return [i for i, row in rows if row.half == "conditional" and (row.role == "target" or row.index == 0)]

    @property
    def changed(self) -> list[int]:
        """Conditional target rows, where there is an edit."""
        return [i for i in self.watched if self.edits and self.streams.rows[i].role == "target"]

    def bias(self, row: int) -> Tensor | None:
        """The sum of what the edits add to a target's logits."""
        if row not in self.changed:
            return None
        given = [edit.bias(self.step, self.streams.rows[row].index, self.size) for edit in self.edits]
        return sum((b for b in given if b is not None), start=torch.zeros(())) if any(b is not None for b in given) else None

    def settle(self, maps: dict[int, Tensor]) -> dict[int, Tensor]:
        """Apply the edits in order, keep what came out of them, and return the changed rows."""
        made = dict(maps)
        source = next((maps[i] for i in self.watched if self.streams.rows[i].role == "source"), None)
        for row in self.changed:
            for edit in self.edits:
                own = made[row]
                theirs = own if source is None else source
                made[row] = edit.edit(self.step, self.streams.rows[row].index, theirs, own)
        if self.maps is not None:
            for row, seen in made.items():
                self.maps.add(self.streams.rows[row].role, self.streams.rows[row].index, seen)
        return {row: made[row] for row in self.changed}
