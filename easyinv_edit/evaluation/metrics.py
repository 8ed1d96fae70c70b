"""How far two pictures are apart. Float64 throughout: subtracting uint8 arrays wraps around and flatters bad pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB of pictures (..., H, W) in [0, 1]; inf where they are equal.

    mask: broadcastable, pixels count where it is above 0.5; nan where it is empty.
    """
    error = (a.cpu().double() - b.cpu().double()).square()
    if mask is not None:
        inside = (mask.cpu() > 0.5).expand_as(error)
        error = error[inside]
        if error.numel() == 0:
            return math.nan
    mean = error.mean().item()
    return math.inf if mean == 0 else -10 * math.log10(mean)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of pictures (B, C, H, W) in [0, 1]: 11 x 11 Gaussian, sigma 1.5, valid area."""
    axis = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(axis**2) / (2 * 1.5**2))
    window = torch.outer(line, line)
    window = (window / window.sum()).expand(a.shape[1], 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, window, groups=x.shape[1])

    x, y = a.cpu().double(), b.cpu().double()
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean().item()
