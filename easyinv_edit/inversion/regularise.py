"""ReNoise's regulariser: keep a noise prediction looking like noise (arXiv 2403.14602, section 4.2, after Parmar et al.,
arXiv 2302.03027).

Two gradient steps per round: the distribution of small patches is drawn toward that of a target prediction, then correlations
between shifted copies, at several scales, are reduced. Always in float32; row by row, so rows stay independent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

PATCH = 4
FLOOR = 1e-4  # under every variance: a flat region must not divide by nothing
CLIP = 100.0  # of a gradient's entries
ROLLS = 5  # shifts per round
COARSEST = 8  # pixels at which the pyramid of scales ends


def regularise(
    epsilon: Tensor, target: Tensor, rounds: int, correlation_strength: float, patch_strength: float, generator: torch.Generator
) -> Tensor:
    """A prediction (rows, C, H, W) after `rounds` rounds toward the statistics of `target`; same shape, dtype and device.

    generator: chooses the shifts, on the CPU, the same for all rows.
    """
    shifts = [
        [_shift(epsilon.shape[-2:], generator) for _ in range(ROLLS if correlation_strength else 0)] for _ in range(rounds)
    ]
    with torch.inference_mode(False):
        single, aim = epsilon.float().clone(), target.float().clone()
        rows = range(len(single))
        done = [_row(single[r : r + 1], aim[r : r + 1], shifts, correlation_strength, patch_strength) for r in rows]
    return torch.cat(done).to(epsilon)


def _row(e: Tensor, target: Tensor, shifts: list[list[float]], correlation_strength: float, patch_strength: float) -> Tensor:
    for round_ in shifts:
        if patch_strength:
            e = e - patch_strength * _gradient(partial(patch_divergence, target=target), e)
        for shift in round_:
            e = e - correlation_strength / ROLLS * _gradient(partial(correlation, shift=shift), e)
    return e


def _gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    with torch.enable_grad():
        x = at.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(x), x)
    return gradient.clamp(-CLIP, CLIP)


def patch_divergence(x: Tensor, target: Tensor) -> Tensor:
    """Sum over 4 x 4 patches and channels of twice the Kullback-Leibler divergence of their Gaussians, from the target's."""
    mean, variance = _patches(x)
    mean_target, variance_target = _patches(target)
    ratio = (variance + (mean - mean_target).square()) / variance_target
    return (variance_target.log() - variance.log() + ratio - 1).abs().sum()


def _patches(x: Tensor) -> tuple[Tensor, Tensor]:
    """(means, guarded variances) of the whole patches, a smaller picture being one patch."""
    side = min(PATCH, *x.shape[-2:])
    columns = functional.unfold(x.transpose(0, 1), side, stride=side)  # (C, side * side, patches)
    return columns.mean(1), columns.var(1, unbiased=False) + FLOOR


def correlation(x: Tensor, shift: float) -> Tensor:
    """Sum over scales, channels and both axes of the squared mean product of x with itself, shifted by a share of the side."""
    total = x.new_zeros(())
    while True:
        for axis in (-2, -1):
            by = max(1, round(shift * x.shape[axis]))
            total = total + (x * x.roll(by, axis)).mean((-2, -1)).square().sum()
        if min(x.shape[-2:]) <= COARSEST:
            return total
        x = functional.avg_pool2d(x, 2)


def _shift(size: torch.Size, generator: torch.Generator) -> float:
    """A share of the side in (0, 1/2]: whole pixels, never none."""
    pixels = int(torch.randint(1, max(2, min(size) // 2 + 1), (), generator=generator))
    return pixels / min(size)
