"""DDIM inversion: the probability-flow ODE walked from image to noise.

Song, Meng and Ermon, "Denoising Diffusion Implicit Models", arXiv 2010.02502 (the remark after eq. 14); used for editing
since Dhariwal and Nichol, arXiv 2105.05233, appendix F. Going from level i - 1 to i the UNet is given the latent at hand and
the label of the HIGHER level i, as every practical code does: the fixed point of that rule is the sampler's exact inverse.
The lower label reconstructs about three times worse.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.inversion.base import SETTINGS, Generators, InversionMethod, OnLevel, climb
from easyinv_edit.trajectory import Trajectory


@dataclass(frozen=True, config=SETTINGS)
class DDIM(InversionMethod):
    """z_i = renoise(z_{i-1}, output(z_{i-1}, t_i)). Has no settings.

    Cost: one evaluation per level. Its error is of first order in 1 / T and grows with guidance: invert at 1.
    """

    name: ClassVar[str] = "ddim"
    paper: ClassVar[str] = "arXiv 2010.02502"

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W)."""

        def step(z: Tensor, level: int) -> Tensor:
            return denoiser.schedule.renoise(z, denoiser(z, level), level)

        return climb(self, denoiser, z0, step, on_level)

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """One per level."""
        return num_inference_steps * (1 + guided)
