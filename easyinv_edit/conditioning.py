"""Everything a UNet is conditioned on, as one thing that travels together. Knows nothing of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyinv_edit.errors import InputError

TEXT = ("embeddings", "pooled")
"""The parts that say what a prompt says."""
IMAGE = "image."
"""Under this name and a number, the parts of IP-Adapters."""


@dataclass(frozen=True)
class Framing:
    """How a picture came to its size, which SDXL is told: all (height, width) or (top, left) in pixels.

    original: of the user's picture; crop: where the model's picture begins in it, once it is scaled; target: the model's.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class Conditioning:
    """What some rows of a UNet batch are conditioned on.

    embeddings: (rows, tokens, dim); for models that have them, else None: pooled (rows, dim) and time_ids (rows, n) of SDXL;
    images: per IP-Adapter (rows, pictures, ...); hints: ControlNet's pictures (rows, nets, 3, H, W) in [0, 1] with hint_scales
    (rows, nets), 0 for a row that has none; guidance: (rows,) of a distilled model that takes its scale as an input.
    """

    embeddings: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    images: tuple[Tensor, ...] = ()
    hints: Tensor | None = None
    hint_scales: Tensor | None = None
    guidance: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows are conditioned."""
        return self.embeddings.shape[0]

    def select(self, rows: Sequence[int]) -> Conditioning:
        """The given rows, in the given order; a row may be repeated."""
        index = list(rows)
        return _from_parts({name: part[index] for name, part in self.parts().items()})

    def toward(self, other: Conditioning, share: float) -> Conditioning:
        """The linear blend of both texts, row by row: 0 is this one, 1 the other's, both bit for bit; the rest is this
        one's."""
        mine, theirs = self.parts(), other.parts()
        return self.having({name: _blend(mine[name], theirs[name], share) for name in TEXT if name in mine})

    def having(self, parts: Mapping[str, Tensor]) -> Conditioning:
        """The same with some parts, named as in `parts`, added or replaced."""
        return _from_parts({**self.parts(), **parts})

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        """The same on a device and in a dtype."""
        return _from_parts({name: part.to(device, dtype) for name, part in self.parts().items()})

    def equals(self, other: Conditioning) -> bool:
        """Whether both condition the network identically, bit for bit."""
        mine, theirs = self.parts(), other.parts()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def parts(self) -> dict[str, Tensor]:
        """The tensors that are there, by field; those of `images` as "image.0", "image.1", ..."""
        single = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        return single | {f"{IMAGE}{i}": part for i, part in enumerate(self.images)}


def _from_parts(parts: Mapping[str, Tensor]) -> Conditioning:
    images = sorted((int(name.removeprefix(IMAGE)), part) for name, part in parts.items() if name.startswith(IMAGE))
    single: dict[str, Any] = {name: part for name, part in parts.items() if not name.startswith(IMAGE)}
    return Conditioning(**single, images=tuple(part for _, part in images))


def _blend(mine: Tensor, theirs: Tensor, share: float) -> Tensor:
    if share in (0, 1):
        return theirs if share else mine
    return torch.lerp(mine, theirs, share)


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of all, in order. Raises InputError where some have parts that others lack, or texts of different lengths."""
    tensors = [part.parts() for part in parts]
    if any(other.keys() != tensors[0].keys() for other in tensors):
        raise InputError("concatenate: all conditionings must come from the same model family")
    lengths = {part.embeddings.shape[1:] for part in parts}
    if len(lengths) > 1:
        shapes = " and ".join(sorted("x".join(map(str, shape)) for shape in lengths))
        raise InputError(f"prompt embeddings of {shapes} cannot be used together; pad them to the same number of tokens")
    return _from_parts({name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})
