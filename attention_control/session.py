"""Attach a controller to a UNet for the length of a block, and take everything off again.

    with controlled(unet, MasaCtrl(), num_steps=50, latent_size=(64, 64)) as session:
        for step, t in enumerate(timesteps):
            with session.step(step, streams):
                unet(...)
            targets = session.after(step, source, targets)

The loop says which step it is and what its batch holds; nothing here counts attention calls. All run state lives in the
session, so a controller can be used again and gives the same result. A compiled UNet gets a graph for every set of things that
act together (three at most for one controller, where the rows stay the same), and not one for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from attention_control.attach import attached, watched
from attention_control.call import Call
from attention_control.cross_maps import CrossMaps
from attention_control.errors import ControlError
from attention_control.plans import CrossCall, row_plan
from attention_control.processor import RowPlan
from attention_control.reference_cache import ReferenceCache
from attention_control.routes import Route
from attention_control.run import Program, Run
from attention_control.sites import AttentionSite
from attention_control.streams import Streams
from attention_control.words import Words


class Controller(Protocol):
    """A frozen dataclass of settings that says what it wants done."""

    def program(self, run: Run) -> Program:
        """What to do in a run; at most one route per site and step."""


@dataclass
class Session:
    """The state of one controlled run: where each route acts and what the current UNet call holds."""

    program: Program
    run: Run
    routes: dict[str, list[Route]]
    sites: dict[str, AttentionSite]
    maps: CrossMaps
    map_paths: frozenset[str]
    reference: ReferenceCache | None = None
    device: torch.device | None = None
    _call: Call | None = None

    @property
    def num_steps(self) -> int:
        """T of the run."""
        return self.run.num_steps

    def reads_source(self, step: int) -> bool:
        """Whether the source's rows are needed at `step`; where not, a pinned source need not be evaluated."""
        live = any(f.active(step, self.num_steps) for f in self.program.features)
        live = live or any(edit.active(step) and edit.reads_source for edit in self.program.cross) or self.program.wants_maps
        return live or (self._routed(step) and not self._cached(step))

    def reads_both_halves(self, step: int) -> bool:
        """Whether targets read the source in their own half of guidance at `step`, so that a guided source needs both."""
        copied = any(f.active(step, self.num_steps) for f in self.program.features)
        reading = [r for r in self._routes_at(step) if r.reads and r.halves == "both"]
        return copied or (bool(reading) and not self._cached(step))

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
        if self.reference is not None and self.device is not None:
            self.reference.fetch(step, self.device)
            self.reference.fetch(step + 1, self.device)
        self._require_sources(step, streams)
        self._call = call = self._decided(step, streams)
        try:
            yield
            call.require_reached()
        finally:
            self._call = None
            self.maps.fold()

    def after(self, step: int, source: Tensor, targets: Tensor) -> Tensor:
        """Latents of the targets (n, C, H, W) to go on with after `step`; source (1, C, H, W) is of the same level."""
        for blend in self.program.blends:
            targets = blend(step, source, targets, self.maps)
        return targets

    def plan_for(self, path: str, batch_rows: int) -> RowPlan | None:
        """What the processor at `path` routes in the call at hand; None outside of `step` and where no route is active."""
        call = self._call
        route = None if call is None else call.routes.get(path)
        if call is None or route is None:
            return None
        call.require_rows(batch_rows)
        call.reached.add(path)
        return row_plan(route, call.streams, call.reference.get(path), self._size(path), self.maps)

    def cross_plan(self, path: str, batch_rows: int) -> CrossCall | None:
        """What the processor at `path` watches and changes; None outside of `step`."""
        call, recording = self._call, path in self.map_paths
        if call is None or not call.streams.targets or not (call.edits or recording):
            return None
        call.require_rows(batch_rows)
        return CrossCall(call.step, call.streams, call.edits, self.maps if recording else None, self._size(path))

    def copies(self, path: str) -> Streams | None:
        """The rows of the call at hand, where the output of the module at `path` is copied from the source to the targets."""
        call = self._call
        if call is None or path not in call.copied:
            return None
        call.reached.add(path)
        return call.streams

    def record(self, path: str, hidden_states: Tensor) -> None:
        """A controlled run keeps nothing."""

    def _decided(self, step: int, streams: Streams) -> Call:
        """What a call with these rows does at a step; nothing where it has no targets."""
        when = torch.tensor(step)
        if not streams.targets:
            return Call(streams, when)
        routes = {path: r for path, routes in self.routes.items() for r in routes if r.active(step, self.num_steps)}
        edits = [edit for edit in self.program.cross if edit.active(step)]
        copied = frozenset(f.path for f in self.program.features if f.active(step, self.num_steps))
        return Call(streams, when, routes, edits, copied, self._kept(step, streams))

    def _kept(self, step: int, streams: Streams) -> dict[str, tuple[Streams, Tensor]]:
        """Cached source rows by site, for a call that has none of its own."""
        if self.reference is None or not self._cached(step) or any(row.role == "source" for row in streams.rows):
            return {}
        return {path: self.reference.get(step, path) for path in self._paths_at(step)}

    def _paths_at(self, step: int) -> list[str]:
        return [p for p, routes in self.routes.items() if any(r.active(step, self.num_steps) for r in routes)]

    def _routes_at(self, step: int) -> list[Route]:
        return [r for routes in self.routes.values() for r in routes if r.active(step, self.num_steps)]

    def _routed(self, step: int) -> bool:
        return any(route.reads for route in self._routes_at(step))

    def _cached(self, step: int) -> bool:
        return self.reference is not None and self.reference.holds(step, self._paths_at(step))

    def _require_sources(self, step: int, streams: Streams) -> None:
        reading = self._routed(step) and not self._cached(step)
        reading = reading or any(edit.reads_source and edit.active(step) for edit in self.program.cross)
        if reading and streams.targets:
            streams.source_of(streams.targets[0])

    def _size(self, path: str) -> tuple[int, int]:
        return self.sites[path].grid(self.run.latent_size)


@contextmanager
def controlled(
    unet: nn.Module,
    controller: Controller,
    *,
    num_steps: int,
    latent_size: tuple[int, int],
    first_step: int = 0,
    words: Sequence[Words] = (),
    part: Sequence[int] | None = None,
    read_mask: Callable[[Any], Tensor] | None = None,
    reference: ReferenceCache | None = None,
) -> Iterator[Session]:
    """Control the attention of `unet` inside the block; its own processors are back afterwards, whatever happens inside.

    unet: a diffusers UNet; num_steps: T of the run; latent_size: (height, width) of its latents; first_step: where sampling
    starts; words: of the source's prompt and of each target's, for controllers that point at words; part: which of the targets
    the batch holds, by default all; read_mask: turns what a
    controller holds as a mask into a tensor; reference: source rows computed before, for calls without source rows. Raises
    ControlError where a route finds no site, two routes meet at one site and step, the UNet is already controlled, or its
    projections are fused. Sites without a route keep the user's own processor objects (IP-Adapter, LoRA, attention backends)
    untouched.
    """
    run = Run(num_steps, latent_size, first_step, tuple(words), read_mask, part=part)
    program = controller.program(run)
    with attached(unet, program, run, Session, reference) as session:
        yield session


@dataclass
class Recorder:
    """Keeps what the sources put into sites. Say with `at` which step each row of the next UNet call belongs to."""

    cache: ReferenceCache
    _steps: Sequence[int] = ()

    def at(self, steps: Sequence[int]) -> None:
        """The steps of the next call's rows, in groups of the cache's own rows; a step seen again is kept anew."""
        self._steps = steps

    def plan_for(self, path: str, batch_rows: int) -> RowPlan | None:
        """Nothing is routed."""
        return None

    def record(self, path: str, hidden_states: Tensor) -> None:
        """Keep each step's rows."""
        per_step = len(self.cache.rows)
        for number, step in enumerate(self._steps):
            self.cache.put(step, path, hidden_states[number * per_step : (number + 1) * per_step])


@contextmanager
def recording(unet: nn.Module, paths: Sequence[str], cache: ReferenceCache) -> Iterator[Recorder]:
    """Fill a cache with what goes into the self-attention sites at `paths` during the UNet calls inside the block."""
    recorder = Recorder(cache)
    with watched(unet, paths, recorder):
        yield recorder
