"""Kernel distance between two sets of pictures: whether samples look like renders, in the features of a classifier.

Binkowski, Sutherland, Arbel and Gretton, "Demystifying MMD GANs", arXiv 1801.01401: the squared maximum mean discrepancy under
the cubic kernel k(x, y) = (x . y / d + 1)^3, estimated without bias. Theirs is of Inception features; ours of the judge's, so
that no number of ours compares with a published one, only with another of ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from easyinv_edit.errors import InputError
from easyinv_edit.tabletop.judge import Judge

AT_ONCE = 250


@dataclass(frozen=True)
class KernelDistance:
    """value: the squared distance, about 0 for sets of one distribution and maybe slightly negative; error: its standard error
    over `blocks` disjoint parts of both sets."""

    value: float
    error: float
    blocks: int


def features(judge: Judge, pictures: Tensor) -> Tensor:
    """What the judge's heads read: (B, 128) float64 on the CPU, of pictures (B, 3, H, W) in [0, 1]."""
    device = next(judge.parameters()).device
    with torch.no_grad():
        return torch.cat([judge.features(part.to(device)).cpu().double() for part in torch.split(pictures, AT_ONCE)])


def kernel_distance(first: Tensor, second: Tensor, blocks: int = 10) -> KernelDistance:
    """Between features (n, d) and (m, d). Raises InputError where a block would hold fewer than two of either."""
    if min(len(first), len(second)) < 2 * blocks:
        raise InputError(f"{len(first)} and {len(second)} pictures are too few for {blocks} blocks; give at least {2 * blocks}")
    parts = zip(first.tensor_split(blocks), second.tensor_split(blocks), strict=True)
    values = torch.tensor([_unbiased(x, y) for x, y in parts], dtype=torch.float64)
    error = values.std().item() / math.sqrt(blocks) if blocks > 1 else math.nan
    return KernelDistance(values.mean().item(), error, blocks)


def _unbiased(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate: a picture is not compared with itself."""
    n, m = len(x), len(y)
    own = (_kernel(x, x).sum() - _kernel(x, x).diagonal().sum()) / (n * (n - 1))
    other = (_kernel(y, y).sum() - _kernel(y, y).diagonal().sum()) / (m * (m - 1))
    return float(own + other - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
