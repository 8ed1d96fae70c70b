"""Routes: which stream supplies queries, keys and values to the targets, at which sites and steps.

Every self-attention editor is such a choice: MasaCtrl takes keys and values from the source, structure-keeping editors take
queries and keys. Source rows always attend as they would alone, unless a route says `on="all"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attention_control.errors import ControlError
from attention_control.masks import RouteMask
from attention_control.sites import resolve_step

Supplier = Literal["own", "source", "style"]


@dataclass(frozen=True)
class Route:
    """query, key, value: who supplies them to target rows: the row itself, the source, or the second source ("style");
    sites: a selector (see `sites.ALLOWED`);
    start, stop: the steps it is active in, start included and stop not, each a whole number of steps or a share of all;
    share: how much of the attention mass prefers the source's keys over the row's own, in [0, 1]. At 1 the own keys are not
    looked at; below, both are, with log(share) and log(1 - share) added to their logits: 0.5 weighs them alike;
    adain: give queries and own keys the mean and deviation of the source's, per channel over the tokens;
    mask: foreground of source and target; each target's foreground reads the source's foreground, its background the rest;
    away: the output is moved from that of this route's keys and values under the SOURCE's queries to that under the row's own,
    by this factor; 1 is the row's own;
    on: "targets", or "all" rows but the one that supplies keys; halves: of the guidance pair that are routed."""

    query: Supplier
    key: Supplier
    value: Supplier
    sites: str
    start: float | int = 0
    stop: float | int = 1.0
    share: float = 1.0
    adain: bool = False
    mask: RouteMask | None = None
    away: float = 1.0
    on: Literal["targets", "all"] = "targets"
    halves: Literal["both", "conditional"] = "both"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ControlError(f"share is {self.share}; it is a weight between 0 (own keys only) and 1 (source keys only)")
        if self.share < 1 and (self.query, self.key, self.value) != ("own", "source", "source"):
            raise ControlError(
                "a share below 1 needs query='own' and key=value='source': only keys with their values can be joined"
            )

    @property
    def reads(self) -> frozenset[Supplier]:
        """Which suppliers it reads besides the row itself."""
        suppliers: set[Supplier] = {self.query, self.key, self.value}
        if self.away != 1:
            suppliers.add("source")
        return frozenset(suppliers - {"own"})

    def active(self, step: int, num_steps: int) -> bool:
        """Whether the route acts at `step` (0 .. num_steps - 1)."""
        return resolve_step(self.start, num_steps) <= step < resolve_step(self.stop, num_steps)
