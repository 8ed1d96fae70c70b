"""Negative-prompt inversion: the source prompt takes the place of the empty one in guidance.

Miyake, Iohara, Saito and Tanaka, "Negative-prompt Inversion: Fast Image Inversion for Editing with Text-guided Diffusion
Models", arXiv 2305.16807. With the source prompt as the unconditional embedding, guidance is the identity for the source branch
at any scale, so it is reconstructed as well as at guidance 1, without optimisation. The targets are guided from the source
prompt toward their own: strong edits, with more artefacts than null-text inversion.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import EasyInvWarning
from easyinv_edit.inversion.base import SETTINGS, Generators, InversionMethod, OnLevel, Uncomposed, by_name, settings_of
from easyinv_edit.sampling import Sampler
from easyinv_edit.trajectory import Trajectory


@dataclass(frozen=True, config=SETTINGS)
class NegativePrompt(InversionMethod):
    """Negative-prompt inversion, NPI (arXiv 2305.16807).

    base: the inversion itself, any method but a composed one; interpolation: share of the source prompt in the negative
    embedding (linear), 1 being NPI and 0 the edit's own negative prompt, i.e. the base alone. Needs a source prompt, and warns
    without one: then nothing changes. Cost: the base's.
    """

    base: Uncomposed = by_name("ddim")
    interpolation: Annotated[float, Field(ge=0, le=1)] = 1.0

    name: ClassVar[str] = "negative_prompt"
    paper: ClassVar[str] = "arXiv 2305.16807"

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W) by the base."""
        if denoiser.negative is not None and denoiser.conditioning.equals(denoiser.negative):
            warnings.warn(
                f"{self.name}: the source prompt is empty, or is the negative prompt, so this is {self.base.name} alone; give "
                "a source prompt",
                EasyInvWarning,
                stacklevel=2,
            )
        trajectory = self.base.invert(denoiser, z0, on_level, generator)
        return replace(trajectory, method=self.name, settings=settings_of(self))

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """The base's."""
        return self.base.evaluations(num_inference_steps, guided)

    def sampler(self, trajectory: Trajectory) -> Sampler:
        """The base's steps, with the source row's conditioning as every row's negative one."""
        base: Sampler = self.base.sampler(trajectory)

        def condition(denoiser: Denoiser, level: int) -> Denoiser:
            denoiser = base.condition(denoiser, level)
            assert denoiser.negative is not None
            sources = trajectory.latents.shape[1]
            source = denoiser.conditioning.select([r if r < sources else 0 for r in range(denoiser.conditioning.rows)])
            return replace(denoiser, negative=denoiser.negative.toward(source, self.interpolation))

        return replace(base, condition=condition)
