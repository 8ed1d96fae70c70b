"""Muon (Jordan et al. 2024): momentum whose every matrix is replaced by the nearest orthogonal one.

torch's own, from 2.9 on, takes matrices only; this one takes convolutions too and runs on every torch the project supports.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from easyinv_edit.tabletop.precision import working

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration; they trade exactness (most singular values end between .7 and 1.2) for speed."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an update at learning rate 1, which is about AdamW's (Liu et al., arXiv 2502.16982, section 2.2)."""


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U V^T of every matrix U S V^T in (N, rows, columns), by Newton-Schulz iteration, in bfloat16 where that is fast."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(working(matrices.device))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """For weights of two or more dimensions, each flattened to (outputs, everything else), with Nesterov's momentum.

    lr: an update's root mean square is `RMS` times this, whatever the gradients'; weight_decay: as AdamW's, times lr.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[weight.flatten(1).shape].append(weight)
            for shape, weights in alike.items():
                self._update(weights, shape, group)

    def _update(self, weights: list[Tensor], shape: torch.Size, group: dict[str, Any]) -> None:
        """Weights of one flattened shape, all at once."""
        momentum = group["momentum"]
        gradients = torch.stack([weight.grad.flatten(1) for weight in weights if weight.grad is not None])
        velocity = torch.stack([self._velocity(weight) for weight in weights]).lerp_(gradients, 1 - momentum)
        updates = orthogonalised(gradients.lerp_(velocity, momentum)) * (RMS * max(shape) ** 0.5)
        for weight, speed, update in zip(weights, velocity, updates, strict=True):
            self.state[weight]["velocity"] = speed
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update.reshape(weight.shape), alpha=-group["lr"])

    def _velocity(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        return state["velocity"] if state else torch.zeros_like(weight).flatten(1)
