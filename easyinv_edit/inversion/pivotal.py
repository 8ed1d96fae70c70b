"""Pivotal tuning of embeddings: what null-text and prompt-tuning inversion share.

From noise to image, one text embedding per level is fitted by Adam so that the guided sampling step from the latent at hand
meets the inversion's own latent of the level below (the pivot); the next level starts from where that step really led.
Mokady et al., arXiv 2211.09794, section 4.1, with their step size and stopping rule, scaled to any number of steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from easyinv_edit.denoiser import Denoiser, Half
from easyinv_edit.errors import EasyInvWarning, NonFiniteError
from easyinv_edit.inversion.base import InversionMethod, OnLevel, frozen, settings_of
from easyinv_edit.schedule import require_finite
from easyinv_edit.trajectory import Trajectory

LOOSER_PER_STEP = 2e-5  # added to the tolerance at each of 50 steps, as the authors do
STEPS = 50  # what their constants were chosen for


@dataclass(frozen=True)
class Fit:
    """How embeddings are fitted: which half of the guidance pair, at which scale, and Adam's settings.

    iterations: of Adam per level; tolerance: mean squared error at which a level is done at the first step, growing with the
    steps; 0 does all iterations.
    """

    half: Half
    guidance: float
    iterations: int
    learning_rate: float
    tolerance: float

    def evaluations(self, num_inference_steps: int) -> int:
        """At most: the other half once, this one at every iteration and once more at the end."""
        return num_inference_steps * (self.iterations + 2)

    def enough(self, step: int, steps: int) -> float:
        """The loss at which step 0 .. T-1 (from noise) is done."""
        return self.tolerance + LOOSER_PER_STEP * step * STEPS / steps if self.tolerance else 0.0

    def rate(self, step: int, steps: int) -> float:
        """Adam's step size; it falls to half over the steps."""
        return self.learning_rate * (1 - step / (2 * steps))


def refined(
    method: InversionMethod, pivots: Trajectory, denoiser: Denoiser, fit: Fit, extra: str, on_level: OnLevel | None
) -> Trajectory:
    """The pivots as a trajectory of `method`, with the fitted embeddings under the name `extra`."""
    embeddings = fit_embeddings(method.name, denoiser, pivots, fit, on_level)
    return replace(pivots, method=method.name, settings=settings_of(method), extras={**pivots.extras, extra: embeddings})


def fit_embeddings(method: str, denoiser: Denoiser, pivots: Trajectory, fit: Fit, on_level: OnLevel | None) -> Tensor:
    """Embeddings (T, rows, tokens, dim) of levels 1 .. T for the half that `fit` names, float32 or better.

    on_level: told each level from T down, with the latents its fitted step starts from. Rows stop on their own. Raises
    NonFiniteError where a gradient is not finite, ValueError without a negative conditioning.
    """
    if denoiser.negative is None:
        raise ValueError("fitting embeddings needs a negative conditioning")
    _speak_of_half_precision(denoiser, method)
    steps, fitted = len(denoiser.schedule), []
    with frozen(denoiser.backbone.network), torch.inference_mode(False):
        start = denoiser.negative if fit.half == "unconditional" else denoiser.conditioning
        embeddings = start.embeddings.clone().to(torch.promote_types(start.embeddings.dtype, torch.float32))
        z, latents = pivots.noise.clone(), pivots.latents.clone()
        for level in range(steps, 0, -1):
            if on_level is not None:
                on_level(level, z)
            embeddings, z = _fit_level(method, denoiser, fit, embeddings, z, latents[level - 1], level)
            fitted.append(embeddings)
    return torch.stack(fitted[::-1])


def _fit_level(
    method: str, denoiser: Denoiser, fit: Fit, embeddings: Tensor, z: Tensor, pivot: Tensor, level: int
) -> tuple[Tensor, Tensor]:
    """(fitted embeddings, latents of the level below that they lead to)."""
    steps = len(denoiser.schedule)
    step = steps - level
    other = _half(denoiser, "conditional" if fit.half == "unconditional" else "unconditional")
    with torch.no_grad():
        fixed = other(z, level)
    u = embeddings.clone().requires_grad_(True)
    adam = torch.optim.Adam([u], lr=fit.rate(step, steps))
    reached = torch.zeros_like(z)
    active = list(range(z.shape[0]))
    for iteration in range(fit.iterations + 1):
        with torch.set_grad_enabled(iteration < fit.iterations):
            down = _guided_step(denoiser, fit, u, z, fixed, active, level)
            losses = (require_finite(down, method, level - 1) - pivot[active]).square().flatten(1).mean(1)
        reached[active] = down.detach()
        going = losses.detach() > fit.enough(step, steps)
        active = [r for r, goes in zip(active, going.tolist(), strict=True) if goes]
        if iteration == fit.iterations or not active:
            break
        before = u.detach().clone()
        (u.grad,) = torch.autograd.grad(losses[going].sum(), u)
        _require_finite(u.grad, method, level)
        adam.step()
        stopped = [r for r in range(z.shape[0]) if r not in active]
        u.data[stopped] = before[stopped]  # Adam's momentum moves a row even without gradient
    return u.detach(), reached


def _guided_step(denoiser: Denoiser, fit: Fit, u: Tensor, z: Tensor, fixed: Tensor, rows: Sequence[int], level: int) -> Tensor:
    """The guided step down for some rows, with `u` as the half that is fitted and `fixed` as the other's output."""
    own = _half(denoiser, fit.half).select(rows)
    index = list(rows)
    own = replace(own, conditioning=replace(own.conditioning, embeddings=u[index]))
    free = own(z[index], level)
    uncond, cond = (free, fixed[index]) if fit.half == "unconditional" else (fixed[index], free)
    return denoiser.schedule.denoise(z[index], uncond + fit.guidance * (cond - uncond), level)


def _half(denoiser: Denoiser, half: Half) -> Denoiser:
    """The denoiser without guidance, conditioned on one half of the pair."""
    assert denoiser.negative is not None
    chosen = denoiser.conditioning if half == "conditional" else denoiser.negative
    return Denoiser(denoiser.backbone, denoiser.schedule, chosen, (1.0,) * chosen.rows)


def _require_finite(gradient: Tensor, method: str, level: int) -> None:
    if not bool(gradient.isfinite().all()):
        raise NonFiniteError(
            f"{method}: the gradient at level {level} is not finite; load the model in dtype float32 (or bfloat16)"
        )


def _speak_of_half_precision(denoiser: Denoiser, method: str) -> None:
    dtype = next(p.dtype for p in denoiser.backbone.network.parameters() if p.is_floating_point())  # others are quantised
    if torch.finfo(dtype).bits < 32:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"{method}: embeddings are fitted in float32, but gradients through a {name} network are coarse and the fit may "
            "fail; load the model in dtype float32",
            EasyInvWarning,
            stacklevel=3,
        )
