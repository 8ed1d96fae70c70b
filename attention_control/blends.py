"""Changes of the targets' latents after a step: where the source is put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attention_control.cross_maps import CrossMaps
from attention_control.masks import RouteMask, resized

TOUCHED = 0.01
"""Share of a latent's cell that makes it foreground: above the noise of a compressed mask."""


@dataclass(frozen=True)
class KeepBackground:
    """Outside the foreground of source and target together, the source's latents.

    A cell that either only touches is the target's altogether: mixed at every step, it would be pulled to the source's outline.
    """

    mask: RouteMask

    @property
    def maps(self) -> bool:
        """Whether the mask is made of cross-attention maps."""
        return self.mask.maps

    def __call__(self, step: int, source: Tensor, targets: Tensor, maps: CrossMaps) -> Tensor:
        """source (1, C, H, W), targets (n, C, H, W)."""
        size = source.shape[-2], source.shape[-1]
        rows = []
        for index, z in enumerate(targets):
            known = [m for m in (self.mask.source(size, maps), self.mask.target(index, size, maps)) if m is not None]
            if not known:
                rows.append(z)
                continue
            inside = torch.stack([m.to(z.device) for m in known]).amax(0) >= TOUCHED
            rows.append(torch.where(inside, z, source[0]))
        return torch.stack(rows)


@dataclass(frozen=True)
class LocalBlend:
    """Prompt-to-Prompt's local blend: outside what the words point at, in source or target, the source's latents.

    source_tokens, target_tokens: positions of the words, per target; threshold: of the maps scaled by their maximum, after a
    3 x 3 maximum; start: the first step after which it acts.
    """

    source_tokens: tuple[int, ...]
    target_tokens: tuple[tuple[int, ...], ...]
    threshold: float
    start: int
    maps: bool = True

    def __call__(self, step: int, source: Tensor, targets: Tensor, maps: CrossMaps) -> Tensor:
        """source (1, C, H, W), targets (n, C, H, W)."""
        if step < self.start:
            return targets
        size = source.shape[-2], source.shape[-1]
        theirs = self._mask(maps.of("source", 0), self.source_tokens, size)
        rows = []
        for index, z in enumerate(targets):
            mine = self._mask(maps.of("target", index), self.target_tokens[index], size)
            known = [m.to(source.device) for m in (theirs, mine) if m is not None]
            inside = torch.stack(known).amax(0).bool() if known else torch.ones(size, dtype=torch.bool, device=z.device)
            rows.append(torch.where(inside, z, source[0]))
        return torch.stack(rows)

    def _mask(self, attended: Tensor | None, tokens: tuple[int, ...], size: tuple[int, int]) -> Tensor | None:
        if attended is None or not tokens:
            return None
        attention = functional.max_pool2d(attended[list(tokens)].sum(0)[None], 3, stride=1, padding=1)[0]
        grown = resized(attention, size)
        return (grown / grown.max().clamp_min(1e-12) >= self.threshold).float()
