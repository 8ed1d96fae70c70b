"""Masks of routes: which part of the source may be read, and where in the target a route acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from attention_control.cross_maps import CrossMaps


class RouteMask(Protocol):
    """Foreground of the source and of each target, at any size."""

    @property
    def maps(self) -> bool:
        """Whether it is made of cross-attention maps."""

    def source(self, size: tuple[int, int], maps: CrossMaps) -> Tensor | None:
        """The source's foreground (h, w) in [0, 1]; None where nothing is known of it (yet)."""

    def target(self, index: int, size: tuple[int, int], maps: CrossMaps) -> Tensor | None:
        """A target's foreground."""


@dataclass(frozen=True, eq=False)
class GivenMask:
    """The user's masks, tensors (h, w) in [0, 1] with soft edges kept, or None."""

    of_source: Tensor | None
    of_target: Tensor | None
    maps: bool = False

    def source(self, size: tuple[int, int], maps: CrossMaps) -> Tensor | None:
        """The given mask at that size."""
        return None if self.of_source is None else resized(self.of_source, size)

    def target(self, index: int, size: tuple[int, int], maps: CrossMaps) -> Tensor | None:
        """The same mask for every target."""
        return None if self.of_target is None else resized(self.of_target, size)


@dataclass(frozen=True)
class WordMask:
    """Masks by words: where cross-attention to the words, scaled to [0, 1], reaches a threshold.

    source_tokens: positions in the source's prompt, empty for no mask; target_tokens: the same per target.
    """

    source_tokens: tuple[int, ...]
    target_tokens: tuple[tuple[int, ...], ...]
    threshold: float
    maps: bool = True

    def source(self, size: tuple[int, int], maps: CrossMaps) -> Tensor | None:
        """What the source's words point at, so far."""
        return self._mask(maps.of("source", 0), self.source_tokens, size)

    def target(self, index: int, size: tuple[int, int], maps: CrossMaps) -> Tensor | None:
        """What the target's words point at, so far."""
        return self._mask(maps.of("target", index), self.target_tokens[index], size)

    def _mask(self, attended: Tensor | None, tokens: tuple[int, ...], size: tuple[int, int]) -> Tensor | None:
        if attended is None or not tokens:
            return None
        attention = attended[list(tokens)].sum(0)
        low, high = attention.min(), attention.max()
        scaled = (attention - low) / (high - low).clamp_min(1e-12)
        return (resized(scaled, size) >= self.threshold).float()


def resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask (h, w) at another size: averaged where it shrinks, linear where it grows."""
    if tuple(mask.shape) == size:
        return mask
    smaller = min(mask.shape[0], size[0]), min(mask.shape[1], size[1])
    pooled = functional.adaptive_avg_pool2d(mask[None, None], smaller)
    if smaller == size:
        return pooled[0, 0]
    return functional.interpolate(pooled, size=size, mode="bilinear", align_corners=False)[0, 0]


def readable(masks: Tensor) -> Tensor:
    """Masks (rows, tokens), those with nothing in them replaced by all: attention needs a key to read."""
    return torch.where((masks > 0.05).any(-1, keepdim=True), masks, torch.ones_like(masks))
