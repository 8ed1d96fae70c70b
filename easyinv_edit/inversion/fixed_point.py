"""Fixed-point inversion: solve the sampler's step for its start instead of guessing it once.

Pan, Gherardi, Xie and Huang, "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion", arXiv 2309.04907,
without their acceleration. z_i is the fixed point of x -> renoise(z_{i-1}, output(x, t_i)); at the fixed point the sampler's
own step leads back to z_{i-1} exactly. The map contracts slowest at low noise; guidance above 1 can make it expand.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.inversion.base import OnLevel, climb
from easyinv_edit.trajectory import Trajectory


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FixedPoint:
    """Plain fixed-point iteration (arXiv 2309.04907).

    iterations: corrections after the first guess, which alone is DDIM inversion. Cost: 1 + iterations evaluations per level.
    """

    iterations: Annotated[int, Field(ge=0, le=100)] = 5

    name: ClassVar[str] = "fixed_point"
    paper: ClassVar[str] = "arXiv 2309.04907"

    def invert(self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W)."""

        def step(z: Tensor, level: int) -> Tensor:
            guess = z
            for _ in range(1 + self.iterations):
                guess = denoiser.schedule.renoise(z, denoiser(guess, level), level)
            return guess

        return climb(self, denoiser, z0, step, on_level)

    def evaluations(self, num_inference_steps: int) -> int:
        """1 + iterations per level."""
        return num_inference_steps * (1 + self.iterations)
