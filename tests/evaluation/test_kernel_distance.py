"""The kernel distance: the definition written out, nothing between equal distributions, much between different ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from easyinv_edit.errors import InputError
from easyinv_edit.evaluation.kernel_distance import features, kernel_distance
from easyinv_edit.tabletop.judge import Judge


def normal(count: int, seed: int, mean: float = 0.0) -> Tensor:
    return mean + torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(x: Tensor, y: Tensor) -> float:
    """Sums over pairs, as the paper's equation 4 has them."""

    def k(a: Tensor, b: Tensor) -> float:
        return (float((a * b).sum()) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    own = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return own + other - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 7)])
def test_it_is_the_definition(n: int, m: int) -> None:
    x, y = normal(n, 0), normal(m, 1, 0.5)
    assert kernel_distance(x, y, 1).value == pytest.approx(written_out(x, y), rel=1e-12)


def test_blocks_are_averaged_with_their_error() -> None:
    x, y = normal(6, 0), normal(6, 1)
    found = kernel_distance(x, y, 2)
    parts = [written_out(x[:3], y[:3]), written_out(x[3:], y[3:])]
    assert found.value == pytest.approx(sum(parts) / 2, rel=1e-12)
    assert found.error == pytest.approx(abs(parts[0] - parts[1]) / 2, rel=1e-12)
    assert math.isnan(kernel_distance(x, y, 1).error)


def test_equal_distributions_are_at_no_distance_and_others_are() -> None:
    same, other = kernel_distance(normal(1000, 0), normal(1000, 1)), kernel_distance(normal(1000, 0), normal(1000, 1, 0.3))
    assert abs(same.value) < 3 * same.error
    assert other.value > 10 * other.error


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="3 and 20 pictures are too few for 2 blocks; give at least 4"):
        kernel_distance(normal(3, 0), normal(20, 1), 2)


def test_features_are_what_the_heads_read() -> None:
    torch.manual_seed(0)
    judge = Judge().eval()
    pictures = torch.rand(3, 3, 128, 128)
    found = features(judge, pictures)
    assert found.shape == (3, 128)
    with torch.no_grad():
        assert torch.equal(judge.heads["shape"](found.float()), judge(pictures)["shape"])
