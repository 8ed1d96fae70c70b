"""The kernel distance: closed form, unbiasedness, and agreement with an independent estimator."""

from __future__ import annotations

import statistics

import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from easyinv_edit.errors import InputError
from easyinv_edit.evaluation.kernel_distance import kernel_distance


def features(count: int, shift: float, seed: int) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_two_constant_sets_have_the_kernels_own_distance() -> None:
    """All rows equal u and v: k(u, u) + k(v, v) - 2 k(u, v)."""
    u, v = torch.ones(5, 4), torch.zeros(7, 4)
    assert kernel_distance(u, v) == pytest.approx(2**3 + 1 - 2)


def test_sets_of_one_distribution_are_at_distance_zero_on_average() -> None:
    values = [kernel_distance(features(40, 0, 2 * i), features(40, 0, 2 * i + 1)) for i in range(200)]
    error = statistics.stdev(values) / len(values) ** 0.5
    assert abs(statistics.fmean(values)) < 4 * error
    assert min(values) < 0 < kernel_distance(features(40, 0, 0), features(40, 0.5, 1))


def test_agrees_with_torchmetrics() -> None:
    x, y = features(30, 0, 0), features(30, 0.3, 1)
    kernels = [(a @ b.T / 8 + 1) ** 3 for a, b in ((x, x), (x, y), (y, y))]
    assert kernel_distance(x, y) == pytest.approx(poly_mmd(x, y, degree=3, gamma=None, coef=1.0).item())
    assert (
        kernel_distance(x, y)
        == kernel_distance(y, x)
        == pytest.approx(
            (kernels[0].sum() - kernels[0].trace() + kernels[2].sum() - kernels[2].trace()).item() / (30 * 29)
            - 2 * kernels[1].mean().item()
        )
    )


@pytest.mark.parametrize("shapes", [((1, 4), (5, 4)), ((5, 4), (5, 3)), ((5,), (5, 4))])
def test_features_that_cannot_be_compared_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="kernel_distance"):
        kernel_distance(*(torch.zeros(shape) for shape in shapes))
