"""Attention written out, row by row, under a rule that each test writes from its paper. Nothing of our routes is used here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from attention_control import StreamRow, Streams
from tests.attention_control.reference import (
    SELF_PATHS,
    Outputs,
    Scene,
    evaluate,
    official_rows,
    single_source_rows,
    split_heads,
    unguided_rows,
)

EXACT = 1e-10
"""Of outputs of order 1, in float64: rounding and nothing else."""
CLEAR = 1e-4
"""A difference no rounding makes."""
DOWNSCALE = (1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1)
"""How much smaller the grid of each of SD 1.x's self-attention sites is than the latent."""
CASES = pytest.mark.parametrize(
    ("targets", "size"), [(1, (16, 16)), (3, (16, 24))], ids=["one target, square", "three, oblong"]
)
ROWS = pytest.mark.parametrize("rows", [official_rows, single_source_rows, unguided_rows], ids=["paired", "single", "unguided"])


@dataclass(frozen=True)
class Seen:
    """One self-attention site in one call: its number, its grid, and every row's (heads, tokens, channels per head)."""

    site: int
    size: tuple[int, int]
    query: dict[StreamRow, Tensor]
    key: dict[StreamRow, Tensor]
    value: dict[StreamRow, Tensor]

    def mate(self, row: StreamRow, source: int = 0) -> StreamRow:
        """The row of a source with this row's half of guidance; its only row where it has no such half."""
        rows = [other for other in self.query if other.role == "source" and other.index == source]
        return next((other for other in rows if other.half == row.half), rows[0])

    def plain(self, row: StreamRow) -> Tensor:
        """What a row sees alone."""
        return attention(self.query[row], self.key[row], self.value[row])


Rule = Callable[[Seen, StreamRow], Tensor]
"""What a row's attention gives at a site: (heads, tokens, channels per head)."""


def attention(query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None = None) -> Tensor:
    """Softmax attention, all (..., tokens, channels); weights (key tokens): how much each key counts, 1 where not given."""
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    counted = torch.ones(key.shape[-2]).to(logits) if weights is None else weights.to(logits)
    scores = torch.exp(logits - logits.amax(-1, keepdim=True)) * counted
    return (scores / scores.sum(-1, keepdim=True)) @ value


class Rewritten:
    """The processor of one site."""

    def __init__(self, site: int, size: tuple[int, int], streams: Streams, rule: Rule) -> None:
        self.site, self.streams, self.rule = site, streams, rule
        height, width = (-(-side // DOWNSCALE[site]) for side in size)
        self.size = height, width

    def __call__(self, attn: Any, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """hidden_states (rows, tokens, channels) -> the same shape."""
        parts = (split_heads(f(hidden_states), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        seen = Seen(self.site, self.size, *(dict(zip(self.streams.rows, part, strict=True)) for part in parts))
        assert next(iter(seen.query.values())).shape[1] == self.size[0] * self.size[1]
        out = torch.stack([self.rule(seen, row) for row in self.streams.rows])
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def evaluate_by(unet: UNet2DConditionModel, scene: Scene, streams: Streams, rule: Rule) -> Outputs:
    """One call of the UNet with every self-attention site under the rule."""
    own = dict(unet.attn_processors)
    for site, path in enumerate(SELF_PATHS):
        unet.get_submodule(path).set_processor(Rewritten(site, scene.size, streams, rule))
    try:
        return evaluate(unet, scene, streams)
    finally:
        unet.set_attn_processor(own)


def at(sites: Sequence[int], rule: Rule) -> Rule:
    """The rule at these sites for targets; plain attention elsewhere and for sources."""
    return lambda seen, row: rule(seen, row) if row.role == "target" and seen.site in sites else seen.plain(row)


def probabilities(attn: Any, hidden_states: Tensor, text: Tensor) -> Tensor:
    """Cross-attention maps (rows, heads, tokens, text tokens), written out."""
    query, key = (split_heads(f(x), attn.heads) for f, x in ((attn.to_q, hidden_states), (attn.to_k, text)))
    return torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1)


def hooks(unet: nn.Module) -> int:
    """How many forward hooks are on the UNet and everything inside."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())
