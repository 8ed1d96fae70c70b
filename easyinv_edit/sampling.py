"""The one sampling loop. Every backbone, inversion method and controller goes through it.

It knows levels and rows. Row 0 is the source branch where a trajectory is pinned; what the network's attention does
meanwhile is the business of the `control` it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from easyinv_edit.denoiser import BatchRow, Denoiser
from easyinv_edit.schedule import require_finite
from easyinv_edit.trajectory import Trajectory

Step = Callable[[Denoiser, Tensor, int], Tensor]
"""(denoiser, latents of `level`, level) -> latents of `level - 1`."""
Control = Callable[[int, Sequence[BatchRow]], AbstractContextManager[object]]
"""(step 0 .. T-1, rows of the UNet batch) -> a context the UNet call runs in."""
AfterStep = Callable[[int, Tensor], Tensor]
"""(level just reached, all latents) -> latents to go on with."""


def ddim_step(denoiser: Denoiser, z: Tensor, level: int) -> Tensor:
    """One deterministic first-order step; one call of the denoiser."""
    return denoiser.schedule.denoise(z, denoiser(z, level), level)


def _no_control(_step: int, _batch: Sequence[BatchRow]) -> AbstractContextManager[object]:
    return nullcontext()


def sample(
    denoiser: Denoiser,
    z: Tensor,
    *,
    pin: Trajectory | None = None,
    reads_source: Callable[[int], bool] = lambda _step: True,
    control: Control = _no_control,
    step_fn: Step = ddim_step,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Sample latents z (rows, C, H, W) of level T down to level 0.

    pin: overwrite row 0 with this trajectory at every level before the UNet sees it, and at the end (Direct inversion, Ju et
    al., arXiv 2310.01506: adding their offset and overwriting are the same thing; this is bit-exact and costs nothing).
    reads_source: whether row 0 is needed at a step; where it is not and row 0 is pinned, its evaluation is saved.
    Returns the latents of level 0. Raises NonFiniteError at the first level with a latent that is not finite. Cost: the
    denoiser's, per level.
    """
    steps = len(denoiser.schedule)
    targets = denoiser.select(range(1, z.shape[0])) if pin is not None and z.shape[0] > 1 else denoiser
    for level in range(steps, 0, -1):
        step = steps - level
        z = _pinned(z, pin, level)
        first = 0 if pin is None or reads_source(step) or z.shape[0] == 1 else 1
        active = denoiser if first == 0 else targets
        batch = [BatchRow(b.row + first, b.half) for b in active.batch]
        with control(step, batch):
            moved = step_fn(active, z[first:], level)
        z = require_finite(torch.cat([z[:first], moved]), "sampling", level - 1)
        if after_step is not None:
            z = after_step(level - 1, z)
    return _pinned(z, pin, 0)


def _pinned(z: Tensor, pin: Trajectory | None, level: int) -> Tensor:
    if pin is None:
        return z
    return torch.cat([pin.latents[level].to(z), z[1:]])
