"""ReNoise inversion: average the noise predictions along a fixed-point iteration, and keep their statistics healthy.

Garibi, Patashnik, Voynov, Averbuch-Elor and Cohen-Or, "ReNoise: Real Image Inversion Through Iterative Noising", arXiv
2403.14602. At each level the step up is taken several times, each time with the prediction at the latent it led to; the final
step uses a weighted average of those predictions (section 4.1). For few-step models the averaged prediction is regularised
(section 4.2: pairwise correlations within the noise, and the distribution of small patches against that of a prediction on
really noised latents), the sampler is stochastic (`eta` 1 is what their Euler-ancestral sampler is in these units), and its
noise is corrected so that the step down meets the level below (section 4.3).

Where this differs from the authors' code, and why:
- the target of the regulariser is a prediction on a latent that is really noised. Their Stable Diffusion route replaces the
  noising by the identity; on flat images the target's patch variance is then nearly zero, and in float16 the loss and then the
  whole latent become NaN (their "black images").
- the regulariser computes in float32 with guarded denominators and clips both gradients; an update that is not finite is
  refused with a warning.
- the 50-step preset does not regularise. Theirs does so below timestep 250 only, with the target above.
- correcting the noise moves it straight toward the noise that fits, by at most `noise_correction` of its usual norm; they
  take ten gradient steps that together reach 0.14 of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import EasyInvWarning
from easyinv_edit.inversion.ancestral import ancestral_sampler
from easyinv_edit.inversion.base import SETTINGS, Generators, InversionMethod, OnLevel, climb, draw
from easyinv_edit.inversion.regularise import regularise
from easyinv_edit.sampling import Sampler
from easyinv_edit.trajectory import Trajectory


def _average(weights: tuple[float, ...]) -> tuple[float, ...]:
    if not weights or not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
        raise ValueError("should hold one weight per evaluation, none negative and not all 0, e.g. [0, 1, 1]")
    return weights


Weights = Annotated[tuple[float, ...], AfterValidator(_average)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Preset:
    """Values of ReNoise's settings for a kind of model."""

    weights: tuple[float, ...]
    low_noise_weights: tuple[float, ...]
    regularisation: int
    eta: float
    noise_correction: float


PRESETS = {
    "few_step": Preset((0,) * 8 + (1, 1), (1,) * 5, 4, 1.0, 0.14),
    "many_step": Preset((0, 1), (1, 1), 0, 0.0, 0.0),
}
"""The authors' SDXL-Turbo defaults and their 50-step examples, unused evaluations left out."""
FEW_STEPS = 8  # preset "auto": up to so many steps are a few-step model's
AREA = 64 * 64  # of the latents the authors' step size is for; the gradient of a mean falls with the area
LOW_NOISE = 0.25  # share of the levels that count as low noise, where the iteration converges slowest


@dataclass(frozen=True, config=SETTINGS)
class ReNoise(InversionMethod):
    """ReNoise (arXiv 2403.14602).

    preset: "few_step" (Turbo: 10 predictions, regularised, ancestral, corrected), "many_step" (2 predictions, nothing else), by
    default few_step up to 8 steps. The others override the preset: weights: of the predictions at iterations 0, 1, ..., one
    evaluation each; low_noise_weights: the same in the lowest quarter of the levels; regularisation: rounds of the noise
    regulariser, 0 turning it off; correlation_strength, patch_strength: its two step sizes (the paper's lambda_pair, for
    latents of 64 x 64 and scaled with their area, and lambda_patch-KL); eta: stochasticity of the sampler in [0, 1];
    noise_correction: how far noise may be moved to fit, as a share of its norm, 0 for not at all; needs eta above 0.

    Not exact: it reduces DDIM inversion's error. With eta above 0 the noises travel as `extras["noises"]` (T, rows, C, H, W)
    and come from the generator. Cost per level: one evaluation per weight, one more to regularise and one more to correct.
    """

    preset: Literal["auto", "few_step", "many_step"] = "auto"
    weights: Weights | None = None
    low_noise_weights: Weights | None = None
    regularisation: Annotated[int, Field(ge=0, le=100)] | None = None
    correlation_strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0
    patch_strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.065
    eta: Share | None = None
    noise_correction: Share | None = None

    name: ClassVar[str] = "renoise"
    paper: ClassVar[str] = "arXiv 2403.14602"

    def resolved(self, num_inference_steps: int) -> Preset:
        """The settings in force for T steps."""
        few = num_inference_steps <= FEW_STEPS
        preset = PRESETS[self.preset if self.preset != "auto" else "few_step" if few else "many_step"]
        own = {key: value for key in vars(preset) if (value := getattr(self, key)) is not None}
        return replace(preset, **own)

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W); the generator is used where eta is above 0 or the noise is regularised."""
        steps = len(denoiser.schedule)
        chosen = self.resolved(steps)
        noised = draw(z0, generator) if chosen.regularisation else None
        fresh = [draw(z0, generator) if chosen.eta else torch.zeros_like(z0) for _ in range(steps)]
        rolls = torch.Generator().manual_seed(0)  # which shifts are decorrelated: the same for every image
        noises: list[Tensor] = []

        def step(z: Tensor, level: int) -> Tensor:
            target = None
            if noised is not None:
                reference = denoiser.schedule.add_noise(z0, noised, level)
                target = denoiser.schedule.epsilon(reference, denoiser(reference, level), level)
            noise = denoiser.schedule.deviation(level, chosen.eta) * fresh[level - 1]
            x = self._average(denoiser, z, noise, level, chosen, target, rolls)
            noises.append(_corrected(denoiser, x, z, noise, level, chosen))
            return x

        trajectory = climb(self, denoiser, z0, step, on_level)
        return replace(trajectory, extras={"noises": torch.stack(noises)}) if chosen.eta else trajectory

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """The weights of every level, plus one per level to regularise and one to correct."""
        chosen = self.resolved(num_inference_steps)
        weights = sum(len(_weights(chosen, level, num_inference_steps)) for level in range(1, num_inference_steps + 1))
        others = (chosen.regularisation > 0) + (chosen.eta > 0 and chosen.noise_correction > 0)
        return (weights + num_inference_steps * others) * (1 + guided)

    def sampler(self, trajectory: Trajectory) -> Sampler:
        """DDIM's steps; with eta above 0 the stochastic ones, with the stored noises."""
        eta = self.resolved(len(trajectory.schedule)).eta
        return ancestral_sampler(trajectory.extras["noises"], eta) if eta else Sampler()

    def _average(
        self,
        denoiser: Denoiser,
        z: Tensor,
        noise: Tensor,
        level: int,
        chosen: Preset,
        target: Tensor | None,
        rolls: torch.Generator,
    ) -> Tensor:
        """One level up: latents z of the level below -> of `level`, by the averaged prediction."""
        schedule, weights = denoiser.schedule, _weights(chosen, level, len(denoiser.schedule))
        deviation = schedule.deviation(level, chosen.eta)

        def up(output: Tensor) -> Tensor:
            return schedule.renoise(z - noise, output, level, deviation)

        def healthy(output: Tensor, x: Tensor) -> Tensor:
            if target is None:
                return output
            epsilon = schedule.epsilon(x, output, level)
            strengths = (self.correlation_strength * x[0, 0].numel() / AREA, self.patch_strength)
            update = _accepted(regularise(epsilon, target, chosen.regularisation, *strengths, rolls), epsilon, level)
            return schedule.with_epsilon(output, update - epsilon, level)

        x, total, weight = z, torch.zeros_like(z), 0.0
        for k, own in enumerate(weights):
            output = denoiser(x, level)
            total, weight = total + own * output, weight + own
            if k + 1 < len(weights):
                x = up(healthy(output, x) if weight else output)
        return up(healthy(total / weight, x))


def _weights(chosen: Preset, level: int, steps: int) -> Sequence[float]:
    return chosen.low_noise_weights if level - 1 < LOW_NOISE * steps else chosen.weights


def _accepted(update: Tensor, before: Tensor, level: int) -> Tensor:
    """The regularised prediction, or the one before where it is not finite."""
    bad = ~update.flatten(1).isfinite().all(dim=1)
    if bool(bad.any()):
        warnings.warn(
            f"renoise: the regularised noise of level {level} was not finite and has been refused; lower its strengths",
            EasyInvWarning,
            stacklevel=2,
        )
    return torch.where(bad[:, None, None, None], before, update)


def _corrected(denoiser: Denoiser, x: Tensor, z: Tensor, noise: Tensor, level: int, chosen: Preset) -> Tensor:
    """The level's noise, moved toward the one with which the step down from x meets z."""
    if not (chosen.eta and chosen.noise_correction):
        return noise
    schedule, deviation = denoiser.schedule, denoiser.schedule.deviation(level, chosen.eta)
    missing = z - schedule.denoise(x, denoiser(x, level), level, deviation) - noise
    reach = chosen.noise_correction * deviation * (x[0].numel() ** 0.5)
    norm = missing.flatten(1).norm(dim=1).clamp_min(1e-12)
    return noise + (reach / norm).clamp(max=1)[:, None, None, None] * missing
