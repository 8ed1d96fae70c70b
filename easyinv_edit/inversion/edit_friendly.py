"""Edit-friendly DDPM inversion: noise maps with which stochastic sampling gives back the image exactly.

Huberman-Spiegelglas, Kulikov and Michaeli, "An Edit Friendly DDPM Noise Space: Inversion and Manipulations", arXiv 2304.06140.
Every level gets a latent x_i = signal_i * z_0 + noise_i * n_i with INDEPENDENT n_i (eq. 5: no Markov chain), and the noise of
a step is whatever leads from x_i to x_{i-1} (eq. 6). Exact for any network and guidance, by construction.

Where this differs from the authors' code: the noise of the last step is kept (they zero it, which alone leaves an error of
several per cent), noises are stored already scaled by the step's deviation (so a last step of deviation 0 needs no division),
and eta below 1 follows DDIM's definition of the variance.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.inversion.ancestral import ancestral_sampler
from easyinv_edit.inversion.base import SETTINGS, Generators, InversionMethod, OnLevel, climb, draw
from easyinv_edit.sampling import Sampler
from easyinv_edit.trajectory import Trajectory


@dataclass(frozen=True, config=SETTINGS)
class EditFriendly(InversionMethod):
    """Edit-friendly DDPM inversion (arXiv 2304.06140).

    skip: share of the noisiest steps an edit leaves out; 0.36 is the authors', more stays nearer to the image; eta: 1 is DDPM.

    The noises travel as `extras["noises"]` (T, rows, C, H, W) and come from the generator; all rows of an edit share them.
    Their deviation is well above that of true noise, and sampling without them is no reconstruction. Cost: one evaluation per
    level; the edit itself saves the skipped steps. Guidance above 1 does no harm here. With a half-precision network it is
    exact only until a latent, kept in float32, rounds to another value than on the way up: from there on the network's rounding
    adds up, to some thousandths.
    """

    skip: Annotated[float, Field(ge=0, lt=1)] = 0.36
    eta: Annotated[float, Field(gt=0, le=1)] = 1.0

    name: ClassVar[str] = "edit_friendly"
    paper: ClassVar[str] = "arXiv 2304.06140"

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W) with noise from the generator."""
        schedule, noises = denoiser.schedule, []

        def step(z: Tensor, level: int) -> Tensor:
            x = schedule.add_noise(z0, draw(z0, generator), level)
            noises.append(z - schedule.denoise(x, denoiser(x, level), level, schedule.deviation(level, self.eta)))
            return x

        trajectory = climb(self, denoiser, z0, step, on_level, guidance_matters=False)
        return replace(trajectory, extras={"noises": torch.stack(noises)})

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """One per level."""
        return num_inference_steps * (1 + guided)

    def sampler(self, trajectory: Trajectory) -> Sampler:
        """DDPM's steps with the stored noises, from the level that `skip` leaves."""
        steps = len(trajectory.schedule)
        return ancestral_sampler(trajectory.extras["noises"], self.eta, start=max(1, steps - int(self.skip * steps + 1e-9)))
