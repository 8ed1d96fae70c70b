"""Attention sites of a UNet, numbered in forward order, and ways to choose among them.

A site is one attention layer. MasaCtrl's "layer 10" is the tenth self-attention layer the forward pass meets: down blocks,
mid block, up blocks. diffusers' `unet.attn_processors` lists the mid block LAST, so its order is never used here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from attention_control.errors import ControlError

Kind = Literal["self", "cross"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer.

    index: its number among the sites of its kind, in forward order; kind: "self" or "cross"; path: the module's name inside
    the UNet; downscale: how much smaller its grid is than the latent, per side; module: the layer, a diffusers `Attention`.
    """

    index: int
    kind: Kind
    path: str
    downscale: int
    module: Any

    def grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the site for a latent of (height, width)."""
        height, width = (math.ceil(side / self.downscale) for side in latent_size)
        return height, width

    def tokens(self, latent_size: tuple[int, int]) -> int:
        """How many queries the site has for a latent of (height, width)."""
        height, width = self.grid(latent_size)
        return height * width


def list_sites(unet: nn.Module, kind: Kind = "self") -> list[AttentionSite]:
    """Every attention site of a diffusers UNet of that kind, in forward order; empty where the blocks have no attention."""
    suffix = "attn1" if kind == "self" else "attn2"
    sites: list[AttentionSite] = []
    for prefix, block, downscale in _blocks(unet):
        for name, module in block.named_modules():
            if name.split(".")[-1] == suffix and hasattr(module, "to_q"):
                sites.append(AttentionSite(len(sites), kind, f"{prefix}.{name}", downscale, module))
    return sites


def _blocks(unet: Any) -> Iterable[tuple[str, nn.Module, int]]:
    """(name, block, downscale of its attention) in forward order."""
    scale = 1
    for i, block in enumerate(unet.down_blocks):
        yield f"down_blocks.{i}", block, scale
        scale *= 2 if getattr(block, "downsamplers", None) else 1
    if getattr(unet, "mid_block", None) is not None:
        yield "mid_block", unet.mid_block, scale
    for i, block in enumerate(unet.up_blocks):
        yield f"up_blocks.{i}", block, scale
        scale //= 2 if getattr(block, "upsamplers", None) else 1


ALLOWED = (
    "a number '10', a range '10-15' or '10-', blocks 'up_blocks.2-3' or 'mid_block', a size 'tokens<=1024', any of these with "
    "'of N' for UNets of N sites alone, a strength 'strong', 'medium' or 'light', or several joined by ','"
)
STRENGTHS = {
    "strong": "10-15 of 16, 44-69 of 70",
    "medium": "12-15 of 16, 54-69 of 70",
    "light": "13-15 of 16, 64-69 of 70",
}
"""How much of the decoder is controlled, for UNets of Stable Diffusion 1.x and 2.x (16 sites) and XL (70). 10 is MasaCtrl's
first layer, 44, 54 and 64 are those its authors try on XL without a verdict; 12 and 13 follow them by position in the
decoder."""


def select_sites(sites: Sequence[AttentionSite], selector: str, latent_size: tuple[int, int]) -> list[AttentionSite]:
    """The sites that match any part of `selector`, in forward order.

    sites: all of a UNet's of one kind; selector: see `ALLOWED`; latent_size: (height, width) of the latent, for sizes in
    tokens. Raises ControlError where the selector cannot be read; an empty list where nothing matches.
    """
    parts = [match for match in _parts(selector) if match.of in (None, len(sites))]
    return [site for site in sites if any(match(site, latent_size) for match in parts)]


@dataclass(frozen=True)
class _Match:
    blocks: str | None = None
    first: int = 0
    last: float = math.inf
    tokens: int | None = None
    of: int | None = None

    def __call__(self, site: AttentionSite, latent_size: tuple[int, int]) -> bool:
        if self.tokens is not None:
            return site.tokens(latent_size) <= self.tokens
        if self.blocks is None:
            return self.first <= site.index <= self.last
        group, _, rest = site.path.partition(".")
        return group == self.blocks and (group == "mid_block" or self.first <= int(rest.split(".")[0]) <= self.last)


def check_selector(selector: str) -> str:
    """Return `selector`, or raise ControlError where it cannot be read."""
    _parts(selector)
    return selector


def _parts(selector: str) -> list[_Match]:
    named = [STRENGTHS.get(part.strip(), part) for part in selector.split(",")]
    return [_parse(part.strip()) for part in ",".join(named).split(",")]


def _parse(part: str) -> _Match:
    qualified = re.fullmatch(r"(\S+)\s+of\s+(\d+)", part)
    choice, of = (qualified[1], int(qualified[2])) if qualified else (part, None)
    if found := re.fullmatch(r"tokens<=(\d+)", choice):
        return _Match(tokens=int(found[1]), of=of)
    if found := re.fullmatch(r"(?:(up_blocks|down_blocks)\.)?(\d+)(-(\d*))?", choice):
        blocks, first, ranged, last = found.groups()
        end = int(first) if ranged is None else (math.inf if last == "" else int(last))
        if end >= int(first):
            return _Match(blocks=blocks, first=int(first), last=end, of=of)
    if choice in ("mid_block", "up_blocks", "down_blocks"):
        return _Match(blocks=choice, of=of)
    raise ControlError(f"sites: cannot read {part!r}; write {ALLOWED}")


def check_step(when: float | int) -> float | int:
    """Return `when`, or raise ControlError where it is neither a whole number of steps nor a share of all."""
    if type(when) is int and when >= 0:
        return when
    if type(when) is float and 0 <= when <= 1:
        return when
    raise ControlError(f"step {when!r}: write a whole number of steps, or a share of all steps between 0.0 and 1.0")


def resolve_step(when: float | int, num_steps: int) -> int:
    """A step from a whole number (an int) or a share of all steps (a float in [0, 1], rounded up): 0.08 of 50 is 4."""
    check_step(when)
    return when if isinstance(when, int) else math.ceil(round(when * num_steps, 9))
