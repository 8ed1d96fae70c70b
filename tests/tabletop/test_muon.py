"""Muon: what its updates are, and that they are those of torch's own where torch has one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from easyinv_edit.tabletop.muon import RMS, Muon, orthogonalised


@pytest.mark.parametrize("shape", [(3, 24, 96), (3, 96, 24), (1, 32, 32)])
def test_every_matrix_becomes_nearly_orthogonal_and_keeps_its_directions(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalised(matrices)
    assert (found.shape, found.dtype) == (matrices.shape, matrices.dtype)
    singular = (left.mT @ found @ right.mT).diagonal(dim1=-2, dim2=-1)
    assert singular.min() > 0.3
    assert singular.max() < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.97


def weight_after(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int = 5) -> torch.Tensor:
    """The weight after steps on gradients that depend on it."""
    for step in range(steps):
        drift = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        weight.grad = drift + 0.1 * weight.detach()
        optimizer.step()
    return weight.detach()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own")
@pytest.mark.parametrize("shape", [(20, 48), (48, 20)])
def test_a_matrix_moves_as_under_torchs_own(shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    moved = weight_after(ours, Muon([ours], lr=0.02, momentum=0.9, weight_decay=0.1))
    expected = weight_after(theirs, reference)
    assert (expected - start).norm() > 0.5
    torch.testing.assert_close(moved, expected, atol=2e-3, rtol=0)


def test_a_convolution_moves_as_its_flattened_matrix() -> None:
    start = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    kernel = nn.Parameter(start.clone(memory_format=torch.channels_last))
    matrix = nn.Parameter(start.flatten(1).clone())
    optimizers = Muon([kernel]), Muon([matrix])
    for step in range(3):
        gradient = torch.randn(start.shape, generator=torch.Generator().manual_seed(step))
        kernel.grad, matrix.grad = gradient, gradient.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kernel.detach().flatten(1), matrix.detach())
    assert not torch.equal(kernel.detach(), start)


def test_an_update_has_the_size_it_is_asked_for_whatever_the_gradients() -> None:
    weight = nn.Parameter(torch.zeros(32, 128))
    weight.grad = 1e-6 * torch.randn(32, 128, generator=torch.Generator().manual_seed(2))
    Muon([weight], lr=0.5).step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.5 * RMS, rel=0.2)


def test_a_weight_without_a_gradient_stays() -> None:
    moved, idle = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(4, 8))
    moved.grad = torch.eye(4, 8)
    Muon([moved, idle]).step()
    assert torch.equal(idle.detach(), torch.ones(4, 8))
    assert not torch.equal(moved.detach(), idle.detach())
