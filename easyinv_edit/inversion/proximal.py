"""Proximal guidance: follow the guidance direction only where it is strong, and hold the rest to the inversion.

Han et al., "ProxEdit: Improving Tuning-Free Real Image Editing with Proximal Guidance", arXiv 2306.05414. For target rows the
direction d between the conditional and the unconditional prediction is thresholded at a quantile of |d| (eq. 8), hard ("l0":
small entries are dropped) or soft ("l1": all shrink by the threshold as well). Inversion guidance then draws the latent to the
inversion's own, at low noise and outside the entries that were kept, dilated.

Where this differs from the authors' code, and why: their "l0" first clamps, which already is the soft threshold, and their "l1"
shrinks twice; here both are what they are called. Their quantile is taken over the batch, source row included; here over each
target row. Their mask of what is edited is made after shrinking, so it starts at twice the threshold; here at the threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.inversion.base import SETTINGS, Generators, Guided, InversionMethod, OnLevel, by_name, settings_of
from easyinv_edit.sampling import Sampler
from easyinv_edit.trajectory import Trajectory

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=SETTINGS)
class Proximal(InversionMethod):
    """Proximal guidance (arXiv 2306.05414) on top of any inversion.

    base: the inversion, by default negative-prompt inversion (ProxNPI); norm: "l0" (hard) or "l1" (soft threshold); quantile:
    of |d| below which guidance is dropped, in [0, 1], 0 leaving it alone; inversion_guidance: how far the latent is drawn to
    the inversion's outside the edited entries, 0 turning that off, 1 putting it there; until: share of the levels, from the
    clean end, at which it is drawn; dilation: of the edited entries, in latent pixels.

    It acts while an edit is sampled, on target rows whose guidance scale is not 1; the inversion is the base's. It is made for
    edits that keep the layout: after a change of shape, traces of the source's outline stay where the latent is drawn to it,
    and `inversion_guidance: 0` avoids them. With a pair of latents (EDICT) only the first is drawn. Cost: the base's.
    """

    base: Guided = by_name("negative_prompt")
    norm: Literal["l0", "l1"] = "l0"
    quantile: Share = 0.7
    inversion_guidance: Share = 1.0
    until: Share = 0.4
    dilation: Annotated[int, Field(ge=0, le=64)] = 1

    name: ClassVar[str] = "proximal"
    paper: ClassVar[str] = "arXiv 2306.05414"

    @property
    def passes(self) -> int:  # type: ignore[override]
        """The base's."""
        return int(self.base.passes)

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W) by the base."""
        trajectory = self.base.invert(denoiser, z0, on_level, generator)
        return replace(trajectory, method=self.name, settings=settings_of(self))

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """The base's."""
        return int(self.base.evaluations(num_inference_steps, guided))

    def sampler(self, trajectory: Trajectory) -> Sampler:
        """The base's steps, with the targets' guidance thresholded and their latents drawn to the trajectory."""
        base: Sampler = self.base.sampler(trajectory)
        edited: dict[int, Tensor] = {}  # row -> entries the guidance of the step at hand kept

        def condition(denoiser: Denoiser, level: int) -> Denoiser:
            edited.clear()
            denoiser = base.condition(denoiser, level)
            rows, sources = range(denoiser.conditioning.rows), trajectory.latents.shape[1]
            return replace(denoiser, directions=tuple(None if r < sources else self._direction(edited, r) for r in rows))

        def after(level: int, z: Tensor) -> Tensor:
            z = z if base.after is None else base.after(level, z)
            if not self.inversion_guidance or level + 1 > self.until * len(trajectory.schedule):
                return z
            pivot, rows = trajectory.latents[level][0].to(z), list(z)
            for r, mask in edited.items():
                drawn = torch.lerp(rows[r], pivot, self.inversion_guidance)
                rows[r] = torch.where(_dilated(mask, self.dilation), rows[r], drawn)
            return torch.stack(rows)

        return replace(base, condition=condition, after=after)

    def _direction(self, edited: dict[int, Tensor], row: int) -> Callable[[Tensor], Tensor]:
        def threshold(direction: Tensor) -> Tensor:
            size = direction.abs()
            exact = size.to(torch.promote_types(size.dtype, torch.float32))  # torch.quantile knows no half precision
            limit = torch.quantile(exact.flatten(), self.quantile).to(size)
            edited[row] = size > limit if self.quantile else torch.ones_like(size, dtype=torch.bool)
            shrink = limit if self.norm == "l1" and self.quantile else 0.0
            return edited[row] * direction.sign() * (size - shrink)

        return threshold


def _dilated(mask: Tensor, radius: int) -> Tensor:
    return functional.max_pool2d(mask.float()[None], 2 * radius + 1, stride=1, padding=radius)[0] > 0
