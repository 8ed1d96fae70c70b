"""BDIA: bi-directional integration approximation, an exact inverse at DDIM's cost.

Zhang, Lewis and Kleijn, "Exact Diffusion Inversion via Bi-directional Integration Approximation", arXiv 2307.10829. The step
down averages the integral over the step at hand with that over the step before, taken backwards, both with one prediction e_i:

    z_{i-1} = gamma z_{i+1} + D_i(z_i, e_i) - gamma N_{i+1}(z_i, e_i)

with D_i DDIM's step down and N_{i+1} its step up. Solved for z_{i+1} it is the inversion: exact for any network and guidance.
Solving divides by gamma at every level, so gamma below 0.9 amplifies rounding beyond use (at 0.5 and 50 steps the latents
reach 1e12) and is refused.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.inversion.base import SETTINGS, Generators, InversionMethod, OnLevel
from easyinv_edit.inversion.two_latents import climb_pairs, pair_sampler
from easyinv_edit.sampling import Sampler
from easyinv_edit.schedule import NoiseSchedule
from easyinv_edit.trajectory import Trajectory


@dataclass(frozen=True, config=SETTINGS)
class BDIA(InversionMethod):
    """BDIA (arXiv 2307.10829).

    gamma: weight of the backward integral, 1 being exactly time-symmetric. Its sampler is its own, and its trajectory is not
    DDIM's. Extra: one latent, `extras["correction"]` (1, rows, C, H, W). Cost: one evaluation per level and one more. With a
    half-precision network it is exact only until a latent, kept in float32, rounds to another value than on the way up: from
    there on the network's rounding adds up undamped, to as much as a tenth in bfloat16.
    """

    gamma: Annotated[float, Field(ge=0.9, le=1)] = 1.0

    name: ClassVar[str] = "bdia"
    paper: ClassVar[str] = "arXiv 2307.10829"
    fewest_steps: ClassVar[int] = 10

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W)."""
        return climb_pairs(self, denoiser, z0, self._up, on_level)

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """One per level and one for the correction at the top."""
        return (num_inference_steps + 1) * (1 + guided)

    def sampler(self, trajectory: Trajectory) -> Sampler:
        """BDIA's own step on pairs of latents."""
        return pair_sampler(trajectory, self._down)

    def _down(self, schedule: NoiseSchedule, above: Tensor, z: Tensor, epsilon: Tensor, level: int) -> Tensor:
        up = schedule.move(z, epsilon, level, level + 1)
        return self.gamma * (above - up) + schedule.move(z, epsilon, level, level - 1)

    def _up(self, schedule: NoiseSchedule, below: Tensor, z: Tensor, epsilon: Tensor, level: int) -> Tensor:
        down = schedule.move(z, epsilon, level, level - 1)
        return (below - down) / self.gamma + schedule.move(z, epsilon, level, level + 1)
