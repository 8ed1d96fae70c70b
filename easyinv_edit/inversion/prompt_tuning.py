"""Prompt-tuning inversion: fit the CONDITIONAL embedding, then blend it with the target's.

Dong, Xue, Duan and Han, "Prompt Tuning Inversion for Text-driven Image Editing Using Diffusion Models", arXiv 2305.04441. After
an inversion, the embedding of every level is optimised so that the guided step meets the inversion's latent of the level below.
An edit samples with (1 - blend) * tuned + blend * target. No source prompt is needed: it is only where tuning starts.

No official code was found, and the paper's hyper-parameters could not be verified: the two stages and the linear blend are the
paper's; the start (the source prompt's embedding), the iterations, the step size and the stopping rule are null-text
inversion's, and the default blend of 0.9 is ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.inversion.base import SETTINGS, Generators, InversionMethod, OnLevel, Pivots, by_name
from easyinv_edit.inversion.pivotal import Fit, refined
from easyinv_edit.sampling import Sampler
from easyinv_edit.trajectory import Trajectory


@dataclass(frozen=True, config=SETTINGS)
class PromptTuning(InversionMethod):
    """Prompt-tuning inversion (arXiv 2305.04441), as far as the paper tells.

    base: the inversion whose latents are the pivots, any that is sampled by DDIM's steps; blend: weight of the target's
    embedding in an edit, 0 giving the source back; guidance_scale: what the edit will use, and what an unpinned source branch
    is reconstructed at; iterations, learning_rate, tolerance: of the fit, as in null-text inversion.

    The embeddings travel as `extras["prompt_embeddings"]` (T, rows, tokens, dim); SDXL's pooled embedding is not fitted.
    Optimises in float32; through a half-precision UNet the gradients are coarse, which is warned of. Cost: the base's and, per
    level, at most iterations + 2 evaluations, `iterations` of them with a backward pass.
    """

    base: Pivots = by_name("ddim")
    blend: Annotated[float, Field(ge=0, le=1)] = 0.9
    guidance_scale: Annotated[float, Field(gt=1, le=100)] = 7.5
    iterations: Annotated[int, Field(ge=1, le=1000)] = 10
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-2
    tolerance: Annotated[float, Field(ge=0)] = 1e-5

    name: ClassVar[str] = "prompt_tuning"
    paper: ClassVar[str] = "arXiv 2305.04441"
    passes: ClassVar[int] = 2

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W) by the base, then fit from level T down."""
        pivots = self.base.invert(denoiser, z0, on_level, generator)
        return refined(self, pivots, denoiser, self._fit, "prompt_embeddings", on_level)

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """The base's, and at most iterations + 2 per level."""
        return self.base.evaluations(num_inference_steps, guided) + self._fit.evaluations(num_inference_steps)

    def sampler(self, trajectory: Trajectory) -> Sampler:
        """DDIM's steps; the source row is conditioned on the level's own embedding, the targets on the blend with theirs."""
        tuned = trajectory.extras["prompt_embeddings"]

        def condition(denoiser: Denoiser, level: int) -> Denoiser:
            own = tuned[level - 1].to(denoiser.conditioning.embeddings)
            targets = denoiser.conditioning.embeddings[len(own) :]
            blended = [torch.lerp(own[:1], target[None], self.blend) for target in targets]
            return replace(denoiser, conditioning=replace(denoiser.conditioning, embeddings=torch.cat([own, *blended])))

        return Sampler(condition=condition, source_guidance=self.guidance_scale)

    @property
    def _fit(self) -> Fit:
        return Fit("conditional", self.guidance_scale, self.iterations, self.learning_rate, self.tolerance)
