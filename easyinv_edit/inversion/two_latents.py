"""What two-step exact inverses share: they step from a latent and its predecessor, so the pair must be kept.

Going up, the latent of level i + 1 follows from those of levels i - 1 and i; going down, the latent of level i - 1 follows from
those of levels i + 1 and i, with the same prediction, made at level i. At the top no level is left to come from: the step down
from level T is DDIM's plus what that misses of the stored level T - 1 (`extras["correction"]`), which makes it exact too and
leaves target rows a first step under their own prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.inversion.base import InversionMethod, OnLevel, climb
from easyinv_edit.sampling import Sampler, spread
from easyinv_edit.schedule import NoiseSchedule
from easyinv_edit.trajectory import Trajectory

Recurrence = Callable[[NoiseSchedule, Tensor, Tensor, Tensor, int], Tensor]
"""(schedule, latents of the other neighbour, latents of `level`, predicted noise there, level) -> those of one neighbour."""


def climb_pairs(
    method: InversionMethod, denoiser: Denoiser, z0: Tensor, up: Recurrence, on_level: OnLevel | None
) -> Trajectory:
    """Invert by `up`; the first step is DDIM's. Cost: one evaluation per level and one for the correction."""
    schedule, before = denoiser.schedule, [z0]

    def step(z: Tensor, level: int) -> Tensor:
        if level == 1:
            return schedule.renoise(z, denoiser(z, level), level)
        reached = up(schedule, before[0], z, schedule.epsilon(z, denoiser(z, level - 1), level - 1), level - 1)
        before[0] = z
        return reached

    trajectory = climb(method, denoiser, z0, step, on_level, guidance_matters=False)
    top = len(schedule)
    down = schedule.denoise(trajectory.noise, denoiser(trajectory.noise, top), top)
    return replace(trajectory, extras={"correction": (trajectory.latents[top - 1] - down)[None]})


def pair_sampler(trajectory: Trajectory, down: Recurrence) -> Sampler:
    """Sample by `down`; a row's companion is its latent of one level above, at level T the correction."""
    top = len(trajectory.schedule)

    def companion(level: int, z: Tensor) -> Tensor:
        own = trajectory.extras["correction"][0] if level == top else trajectory.latents[level + 1]
        return spread(own.to(z), len(z))

    def step(denoiser: Denoiser, z: Tensor, above: Tensor | None, level: int) -> tuple[Tensor, Tensor | None]:
        assert above is not None
        output = denoiser(z, level)
        if level == top:
            return denoiser.schedule.denoise(z, output, level) + above, z
        return down(denoiser.schedule, above, z, denoiser.schedule.epsilon(z, output, level), level), z

    return Sampler(step=step, companion=companion)
