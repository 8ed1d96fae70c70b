"""How far two pictures are apart, pixel by pixel. Float64 throughout: subtracting uint8 arrays wraps around and flatters.

Every metric takes a mask in one of two forms, and tables must say which:

- "masked_mean": only pixels inside the mask count. SSIM averages over the windows whose centre is inside.
- "compat": both pictures are black outside the mask and are scored over their full area, as PIE-Bench (Ju et al., arXiv
  2310.01506) does. The black part counts as perfect, so this flatters: a mask over half of the picture gives 3 dB.

A picture whose mask has no pixel inside is left out of its batch; nan where none is left.
"""

from __future__ import annotations

import math
import statistics
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional

from easyinv_edit.errors import InputError

MaskForm: TypeAlias = Literal["compat", "masked_mean"]

WINDOW, SIGMA = 11, 1.5
"""Side and deviation of SSIM's Gaussian window, pixels."""
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM's scales, finest first (Wang et al. 2003)."""


def mse(a: Tensor, b: Tensor, mask: Tensor | None = None, form: MaskForm = "masked_mean") -> float:
    """Mean squared error of pictures (..., H, W) in [0, 1]; a batch gives one number.

    mask: broadcastable, pixels count where it is above 0.5; form: how it counts, see this module's text. Raises InputError for
    pictures of different shapes, a mask that does not fit them or an unknown form; so do the other metrics.
    """
    x, y, inside = _prepared(a, b, mask, form)
    return _mean((x - y).square(), inside)


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None, form: MaskForm = "masked_mean") -> float:
    """Peak signal-to-noise ratio in dB of pictures (..., H, W) in [0, 1]; inf where they are equal. mask, form: as in `mse`."""
    error = mse(a, b, mask, form)
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Tensor, b: Tensor, mask: Tensor | None = None, form: MaskForm = "masked_mean") -> float:
    """Structural similarity (Wang et al. 2004) of pictures (B, C, H, W) in [0, 1], sides of 11 pixels or more.

    11 x 11 Gaussian windows of sigma 1.5 that lie wholly in the picture; 1 where pictures are equal. mask, form: as in `mse`.
    """
    x, y, inside = _prepared(a, b, mask, form)
    _check_sides(x, WINDOW, "ssim")
    return _mean(_similarity(x, y)[0], _centres(inside))


def ms_ssim(a: Tensor, b: Tensor, mask: Tensor | None = None, form: MaskForm = "masked_mean") -> float:
    """Multi-scale structural similarity (Wang et al. 2003) of pictures (B, C, H, W) in [0, 1], sides of 176 pixels or more.

    Contrast and structure at five scales, each half as fine as the one before, luminance at the coarsest only; a negative mean
    counts as 0. A batch gives the mean of its pictures. mask, form: as in `mse`; a coarse pixel is inside where more than half
    of its pixels are.
    """
    x, y, inside = _prepared(a, b, mask, form)
    _check_sides(x, WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1), "ms_ssim")
    scores = [_over_scales(x[i], y[i], None if inside is None else inside[i].double()) for i in range(len(x))]
    return statistics.fmean(scores) if scores else math.nan


def black_outside(pictures: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, C, H, W), black where the mask (B or 1, 1, H, W) is not above 0.5; and (B,) where a mask has nothing inside.

    The "compat" form for metrics that look at whole pictures. Raises InputError where the mask does not fit.
    """
    inside = _fitted(mask, pictures).to(pictures.device)
    return pictures * inside, ~inside.flatten(1).any(1).cpu()


def check_pictures(*pictures: Tensor) -> None:
    """That all are RGB pictures of one shape (B, 3, H, W) in [0, 1]. Raises InputError."""
    shapes = [tuple(each.shape) for each in pictures]
    if len(set(shapes)) > 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
        raise InputError(f"pictures of shape {' and '.join(map(str, shapes))}; give (B, 3, H, W), all of one shape")
    for each in pictures:
        low, high = each.min().item(), each.max().item()
        if not 0 <= low <= high <= 1:
            raise InputError(f"pictures with values from {low:g} to {high:g}; give values in [0, 1]")


def _prepared(a: Tensor, b: Tensor, mask: Tensor | None, form: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both pictures in float64 on the CPU, and where their values count (None: everywhere)."""
    if a.shape != b.shape:
        raise InputError(f"pictures of shape {tuple(a.shape)} and {tuple(b.shape)}; give two of one shape")
    if form not in get_args(MaskForm):
        raise InputError(f"mask form {form!r} is unknown; choose {' or '.join(get_args(MaskForm))}")
    x, y = a.cpu().double(), b.cpu().double()
    if mask is None:
        return x, y, None
    inside = _fitted(mask, x)
    some = inside.flatten(1).any(1) if x.ndim == 4 else inside.any().expand(len(x))
    x, y, inside = x[some], y[some], inside[some]
    return (x * inside, y * inside, None) if form == "compat" else (x, y, inside)


def _fitted(mask: Tensor, pictures: Tensor) -> Tensor:
    """Where a mask is above 0.5, in the shape of the pictures."""
    try:
        return (mask.cpu() > 0.5).expand(pictures.shape)
    except RuntimeError as error:
        shapes = f"a mask of shape {tuple(mask.shape)} for pictures of {tuple(pictures.shape)}"
        raise InputError(f"{shapes}; give one of their height and width") from error


def _check_sides(pictures: Tensor, least: int, what: str) -> None:
    if pictures.ndim != 4 or min(pictures.shape[-2:]) < least:
        given = tuple(pictures.shape)
        raise InputError(f"{what}: pictures of shape {given}; give (B, C, H, W) with sides of at least {least} pixels")


def _mean(values: Tensor, inside: Tensor | None) -> float:
    """The mean of the values that count; nan where none does."""
    return (values if inside is None else values[inside]).mean().item()


def _centres(inside: Tensor | None) -> Tensor | None:
    """Which windows have their centre inside: (..., H, W) -> (..., H - 10, W - 10)."""
    edge = WINDOW // 2
    return None if inside is None else inside[..., edge:-edge, edge:-edge]


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM of every window of (B, C, H, W), and its contrast and structure alone."""
    mx, my = _blur(x), _blur(y)
    vx, vy, vxy = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    contrast = (2 * vxy + c2) / (vx + vy + c2)
    return (2 * mx * my + c1) / (mx * mx + my * my + c1) * contrast, contrast


def _blur(x: Tensor) -> Tensor:
    """Gaussian means of all windows: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    axis = torch.arange(WINDOW, dtype=x.dtype) - WINDOW // 2
    line = torch.exp(-(axis**2) / (2 * SIGMA**2))
    kernel = (line / line.sum()).expand(x.shape[1], 1, WINDOW)
    rows = functional.conv2d(x, kernel[..., None, :], groups=x.shape[1])
    return functional.conv2d(rows, kernel[..., None], groups=x.shape[1])


def _over_scales(x: Tensor, y: Tensor, share: Tensor | None) -> float:
    """MS-SSIM of one picture (C, H, W); share: how much of each pixel is inside."""
    product = 1.0
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            x, y = functional.avg_pool2d(x, 2), functional.avg_pool2d(y, 2)
            share = None if share is None else functional.avg_pool2d(share, 2)
        similarity, contrast = (values[0] for values in _similarity(x[None], y[None]))
        values = similarity if scale == len(SCALE_WEIGHTS) - 1 else contrast
        mean = _mean(values, None if share is None else _centres(share > 0.5))
        product *= max(mean, 0.0) ** weight  # in this order, max keeps a nan
    return product
