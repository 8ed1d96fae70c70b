"""EDICT: two coupled latents whose sampling steps can be undone exactly.

Wallace, Gokul and Naik, "EDICT: Exact Diffusion Inversion via Coupled Transformations", arXiv 2211.12446, eqs. 14 and 15. Each
latent takes the sampler's step with the prediction made on the OTHER, as in affine coupling layers; then the two are mixed.
Every operation is undone in turn, so the round trip is exact for any network and guidance, up to rounding.

The authors compute everything in float64, their networks too, because undoing the mixing multiplies rounding errors by up to
(1 / mix)^(2 T). Here latents are at least float32: with a float32 network round trips stay below 1e-4 at 50 steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import ScheduleError
from easyinv_edit.inversion.base import SETTINGS, Generators, InversionMethod, OnLevel, climb
from easyinv_edit.sampling import Sampler, spread
from easyinv_edit.trajectory import Trajectory


@dataclass(frozen=True, config=SETTINGS)
class EDICT(InversionMethod):
    """EDICT (arXiv 2211.12446).

    mix: share in which a latent keeps itself when the two are mixed; less holds them together and costs precision, 1 lets them
    drift apart; above 100 steps 0.93 loses precision fast, so go nearer to 1; leapfrog: take turns in which latent steps first.

    The second latent travels as `extras["companion"]` (T + 1, rows, C, H, W). Its sampler is its own, so an edit costs two
    evaluations per level too, and twice the latents. Raises ScheduleError on schedules with zero terminal SNR. Cost: two
    evaluations per level. Guidance above 1 does no harm here. With a half-precision network it is exact only until a latent,
    kept in float32, rounds to another value than on the way up: from there on the network's rounding adds up, to some per cent
    in bfloat16.
    """

    mix: Annotated[float, Field(ge=0.9, le=1)] = 0.93
    leapfrog: bool = True

    name: ClassVar[str] = "edict"
    paper: ClassVar[str] = "arXiv 2211.12446"
    fewest_steps: ClassVar[int] = 10

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W)."""
        if denoiser.schedule.signal[-1] <= 0:
            raise ScheduleError("edict: this schedule ends without signal (zero terminal SNR); use bdia or fixed_point")
        companions = [z0]

        def step(z: Tensor, level: int) -> Tensor:
            x, y = self._up(denoiser, z, companions[-1], level)
            companions.append(y)
            return x

        trajectory = climb(self, denoiser, z0, step, on_level, guidance_matters=False)
        return replace(trajectory, extras={"companion": torch.stack(companions)})

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """Two per level."""
        return 2 * num_inference_steps * (1 + guided)

    def sampler(self, trajectory: Trajectory) -> Sampler:
        """EDICT's own steps on pairs; targets start as far from their companion as the source does."""

        def companion(level: int, z: Tensor) -> Tensor:
            apart = trajectory.extras["companion"][level] - trajectory.latents[level]
            return z + spread(apart.to(z), len(z))

        return Sampler(step=self._down, companion=companion, calls=2)

    def _swaps(self, level: int, steps: int) -> bool:
        return self.leapfrog and (steps - level) % 2 == 1

    def _down(self, denoiser: Denoiser, x: Tensor, y: Tensor | None, level: int) -> tuple[Tensor, Tensor | None]:
        assert y is not None
        swaps = self._swaps(level, len(denoiser.schedule))
        first, second = (y, x) if swaps else (x, y)
        first = _moved(denoiser, first, second, level, level, level - 1)
        second = _moved(denoiser, second, first, level, level, level - 1)
        first = self.mix * first + (1 - self.mix) * second
        second = self.mix * second + (1 - self.mix) * first
        return (second, first) if swaps else (first, second)

    def _up(self, denoiser: Denoiser, x: Tensor, y: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """`_down` undone, last operation first."""
        swaps = self._swaps(level, len(denoiser.schedule))
        first, second = (y, x) if swaps else (x, y)
        second = (second - (1 - self.mix) * first) / self.mix
        first = (first - (1 - self.mix) * second) / self.mix
        second = _moved(denoiser, second, first, level, level - 1, level)
        first = _moved(denoiser, first, second, level, level - 1, level)
        return (second, first) if swaps else (first, second)


def _moved(denoiser: Denoiser, z: Tensor, other: Tensor, level: int, start: int, end: int) -> Tensor:
    """z moved between levels along the noise predicted on the other latent, which is of `level`."""
    return denoiser.schedule.move(z, denoiser.schedule.epsilon(other, denoiser(other, level), level), start, end)
