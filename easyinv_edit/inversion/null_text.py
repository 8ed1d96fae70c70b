"""Null-text inversion: fit the unconditional embedding so that guided sampling follows the inversion.

Mokady, Hertz, Aberman, Pritch and Cohen-Or, "Null-text Inversion for Editing Real Images using Guided Diffusion Models", arXiv
2211.09794. Inverting at guidance 1 and sampling at 7.5 part ways. Here the unconditional ("null") embedding of every level is
optimised so that the guided step meets the inversion's latent of the level below; an edit then uses those embeddings for every
row. The prompt, and with it the edit, stays as it is.

Where this differs from the authors' code: the conditional prediction of a level is computed once, the step down reuses the last
unconditional one, and their step size and stopping rule, written for 50 steps, are scaled to any T.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.inversion.base import SETTINGS, Generators, InversionMethod, OnLevel, Pivots, by_name
from easyinv_edit.inversion.pivotal import Fit, refined
from easyinv_edit.sampling import Sampler, spread
from easyinv_edit.trajectory import Trajectory


@dataclass(frozen=True, config=SETTINGS)
class NullText(InversionMethod):
    """Null-text inversion (arXiv 2211.09794).

    base: the inversion whose latents are the pivots, any that is sampled by DDIM's steps; guidance_scale: what the edit will
    use, and what an unpinned source branch is reconstructed at; iterations: of Adam per level; learning_rate: its step size;
    tolerance: mean squared error at which a level is done, 0 doing all iterations.

    The embeddings travel as `extras["null_embeddings"]` (T, rows, tokens, dim); they take the place of the edit's negative
    prompt; SDXL's pooled embedding is not fitted. Optimises in float32; through a half-precision UNet the gradients are coarse,
    which is warned of. Cost: the base's and, per level, at most iterations + 2 evaluations, `iterations` of them with a
    backward pass.
    """

    base: Pivots = by_name("ddim")
    guidance_scale: Annotated[float, Field(gt=1, le=100)] = 7.5
    iterations: Annotated[int, Field(ge=1, le=1000)] = 10
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-2
    tolerance: Annotated[float, Field(ge=0)] = 1e-5

    name: ClassVar[str] = "null_text"
    paper: ClassVar[str] = "arXiv 2211.09794"
    passes: ClassVar[int] = 2

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W) by the base, then fit from level T down."""
        pivots = self.base.invert(denoiser, z0, on_level, generator)
        return refined(self, pivots, denoiser, self._fit, "null_embeddings", on_level)

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """The base's, and at most iterations + 2 per level."""
        return self.base.evaluations(num_inference_steps, guided) + self._fit.evaluations(num_inference_steps)

    def sampler(self, trajectory: Trajectory) -> Sampler:
        """DDIM's steps with the level's own embedding as every row's negative conditioning."""
        embeddings = trajectory.extras["null_embeddings"]

        def condition(denoiser: Denoiser, level: int) -> Denoiser:
            assert denoiser.negative is not None
            own = embeddings[level - 1].to(denoiser.negative.embeddings)
            return replace(denoiser, negative=replace(denoiser.negative, embeddings=spread(own, denoiser.negative.rows)))

        return Sampler(condition=condition, source_guidance=self.guidance_scale)

    @property
    def _fit(self) -> Fit:
        return Fit("unconditional", self.guidance_scale, self.iterations, self.learning_rate, self.tolerance)
