"""Stochastic sampling with stored noise: what methods share whose trajectory carries the noise of every level."""

from __future__ import annotations

from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.sampling import Sampler, spread


def ancestral_sampler(noises: Tensor, eta: float, start: int | None = None) -> Sampler:
    """DDIM's stochastic step (Song et al., arXiv 2010.02502, eq. 12) with `noises` (T, rows, C, H, W).

    noises: of levels 1 .. T, already scaled by the step's deviation; eta: the one they were made for; start: level to start at.
    One call of the denoiser per level.
    """

    def step(denoiser: Denoiser, z: Tensor, companion: Tensor | None, level: int) -> tuple[Tensor, Tensor | None]:
        deviation = denoiser.schedule.deviation(level, eta)
        return denoiser.schedule.denoise(z, denoiser(z, level), level, deviation) + spread(
            noises[level - 1].to(z), len(z)
        ), companion

    return Sampler(step=step, start=start)
