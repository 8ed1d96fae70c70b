"""Fixed-point inversion: solve the sampler's step for its start instead of guessing it once.

Pan, Gherardi, Xie and Huang, "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion" (AIDI), arXiv
2309.04907. z_i is the fixed point of F(x) = renoise(z_{i-1}, output(x, t_i)); there the sampler's own step leads back to
z_{i-1} exactly. F contracts slowest at low noise and with few steps; guidance above 1 can make it expand.

No code of the paper is public. Anderson's scheme is its AIDI_A with memory 2 in the standard least-squares form; "empirical"
is its AIDI_E, x <- (F(x) + F(x_before)) / 2, which the EasyInv paper runs as its baseline. AIDI_E pays where F oscillates, and
is slower than no acceleration where it contracts steadily; Anderson is faster than both at the same cost.
"""

from __future__ import annotations

import warnings
from collections import deque
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import EasyInvWarning
from easyinv_edit.inversion.base import SETTINGS, Generators, InversionMethod, OnLevel, climb
from easyinv_edit.trajectory import Trajectory

MEMORY = 2  # of Anderson's scheme; more gains nothing measurable
NOTICEABLE = 1e-3  # residuals below are not warned of where the map expands,
UNITS = 4  # nor those below so many units of a half-precision network's rounding, whose last iterates go up and down by it,
FAR, ENOUGH = 0.1, 5  # nor those below this where it contracts but slowly, nor after fewer iterations
RIDGE = 1e-8  # relative; keeps the least-squares problem solvable where iterates coincide


@dataclass(frozen=True, config=SETTINGS)
class FixedPoint(InversionMethod):
    """Fixed-point iteration (arXiv 2309.04907).

    acceleration: "anderson" (AIDI_A), "empirical" (AIDI_E) or "none"; iterations: corrections after the first guess, which
    alone is DDIM inversion; tolerance: a level is done once |F(x) - x| / |x| is below it in every row, 0 doing all iterations.
    The trajectory keeps that residual per level and row as `extras["residuals"]` (T, rows): within about ten times the error
    of the round trip. Warns, naming levels, where the map does not contract; the best iterate is kept. Cost: 1 + iterations
    evaluations per level, fewer with a tolerance. Works with a half-precision UNet; its rounding then bounds the residual from
    below, and what it explains is not warned of.
    """

    acceleration: Literal["anderson", "empirical", "none"] = "anderson"
    iterations: Annotated[int, Field(ge=0, le=100)] = 5
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0

    name: ClassVar[str] = "fixed_point"
    paper: ClassVar[str] = "arXiv 2309.04907"

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W)."""
        residuals: list[Tensor] = []
        expanding: list[int] = []

        def step(z: Tensor, level: int) -> Tensor:
            x, residual, expands = self._solve(denoiser, z, level)
            residuals.append(residual)
            if expands:
                expanding.append(level)
            return x

        trajectory = climb(self, denoiser, z0, step, on_level)
        if expanding:
            _warn(expanding, max(denoiser.guidance), torch.stack(residuals).max().item())
        return replace(trajectory, extras={"residuals": torch.stack(residuals)})

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """1 + iterations per level, at most."""
        return num_inference_steps * (1 + self.iterations) * (1 + guided)

    def _solve(self, denoiser: Denoiser, z: Tensor, level: int) -> tuple[Tensor, Tensor, bool]:
        """(the best iterate, its residual per row, whether the map does not contract in some row)."""
        x, best = z, z
        least = last = torch.full((z.shape[0],), torch.inf, dtype=z.dtype, device=z.device)
        stuck = torch.zeros_like(last)
        ever_stuck = torch.zeros_like(last, dtype=torch.bool)
        pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=MEMORY + 1)
        for _ in range(1 + self.iterations):
            image = denoiser.schedule.renoise(z, denoiser(x, level), level)
            residual = _norm(image - x) / _norm(x).clamp_min(1e-12)
            best = torch.where(_rows((residual < least) | least.isinf()), image, best)  # what is not a number ends the climb
            least = torch.fmin(least, residual)
            if pairs:
                stuck = torch.where(_norm(image - pairs[-1][1]) > 0.99 * _norm(x - pairs[-1][0]), stuck + 1, 0.0)
                ever_stuck |= stuck >= 2
            if self.tolerance and bool((least < self.tolerance).all()):
                break
            pairs.append((x, image))
            proposal = torch.where(_rows(residual < last), self._next(pairs), image)  # a step that failed: back to plain
            proposal = torch.where(_rows(stuck >= 2), (x + image) / 2, proposal)
            x = torch.where(_rows(least < self.tolerance), x, proposal)
            last = residual
        slow = (least > FAR) & (self.iterations >= ENOUGH)
        return best, least, bool((slow | (ever_stuck & (least > _noticeable(denoiser.backbone.network)))).any())

    def _next(self, pairs: deque[tuple[Tensor, Tensor]]) -> Tensor:
        image = pairs[-1][1]
        if len(pairs) == 1 or self.acceleration == "none":
            return image
        if self.acceleration == "empirical":
            return (image + pairs[-2][1]) / 2
        return _anderson(pairs)


def _anderson(pairs: deque[tuple[Tensor, Tensor]]) -> Tensor:
    """F(x_n) - sum_j gamma_j (F(x_n) - F(x_{n-j})), gamma making the extrapolated residual least; per row, in float64."""
    images = torch.stack([image for _, image in pairs])
    off = torch.stack([(image - x) for x, image in pairs]).flatten(2).double()  # (pairs, rows, N)
    change = (off[-1:] - off[:-1]).movedim(0, -1)  # (rows, N, m)
    gram = change.mT @ change
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-300)
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    gamma = torch.linalg.solve(gram, change.mT @ off[-1].unsqueeze(-1))  # (rows, m, 1)
    weights = gamma.movedim(1, 0).to(images)[..., None, None]  # (m, rows, 1, 1, 1)
    proposal = images[-1] - (weights * (images[-1:] - images[:-1])).sum(0)
    return torch.where(proposal.isfinite(), proposal, images[-1])


def _noticeable(network: nn.Module) -> float:
    """The residual above which a map that expands is warned of: more than the network's own rounding makes."""
    halves = {p.dtype for p in network.parameters()} & {torch.float16, torch.bfloat16}  # others are stored, not computed in
    return max([NOTICEABLE, *(UNITS * torch.finfo(dtype).eps for dtype in halves)])


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _rows(flags: Tensor) -> Tensor:
    return flags[:, None, None, None]


def _warn(levels: list[int], guidance: float, residual: float) -> None:
    where = ", ".join(map(str, levels[:5])) + (" ..." if len(levels) > 5 else "")
    remedy = "invert at guidance 1" if guidance > 1 else "use more steps, or another method"
    warnings.warn(
        f"fixed_point: the iteration does not contract at level {where}, or too slowly (largest residual "
        f"{residual:.1e}), so the best iterate was kept; {remedy}",
        EasyInvWarning,
        stacklevel=3,
    )
