"""How far two sets of pictures are apart as distributions: the kernel distance of KID, in features of any kind."""

from __future__ import annotations

import torch
from torch import Tensor

from easyinv_edit.errors import InputError


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel (x . y / d + 1)^3: KID (Binkowski et al., arXiv 1801.01401).

    a, b: features (N, d) and (M, d), at least two rows each, computed in float64. 0 is expected where both come from one
    distribution, so that it can be slightly negative. One estimate over all rows, where the paper averages over subsets.
    Raises InputError for features of different widths or too few rows.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(
            f"kernel_distance: features of shape {tuple(a.shape)} and {tuple(b.shape)}; give (N, d) and (M, d) with N, M >= 2"
        )
    x, y = a.double(), b.double()
    return _off_diagonal(_kernel(x, x)) + _off_diagonal(_kernel(y, y)) - 2 * _kernel(x, y).mean().item()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal(kernel: Tensor) -> float:
    """Mean over pairs of different rows."""
    n = len(kernel)
    return ((kernel.sum() - torch.trace(kernel)) / (n * (n - 1))).item()
