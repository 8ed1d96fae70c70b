"""Cross-attention maps of a run: how much each place looks at each text token, per source and target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention_control.sites import AttentionSite
from attention_control.streams import Role

FEWEST_TOKENS = 200
"""Maps are taken from the coarsest sites with at least so many places, where there are several: 16 x 16 for SD at 512 pixels,
as the papers do."""


Stream = tuple[Role, int]


@dataclass
class CrossMaps:
    """Means over heads, sites and steps so far, float32, (text tokens, h, w) at one size. Conditional rows only."""

    size: tuple[int, int]
    _sums: dict[Stream, Tensor] = field(default_factory=dict)
    _counts: dict[Stream, Tensor] = field(default_factory=dict)
    _new: dict[Stream, Tensor] = field(default_factory=dict)
    _added: dict[Stream, int] = field(default_factory=dict)

    def add(self, role: Role, index: int, probabilities: Tensor) -> None:
        """Probabilities (heads, places, text tokens) of one site and row."""
        mean = probabilities.detach().float().mean(0).transpose(0, 1).reshape(-1, *self.size)
        key = (role, index)
        self._new[key] = self._new[key] + mean if key in self._new else mean
        self._added[key] = self._added.get(key, 0) + 1

    def of(self, role: Role, index: int) -> Tensor | None:
        """The map of a stream (text tokens, h, w), or None before anything was seen of it."""
        key = (role, index)
        sums = [kept[key] for kept in (self._sums, self._new) if key in kept]
        return sum(sums[1:], start=sums[0]) / (self._counts.get(key, 0) + self._added.get(key, 0)) if sums else None

    def fold(self) -> None:
        """Take what a UNet call added into the sums. Inside a call nothing may depend on how many came before, or a compiled
        one would be compiled again at every step."""
        for key, new in self._new.items():
            self._sums[key] = self._sums[key] + new if key in self._sums else new
            self._counts[key] = self._counts.get(key, torch.tensor(0)) + self._added[key]
        self._new, self._added = {}, {}


def map_sites(sites: Sequence[AttentionSite], latent_size: tuple[int, int]) -> tuple[list[AttentionSite], tuple[int, int]]:
    """The cross-attention sites to take maps from, and the maps' (height, width)."""
    scales = [site.downscale for site in sites]
    fine = [site.downscale for site in sites if site.tokens(latent_size) >= FEWEST_TOKENS]
    several = [scale for scale in fine if scales.count(scale) > 1]
    chosen = max(several or fine or [min(scales, default=1)])
    size = math.ceil(latent_size[0] / chosen), math.ceil(latent_size[1] / chosen)
    return [site for site in sites if site.downscale == chosen], size


def probabilities(query: Tensor, key: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention written out, float32 or better: query, key (rows, tokens, heads, dim) -> (rows, heads, tokens, key tokens)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = torch.einsum("bnhd,bmhd->bhnm", query.to(dtype), key.to(dtype)) / math.sqrt(query.shape[-1])
    return torch.softmax(logits if bias is None else logits + bias.to(logits), -1)
