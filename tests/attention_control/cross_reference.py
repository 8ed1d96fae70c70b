"""An independent cross-attention to compare with: every site of a UNet written out as matmul, softmax, matmul.

Shares no code with `attention_control`, only the names of rows: which sites there are and how fine they are is written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from attention_control import Controller, StreamRow, Streams, Words, controlled
from tests.attention_control.reference import CONTROLLED_STEP, STEPS, WORDS, Outputs, Scene, evaluate, split_heads

EXACT = 1e-10
"""Of outputs of order 1, in float64: rounding and nothing else."""
CLEAR = 1e-4
"""A difference no rounding makes: what these controllers change moves outputs by more."""

DOWNSCALE = {
    "down_blocks.0": 1,
    "down_blocks.1": 2,
    "down_blocks.2": 4,
    "mid_block": 8,
    "up_blocks.1": 4,
    "up_blocks.2": 2,
    "up_blocks.3": 1,
}
"""How much coarser than the latent the attention of SD 1.x's blocks is, per side."""

Maps = dict[StreamRow, Tensor]
"""Probabilities (heads, places, text tokens) of each row at one site."""
Bias = Callable[[StreamRow, tuple[int, int]], Tensor]
"""(conditional target row, (height, width) of the site) -> what is added to its logits (places, text tokens)."""
Edit = Callable[[StreamRow, Maps], Tensor]
"""(conditional target row, the maps of all rows) -> the row's new map."""


def cross_paths(downscale: int) -> list[str]:
    """SD 1.x's cross-attention that is so much coarser than the latent, in forward order."""
    counts = {"down": 2, "mid_": 1, "up_b": 3}
    blocks = [block for block, scale in DOWNSCALE.items() if scale == downscale]
    numbered = [(block, i) for block in blocks for i in range(counts[block[:4]])]
    return [f"{block}.attentions.{i}.transformer_blocks.0.attn2" for block, i in numbered]


def grid(path: str, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a site for latents of that size."""
    downscale = DOWNSCALE[path[: path.index(".attentions")]]
    return math.ceil(size[0] / downscale), math.ceil(size[1] / downscale)


@dataclass
class Written:
    """One site, self or cross, row by row. follow: self-attention maps of conditional targets are the source's at sites of up
    to so many places; seen: what every cross-attention site's maps were, by path."""

    path: str
    rows: tuple[StreamRow, ...]
    size: tuple[int, int]
    bias: Bias | None
    edit: Edit | None
    follow: int
    seen: dict[str, Maps]

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        assert attention_mask is None
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            split_heads(f(x), attn.heads) for f, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        logits = dict(zip(self.rows, query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, strict=True))
        made = self._own(logits) if encoder_hidden_states is None else self._cross(logits)
        out = torch.stack([made[row] @ value[i] for i, row in enumerate(self.rows)])
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    @property
    def _targets(self) -> list[StreamRow]:
        return [row for row in self.rows if (row.role, row.half) == ("target", "conditional")]

    def _own(self, logits: Maps) -> Maps:
        maps = {row: torch.softmax(x, -1) for row, x in logits.items()}
        follows = next(iter(maps.values())).shape[-1] <= self.follow
        return {**maps, **dict.fromkeys(self._targets, maps[SOURCE])} if follows else maps

    def _cross(self, logits: Maps) -> Maps:
        if self.bias is not None:
            logits = {**logits, **{row: logits[row] + self.bias(row, grid(self.path, self.size)) for row in self._targets}}
        maps = {row: torch.softmax(x, -1) for row, x in logits.items()}
        made = maps if self.edit is None else {**maps, **{row: self.edit(row, maps) for row in self._targets}}
        self.seen[self.path] = made
        return made


SOURCE = StreamRow("source", 0, "conditional")


@dataclass
class Answer:
    """What the UNet said of each row, and its cross-attention maps by site."""

    outputs: Outputs
    maps: dict[str, Maps] = field(default_factory=dict)


def evaluate_written(
    unet: UNet2DConditionModel,
    scene: Scene,
    streams: Streams,
    *,
    bias: Bias | None = None,
    edit: Edit | None = None,
    follow: int = 0,
) -> Answer:
    """One call of the UNet under the reference."""
    own, answer = dict(unet.attn_processors), Answer({})
    sites = {name: name.removesuffix(".processor") for name in own}
    written = {n: Written(path, streams.rows, scene.size, bias, edit, follow, answer.maps) for n, path in sites.items()}
    unet.set_attn_processor(written)
    try:
        answer.outputs = evaluate(unet, scene, streams)
    finally:
        unet.set_attn_processor(own)
    return answer


def evaluate_with_words(
    unet: UNet2DConditionModel,
    controller: Controller,
    scene: Scene,
    streams: Streams,
    step: int = CONTROLLED_STEP,
    words: Sequence[Words] = WORDS,
) -> Outputs:
    """One call of the UNet under a controller that points at words, at a step of 50; as many targets as the scene has."""
    known = words[: len(scene.latents)]
    with (
        controlled(unet, controller, num_steps=STEPS, latent_size=scene.size, words=known) as session,
        session.step(step, streams),
    ):
        return evaluate(unet, scene, streams)
