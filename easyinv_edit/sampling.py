"""The one sampling loop. Every backbone, inversion method and controller goes through it.

It knows levels and rows. Row 0 is the source branch where a trajectory is pinned; what the network's attention does
meanwhile is the business of the `control` it is given, and what is special about sampling an inversion method's trajectory
(a second latent, stored noises, embeddings per level, another guidance) is in the `Sampler` that the method hands out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from easyinv_edit.denoiser import BatchRow, Denoiser
from easyinv_edit.errors import TrajectoryError
from easyinv_edit.schedule import require_finite
from easyinv_edit.trajectory import Trajectory

Step = Callable[[Denoiser, Tensor, "Tensor | None", int], "tuple[Tensor, Tensor | None]"]
"""(denoiser, latents of `level`, their companions, level) -> latents of `level - 1` and their companions."""
Control = Callable[[int, Sequence[BatchRow]], AbstractContextManager[object]]
"""(step 0 .. T-1, rows of the UNet batch) -> a context the UNet call runs in."""
AfterStep = Callable[[int, Tensor], Tensor]
"""(level just reached, all latents) -> latents to go on with."""


def ddim_step(denoiser: Denoiser, z: Tensor, companion: Tensor | None, level: int) -> tuple[Tensor, Tensor | None]:
    """One deterministic first-order step; one call of the denoiser."""
    return denoiser.schedule.denoise(z, denoiser(z, level), level), companion


def _unchanged(denoiser: Denoiser, _level: int) -> Denoiser:
    return denoiser


@dataclass(frozen=True)
class Sampler:
    """How the trajectory of an inversion method is sampled; the defaults are DDIM's. Run state lives in its closures.

    The first rows that are sampled are the trajectory's own; those after them are targets, and start from its first row.

    step: one level down, for whatever rows it is given;
    condition: (denoiser of all rows, source first; level) -> the denoiser to use at that level, where conditioning or guidance
        differ from level to level;
    companion: (level, latents z) -> the second latents (same shape) that go with z at that level, for methods whose state is a
        pair; called for the start of every row and for the pinned source;
    after: runs after each step on all rows, before the caller's own `after_step`;
    calls: how often a step calls the network;
    start: the level sampling starts at, T by default;
    source_guidance: the scale the source branch is reconstructed at, by default the one it was inverted at.
    """

    step: Step = ddim_step
    condition: Callable[[Denoiser, int], Denoiser] = _unchanged
    companion: Callable[[int, Tensor], Tensor] | None = None
    after: AfterStep | None = None
    calls: int = 1
    start: int | None = None
    source_guidance: float | None = None


def _no_control(_step: int, _batch: Sequence[BatchRow]) -> AbstractContextManager[object]:
    return nullcontext()


def sample(
    denoiser: Denoiser,
    z: Tensor,
    *,
    sampler: Sampler = Sampler(),
    pin: Trajectory | None = None,
    reads_source: Callable[[int], bool] = lambda _step: True,
    control: Control = _no_control,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Sample latents z (rows, C, H, W) of level T, or of the sampler's `start`, down to level 0.

    pin: overwrite the first rows, one per row of this trajectory, with it at every level before the UNet sees them, and at
    the end (Direct inversion, Ju et al., arXiv 2310.01506: adding their offset and overwriting are the same thing; this is
    bit-exact and costs nothing).
    reads_source: whether those rows are needed at a step; where they are not and are pinned, their evaluation is saved.
    Returns the latents of level 0. Raises NonFiniteError at the first level with a latent that is not finite, TrajectoryError
    where the pin was made on another schedule or at another size. Cost: the sampler's step (for DDIM the denoiser's call), per
    level.
    """
    _require_fit(denoiser, z, pin)
    steps = len(denoiser.schedule)
    start = steps if sampler.start is None else sampler.start
    companion = None if sampler.companion is None else sampler.companion(start, z)
    for level in range(start, 0, -1):
        step = steps - level
        z, companion = _pinned(z, companion, level, pin, sampler)
        sources = 0 if pin is None else pin.latents.shape[1]
        first = 0 if reads_source(step) or z.shape[0] == sources else sources
        here = sampler.condition(denoiser, level)
        active = here.select(range(first, z.shape[0])) if first else here
        batch = [BatchRow(b.row + first, b.half) for b in active.batch]
        with control(step, batch):
            moved, second = sampler.step(active, z[first:], None if companion is None else companion[first:], level)
        z = require_finite(torch.cat([z[:first], moved]), "sampling", level - 1)
        companion = None if companion is None or second is None else torch.cat([companion[:first], second])
        z, companion = _pinned(z, companion, level - 1, pin, sampler)
        for change in (sampler.after, after_step):
            z = z if change is None else change(level - 1, z)
    return _pinned(z, None, 0, pin, sampler)[0]


def _pinned(
    z: Tensor, companion: Tensor | None, level: int, pin: Trajectory | None, sampler: Sampler
) -> tuple[Tensor, Tensor | None]:
    """The first rows, and their companions, as the trajectory has them at `level`."""
    if pin is None:
        return z, companion
    source = pin.latents[level].to(z)
    if companion is not None and sampler.companion is not None:
        companion = torch.cat([sampler.companion(level, source), companion[len(source) :]])
    return torch.cat([source, z[len(source) :]]), companion


def spread(own: Tensor, rows: int) -> Tensor:
    """What belongs to a trajectory's rows, for `rows` sampled rows: each its own, the targets after them the first one's."""
    return own if len(own) == rows else torch.cat([own, own[:1].expand(rows - len(own), *own.shape[1:])])


def _require_fit(denoiser: Denoiser, z: Tensor, pin: Trajectory | None) -> None:
    if pin is None:
        return
    if pin.schedule != denoiser.schedule:
        raise TrajectoryError(
            f"the inversion was made on another noise schedule ({len(pin.schedule)} steps, here {len(denoiser.schedule)}); "
            "invert the image again"
        )
    if pin.latents.shape[1] > z.shape[0]:
        raise TrajectoryError(f"the inversion holds {pin.latents.shape[1]} images, but {z.shape[0]} rows are sampled")
    if pin.latents.shape[2:] != z.shape[1:]:
        theirs, mine = ("x".join(map(str, shape)) for shape in (pin.latents.shape[2:], z.shape[1:]))
        raise TrajectoryError(f"the inversion has latents of {theirs}, here they are {mine}; invert the image at this size")
