"""What an inversion method is, and the loop up the levels that first-order methods share."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import EasyInvWarning
from easyinv_edit.schedule import require_finite
from easyinv_edit.trajectory import Trajectory

OnLevel = Callable[[int, Tensor], None]
"""Told (level, its latents) after each level; for progress, callbacks and cancelling by an exception."""


@runtime_checkable
class InversionMethod(Protocol):
    """A frozen dataclass whose fields are its settings and its YAML keys; run state is local to `invert`."""

    name: ClassVar[str]
    paper: ClassVar[str]

    def invert(self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None) -> Trajectory:
        """Clean latents z0 (rows, C, H, W) -> their trajectory."""

    def evaluations(self, num_inference_steps: int) -> int:
        """UNet evaluations per row for T steps at guidance 1; a guided row costs twice that."""


def climb(
    method: InversionMethod, denoiser: Denoiser, z0: Tensor, step: Callable[[Tensor, int], Tensor], on_level: OnLevel | None
) -> Trajectory:
    """Go from level 0 to T with `step(latents of level - 1, level) -> latents of level` and keep every level.

    Warns above guidance 1, where inversion amplifies its own error; raises NonFiniteError at the first bad level.
    """
    if max(denoiser.guidance) > 1:
        warnings.warn(
            f"{method.name}: inverting at guidance {max(denoiser.guidance):g} amplifies the inversion's error; "
            "1 is the value to invert at, whatever the edit uses",
            EasyInvWarning,
            stacklevel=2,
        )
    levels = [z0]
    for level in range(1, len(denoiser.schedule) + 1):
        levels.append(require_finite(step(levels[-1], level), method.name, level))
        if on_level is not None:
            on_level(level, levels[-1])
    return Trajectory(
        latents=torch.stack(levels),
        schedule=denoiser.schedule,
        method=method.name,
        settings=settings_of(method),
        guidance_scale=denoiser.guidance[0],
    )


def settings_of(method: InversionMethod) -> dict[str, Any]:
    """The fields of a method, JSON-able."""
    return dataclasses.asdict(method)  # type: ignore[call-overload]
