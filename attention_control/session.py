"""Attach a controller to a UNet for the length of a block, and take everything off again.

    with controlled(unet, MasaCtrl(), num_steps=50, latent_size=(64, 64)) as session:
        for step, t in enumerate(timesteps):
            with session.step(step, streams):
                unet(...)

The loop says which step it is and what its batch holds; nothing here counts attention calls. All run state lives in the
session, so a controller can be used again and gives the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch import nn

from attention_control.errors import ControlError
from attention_control.processor import RoutedProcessor, RowPlan
from attention_control.routes import Route, Supplier
from attention_control.sites import ALLOWED, AttentionSite, list_sites, select_sites
from attention_control.streams import Streams


class Controller(Protocol):
    """A frozen dataclass of settings that says which routes it wants."""

    def routes(self) -> tuple[Route, ...]:
        """The routes, at most one per site and step."""


@dataclass
class Session:
    """The state of one controlled run: where each route acts and what the current UNet call holds."""

    routes: dict[str, list[Route]]
    num_steps: int
    _plans: dict[str, RowPlan] = field(default_factory=dict)
    _batch: int | None = None
    _fired: set[str] = field(default_factory=set)

    def reads_source(self, step: int) -> bool:
        """Whether any site needs the source's rows at `step`; where not, a pinned source need not be evaluated."""
        return any(route.active(step, self.num_steps) for routes in self.routes.values() for route in routes)

    @contextmanager
    def step(self, step: int, streams: Streams) -> Iterator[None]:
        """One UNet call with rows `streams` at `step` (0 .. num_steps - 1).

        Raises ControlError where the run has no such step, and at the end where a site that should have been routed was never
        reached, which means something replaced the attention processors meanwhile.
        """
        if not 0 <= step < self.num_steps:
            raise ControlError(
                f"step {step} is none of the run's 0 to {self.num_steps - 1}; attach with the run's own num_steps"
            )
        active = {path: r for path, routes in self.routes.items() for r in routes if r.active(step, self.num_steps)}
        self._plans = {path: _row_plan(route, streams) for path, route in active.items()} if streams.targets else {}
        self._batch, self._fired = len(streams), set()
        try:
            yield
            if missed := set(self._plans) - self._fired:
                raise ControlError(
                    f"attention control was bypassed at {sorted(missed)[0]} and {len(missed) - 1} more sites: something "
                    "replaced the processors (attention slicing, for one); leave them alone while an edit runs"
                )
        finally:
            self._plans, self._batch = {}, None

    def plan_for(self, path: str, batch_rows: int) -> RowPlan | None:
        """What the processor at `path` routes in the call at hand; None outside of `step` and where no route is active."""
        plan = self._plans.get(path)
        if plan is not None and batch_rows != self._batch:
            raise ControlError(f"the UNet was called with {batch_rows} rows, but the step declared {self._batch}")
        self._fired.add(path)
        return plan


def _row_plan(route: Route, streams: Streams) -> RowPlan:
    def rows(supplier: Supplier) -> list[int]:
        return [i if supplier == "own" else streams.source_of(i) for i in range(len(streams))]

    return RowPlan(rows(route.query), rows(route.key), rows(route.value), route.share)


@contextmanager
def controlled(unet: nn.Module, controller: Controller, *, num_steps: int, latent_size: tuple[int, int]) -> Iterator[Session]:
    """Route the attention of `unet` inside the block; its own processors are back afterwards, whatever happens inside.

    unet: a diffusers UNet; num_steps: T of the run; latent_size: (height, width) of its latents. Raises ControlError where a
    route finds no site, two routes meet at one site and step, the UNet is already controlled, or its projections are fused.
    Sites without a route keep the user's own processor objects (IP-Adapter, LoRA, attention backends) untouched.
    """
    sites = list_sites(unet)
    chosen = _assign(controller.routes(), sites, latent_size, num_steps)
    routed = [site for site in sites if site.path in chosen]
    _refuse_unusable(routed, sites)
    session = Session({site.path: chosen[site.path] for site in routed}, num_steps)
    originals: dict[str, Any] = {site.path: site.module.processor for site in routed}
    try:
        for site in routed:
            site.module.set_processor(RoutedProcessor(site.path, originals[site.path], session))
        yield session
    finally:
        for site in routed:
            site.module.set_processor(originals[site.path])


def _assign(
    routes: Sequence[Route], sites: Sequence[AttentionSite], latent_size: tuple[int, int], num_steps: int
) -> dict[str, list[Route]]:
    chosen: dict[str, list[Route]] = {}
    for route in routes:
        found = select_sites(sites, route.sites, latent_size)
        if not found:
            raise ControlError(
                f"sites {route.sites!r} match none of the UNet's {len(sites)} self-attention sites; write {ALLOWED}"
            )
        if not any(route.active(step, num_steps) for step in range(num_steps)):
            raise ControlError(f"steps {route.start} to {route.stop} hold none of the run's {num_steps} steps; start earlier")
        for site in found:
            _refuse_overlap(route, chosen.setdefault(site.path, []), site, num_steps)
            chosen[site.path].append(route)
    return chosen


def _refuse_overlap(route: Route, others: Sequence[Route], site: AttentionSite, num_steps: int) -> None:
    for step in range(num_steps):
        if route.active(step, num_steps) and any(other.active(step, num_steps) for other in others):
            raise ControlError(f"two routes meet at {site.path} at step {step}; give them different sites or steps")


def _refuse_unusable(routed: Sequence[AttentionSite], sites: Sequence[AttentionSite]) -> None:
    if any(isinstance(site.module.processor, RoutedProcessor) for site in sites):
        raise ControlError("this UNet is already under attention control; finish that edit first, or use a second UNet")
    if any(isinstance(site.module.processor, FusedAttnProcessor2_0) for site in routed):
        raise ControlError("the UNet's attention projections are fused; call unfuse_qkv_projections() before editing")
