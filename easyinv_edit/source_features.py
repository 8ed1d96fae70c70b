"""Source features: what the pinned source puts into the routed attention sites, evaluated once for any number of targets.

With the source pinned its latents are known at every level, so its features do not depend on the target. "exact" evaluates the
source alone, several levels in one batch; "inversion" keeps what the inversion's own evaluations saw, for free: there the
latent is that of the level below (or an iterate), so it is an approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attention_control import ControlError, Controller, ReferenceCache, Run, StreamRow, recording
from attention_control.attach import reading
from easyinv_edit.conditioning import Conditioning, concatenate
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import InputError
from easyinv_edit.sampling import Sampler
from easyinv_edit.trajectory import Trajectory

LEVELS_AT_ONCE = 8


def readable(backbone: Any, control: Controller, run: Run) -> dict[int, list[str]] | None:
    """Which sites read the source at which steps, or None where the controller needs the source's rows themselves."""
    return reading(backbone.network, control.program(run), run)


@torch.no_grad()
def evaluate_source(
    source: Denoiser,
    sampler: Sampler,
    trajectory: Trajectory,
    steps: dict[int, list[str]],
    cache: ReferenceCache,
    *,
    both_halves: bool,
) -> ReferenceCache:
    """Features of the exact source pass.

    source: the source row alone, with its negative conditioning; steps: from `readable`; both_halves: whether the unconditional
    half is read too; cache: an empty one, which is filled and returned. Cost: one evaluation per step, or two.
    """
    halves: list[Any] = ["unconditional", "conditional"] if both_halves else ["conditional"]
    cache.rows, cache.source = tuple(StreamRow("source", 0, half) for half in halves), fingerprint(trajectory)
    wanted, total = sorted(step for step, paths in steps.items() if paths), len(source.schedule)
    sites = sorted({path for paths in steps.values() for path in paths})
    with recording(source.backbone.network, sites, cache) as recorder, ExitStack() as stack:
        stack.callback(cache.clear)
        at_once = LEVELS_AT_ONCE
        while wanted:
            part = wanted[:at_once]
            levels = [total - step for step in part]
            z = torch.cat([trajectory.latents[level][:1] for level in levels for _ in halves]).to(source.backbone.device)
            labels = torch.tensor([source.schedule.timesteps[level] for level in levels for _ in halves], device=z.device)
            rows = [_half(sampler.condition(source, level), half) for level in levels for half in halves]
            recorder.at(part)
            try:
                source.backbone.predict(z, labels, concatenate(rows))
                wanted = wanted[len(part) :]
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                at_once = max(1, at_once // 2)
        stack.pop_all()  # complete, so it is kept
    return cache


def fingerprint(trajectory: Trajectory) -> tuple[float, ...]:
    """A few values of a trajectory's noisiest latent: what tells one inversion's features from another's."""
    return tuple(trajectory.noise.flatten()[:8].tolist())


def _half(denoiser: Denoiser, half: str) -> Conditioning:
    assert denoiser.negative is not None
    return (denoiser.conditioning if half == "conditional" else denoiser.negative).select([0])


@contextmanager
def kept_while_inverting(
    denoiser: Denoiser, control: Any, run: Run, method: str, passes: int
) -> Iterator[tuple[Denoiser, ReferenceCache]]:
    """The denoiser to invert with, and the cache that its evaluations fill: the last one at each level counts.

    Raises InputError for controllers that need the source's own rows, and for methods whose last evaluation of a level is not
    one of the source.
    """
    name, why = getattr(control, "name", type(control).__name__), ""
    try:
        steps = readable(denoiser.backbone, control, run)
    except ControlError as error:  # what it points at is not there yet, or it cannot be attached at all
        steps, why = None, f" ({error})"
    if steps is None:
        raise InputError(f"{name}: needs the source's own rows, so its features cannot be kept{why}; leave keep_features out")
    if passes != 1 or len(denoiser.guidance) != 1:
        raise InputError(f"{method}: features cannot be kept while it inverts; use source_features='exact' when editing")
    rows = tuple(StreamRow("source", 0, row.half) for row in denoiser.batch)
    cache = ReferenceCache(rows, frame=(run.num_steps, run.latent_size))
    sites = sorted({path for paths in steps.values() for path in paths})
    total = len(denoiser.schedule)
    step_of = {label: total - level for level, label in enumerate(denoiser.schedule.timesteps) if level}
    with recording(denoiser.backbone.network, sites, cache) as recorder:
        told = _Told(denoiser.backbone, lambda label: recorder.at([step_of[label]] if steps.get(step_of[label]) else []))
        yield replace(denoiser, backbone=told), cache


class _Told:
    """A backbone that says which label it is about to evaluate; otherwise the one it wraps."""

    def __init__(self, backbone: Any, tell: Callable[[int], None]) -> None:
        self._backbone, self._tell = backbone, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def predict(self, z: Tensor, timestep: int | Tensor, conditioning: Conditioning) -> Tensor:
        """Tell, then predict."""
        self._tell(int(timestep))
        prediction: Tensor = self._backbone.predict(z, timestep, conditioning)
        return prediction
