"""Everything a UNet is conditioned on, as one thing that travels together. Knows nothing of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

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
        return int(self.embeddings.shape[0])

    def select(self, rows: Sequence[int]) -> Conditioning:
        """The given rows, in the given order; a row may be repeated."""
        index = list(rows)
        return Conditioning(*(None if part is None else part[index] for part in self._parts()))

    def equals(self, other: Conditioning) -> bool:
        """Whether both condition the network identically, bit for bit."""
        return all(_same(a, b) for a, b in zip(self._parts(), other._parts(), strict=True))

    def _parts(self) -> list[Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """The rows of all parts, in order. Raises ValueError where some parts have pooled embeddings and others have none."""
    columns = list(zip(*(part._parts() for part in parts), strict=True))
    joined = []
    for column in columns:
        present = [p for p in column if p is not None]
        if present and len(present) != len(column):
            raise ValueError("concatenate: all conditionings must come from the same model family")
        joined.append(torch.cat(present) if present else None)
    return Conditioning(*joined)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return bool(torch.equal(a, b))
