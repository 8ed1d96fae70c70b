"""Everything a UNet is conditioned on, as one thing that travels together. Knows nothing of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Text conditioning of some rows.

    embeddings: (rows, tokens, dim); pooled: (rows, dim) and time_ids: (rows, n) for models that have them (SDXL), else None.
    """

    embeddings: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many rows are conditioned."""
        return self.embeddings.shape[0]

    def select(self, rows: Sequence[int]) -> Conditioning:
        """The given rows, in the given order; a row may be repeated."""
        index = list(rows)
        return replace(self, **{name: part[index] for name, part in self._parts().items()})

    def toward(self, other: Conditioning, share: float) -> Conditioning:
        """The linear blend of both, row by row: 0 is this one, 1 the other, both bit for bit."""
        if share in (0, 1):
            return other if share else self
        theirs = other._parts()
        return replace(self, **{name: torch.lerp(part, theirs[name], share) for name, part in self._parts().items()})

    def equals(self, other: Conditioning) -> bool:
        """Whether both condition the network identically, bit for bit."""
        mine, theirs = self._parts(), other._parts()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def _parts(self) -> dict[str, Tensor]:
        """The tensors that are there, by field."""
        return {name: part for name, part in vars(self).items() if part is not None}


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of all parts, in order. Raises ValueError where some parts have pooled embeddings and others have none."""
    tensors = [part._parts() for part in parts]
    if any(other.keys() != tensors[0].keys() for other in tensors):
        raise ValueError("concatenate: all conditionings must come from the same model family")
    return Conditioning(**{name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})
