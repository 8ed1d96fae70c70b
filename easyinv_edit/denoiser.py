"""The denoiser: one door between solvers and networks.

A solver asks for the model's output on its rows at a level and never sees prompts, guidance, batches or dtypes. Guidance is
per row; a row without guidance costs one evaluation, not two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from easyinv_edit.conditioning import Conditioning, Framing, concatenate
from easyinv_edit.schedule import NoiseSchedule

Half = Literal["unconditional", "conditional"]
Prompt = str | Conditioning
"""A text, or embeddings of one row in its place."""
Direction = Callable[[Tensor], Tensor]
"""Guidance direction of one row (C, H, W), conditional minus unconditional output -> the one to follow instead."""


class Backbone(Protocol):
    """A model behind a thin adapter. Latents are (rows, C, H, W), level 0 in the units the UNet was trained on."""

    @property
    def network(self) -> nn.Module:
        """The UNet: what attention control hooks into and what cost is counted on."""

    @property
    def family(self) -> str:
        """Short name of the model family ("sd"), by which methods choose their presets."""

    @property
    def device(self) -> torch.device:
        """Where tensors given to the model must live."""

    def predict(self, z: Tensor, timestep: int | Tensor, conditioning: Conditioning) -> Tensor:
        """Raw model output (rows, C, H, W) in the latents' dtype, whatever the network's; cost: one evaluation a row.

        timestep: one for all rows, or a tensor with one per row.
        """

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (rows, 3, H, W) in [-1, 1] -> clean latents, by the posterior's mode."""

    def decode(self, z: Tensor) -> Tensor:
        """Clean latents -> pixels in [-1, 1], float32."""

    def embed(self, prompts: Sequence[Prompt | None], framings: Sequence[Framing | None] | None = None) -> Conditioning:
        """One row of conditioning per prompt, None being the unconditional one; framings: how its picture came to its size."""

    def schedule(self, num_inference_steps: int) -> NoiseSchedule:
        """The model's noise schedule at that many steps."""


@dataclass(frozen=True)
class BatchRow:
    """One row of a UNet batch: which of the denoiser's rows it serves, and which half of its guidance."""

    row: int
    half: Half


@dataclass(frozen=True)
class Denoiser:
    """(latents, level) -> raw model output, classifier-free guidance included.

    conditioning: one row per latent row; negative: the same, what guidance moves away from (None: no row may be guided);
    guidance: a scale per row, `unconditional + scale * (conditional - unconditional)`, 1 being the plain conditional model;
    twins: which rows are also evaluated unconditionally. By default those whose scale is not 1; a controller may want more;
    directions: per row, what is done with its guidance direction before it is scaled, None leaving it alone.
    Cost of a call: one evaluation per row and one per twin.
    """

    backbone: Backbone
    schedule: NoiseSchedule
    conditioning: Conditioning
    guidance: tuple[float, ...]
    negative: Conditioning | None = None
    twins: tuple[bool, ...] | None = None
    directions: tuple[Direction | None, ...] | None = None

    def __post_init__(self) -> None:
        rows = self.conditioning.rows
        if len(self.guidance) != rows:
            raise ValueError(f"Denoiser: {len(self.guidance)} guidance scales for {rows} rows")
        if len(self.has_twin) != rows or any(s != 1 and not twin for s, twin in zip(self.guidance, self.has_twin, strict=True)):
            raise ValueError("Denoiser: `twins` needs one entry per row, true where the guidance scale is not 1")
        if self.negative is None and any(self.has_twin):
            raise ValueError("Denoiser: a guidance scale other than 1 needs a negative conditioning")
        if self.negative is not None and self.negative.rows != rows:
            raise ValueError(f"Denoiser: {self.negative.rows} negative conditionings for {rows} rows")
        if self.directions is not None and len(self.directions) != rows:
            raise ValueError(f"Denoiser: {len(self.directions)} directions for {rows} rows")

    @property
    def has_twin(self) -> tuple[bool, ...]:
        """Per row, whether an unconditional twin is evaluated with it."""
        return self.twins if self.twins is not None else tuple(scale != 1 for scale in self.guidance)

    @property
    def batch(self) -> tuple[BatchRow, ...]:
        """The rows of one UNet call in order: single rows first, then the unconditional twins, then their partners."""
        rows = range(len(self.guidance))
        twins = [r for r in rows if self.has_twin[r]]
        single = [BatchRow(r, "conditional") for r in rows if not self.has_twin[r]]
        return (*single, *(BatchRow(r, "unconditional") for r in twins), *(BatchRow(r, "conditional") for r in twins))

    def select(self, rows: Sequence[int]) -> Denoiser:
        """The same denoiser for some of its rows."""
        pick = tuple(self.guidance[r] for r in rows)
        twins = None if self.twins is None else tuple(self.twins[r] for r in rows)
        negative = None if self.negative is None else self.negative.select(rows)
        directions = None if self.directions is None else tuple(self.directions[r] for r in rows)
        conditioning = self.conditioning.select(rows)
        return replace(self, conditioning=conditioning, guidance=pick, negative=negative, twins=twins, directions=directions)

    def __call__(self, z: Tensor, level: int) -> Tensor:
        """Guided output (rows, C, H, W) for latents z (rows, C, H, W) of `level` (1 .. T)."""
        batch = self.batch
        index = [b.row for b in batch]
        out = self.backbone.predict(z[index], self.schedule.timesteps[level], self._conditioning(batch))
        place = {(b.row, b.half): i for i, b in enumerate(batch)}
        rows = range(len(self.guidance))
        conditional = out[[place[r, "conditional"] for r in rows]]
        guided = [r for r in rows if self.guidance[r] != 1]
        if not guided:
            return conditional
        scale = torch.tensor([self.guidance[r] for r in guided], dtype=z.dtype, device=z.device).reshape(-1, 1, 1, 1)
        unconditional = out[[place[r, "unconditional"] for r in guided]]
        result = conditional.clone()
        result[guided] = unconditional + scale * self._directed(conditional[guided] - unconditional, guided)
        return result

    def _directed(self, direction: Tensor, rows: Sequence[int]) -> Tensor:
        if self.directions is None:
            return direction
        own = [self.directions[r] for r in rows]
        return torch.stack([d if change is None else change(d) for d, change in zip(direction, own, strict=True)])

    def _conditioning(self, batch: Sequence[BatchRow]) -> Conditioning:
        if self.negative is None:
            return self.conditioning.select([b.row for b in batch])
        both = concatenate([self.conditioning, self.negative])
        offset = self.conditioning.rows
        return both.select([b.row if b.half == "conditional" else offset + b.row for b in batch])
