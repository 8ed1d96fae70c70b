"""An independent MasaCtrl to compare with, and small ways to run a UNet under control.

The reference shares no code with `attention_control`: its own list of sites, the authors' batch layout, and attention written
out as matmul, softmax, matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from attention_control import Controller, Program, Run, StreamRow, Streams, Words, controlled
from attention_control.routes import Route
from attention_control.streams import layout

STEPS = 50
TIMESTEP = 481
CONTROLLED_STEP = 10

SELF_PATHS = tuple(
    f"{block}.transformer_blocks.0.attn1"
    for block in (
        "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.1",
        "down_blocks.1.attentions.0",
        "down_blocks.1.attentions.1",
        "down_blocks.2.attentions.0",
        "down_blocks.2.attentions.1",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
        "up_blocks.1.attentions.2",
        "up_blocks.2.attentions.0",
        "up_blocks.2.attentions.1",
        "up_blocks.2.attentions.2",
        "up_blocks.3.attentions.0",
        "up_blocks.3.attentions.1",
        "up_blocks.3.attentions.2",
    )
)
"""SD 1.x's self-attention in forward order, written by hand: position 10 is MasaCtrl's layer 10."""


def official_rows(targets: int = 1) -> Streams:
    """The authors' layout: [s_u, t_u ..., s_c, t_c ...]."""
    halves = ("unconditional", "conditional")
    return layout([row for half in halves for row in [("source", 0, half), *(("target", i, half) for i in range(targets))]])


def single_source_rows(targets: int = 1) -> Streams:
    """Ours where the source needs no guidance: [s_c, t_u ..., t_c ...]."""
    halves = ("unconditional", "conditional")
    return layout([("source", 0, "conditional"), *(("target", i, half) for half in halves for i in range(targets))])


def unguided_rows(targets: int = 1) -> Streams:
    """Guidance off: [s, t ...]."""
    return layout([("source", 0, "conditional"), *(("target", i, "conditional") for i in range(targets))])


@dataclass(frozen=True)
class Scene:
    """A source and its targets: latents (1 + targets, 4, H, W), text (1 + targets, tokens, dim); empty: that of no prompt."""

    latents: Tensor
    text: Tensor
    empty: Tensor

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.latents.shape[-2:]
        return height, width

    def batch(self, streams: Streams) -> tuple[Tensor, Tensor]:
        """The UNet's latents and text for these rows."""
        index = [0 if row.role == "source" else 1 + row.index for row in streams.rows]
        text = [self.text[i] if row.half == "conditional" else self.empty for i, row in zip(index, streams.rows, strict=True)]
        return self.latents[index], torch.stack(text)

    def only(self, target: int) -> Scene:
        """The same source with one of its targets."""
        return Scene(self.latents[[0, 1 + target]], self.text[[0, 1 + target]], self.empty)

    def to(self, dtype: torch.dtype) -> Scene:
        return Scene(self.latents.to(dtype), self.text.to(dtype), self.empty.to(dtype))


def make_scene(targets: int = 1, size: tuple[int, int] = (16, 16), empty_source: bool = False, seed: int = 1) -> Scene:
    """Random float64 inputs; empty_source: the source's prompt is the empty one, as in MasaCtrl's recipe for real images."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    latents, text, empty = (
        torch.randn(1 + targets, 4, *size, **draw),
        torch.randn(1 + targets, 7, 16, **draw),
        torch.randn(7, 16, **draw),
    )
    if empty_source:
        text[0] = empty
    return Scene(latents, text, empty)


Outputs = dict[StreamRow, Tensor]
"""What the UNet said of each row, by which row it was rather than by where it stood."""


def evaluate(unet: UNet2DConditionModel, scene: Scene, streams: Streams) -> Outputs:
    """One call of the UNet as it is."""
    latents, text = scene.batch(streams)
    return dict(zip(streams.rows, unet(latents, TIMESTEP, text).sample, strict=True))


def evaluate_controlled(
    unet: UNet2DConditionModel, controller: Controller, scene: Scene, streams: Streams, step: int = CONTROLLED_STEP
) -> Outputs:
    """One call of the UNet under a controller, at a step of 50."""
    with controlled(unet, controller, num_steps=STEPS, latent_size=scene.size) as session, session.step(step, streams):
        return evaluate(unet, scene, streams)


def evaluate_official(
    unet: UNet2DConditionModel, scene: Scene, streams: Streams, *, halves: int = 2, union: bool = False
) -> Outputs:
    """One call of the UNet under the reference, which takes the authors' layout only: `halves` times [source, targets ...]."""
    own = dict(unet.attn_processors)
    for index, path in enumerate(SELF_PATHS):
        unet.get_submodule(path).set_processor(Explicit(halves if index >= 10 else None, union))
    try:
        return evaluate(unet, scene, streams)
    finally:
        unet.set_attn_processor(own)


class Explicit:
    """Attention written out. halves: the batch is this many times [source, targets ...] and targets read their half's source,
    joined with their own keys where `union`; None: plain attention."""

    def __init__(self, halves: int | None, union: bool) -> None:
        self.halves, self.union = halves, union

    def __call__(
        self, attn: torch.nn.Module, hidden_states: Tensor, encoder_hidden_states: None = None, attention_mask: None = None
    ) -> Tensor:
        assert encoder_hidden_states is None
        assert attention_mask is None
        query, key, value = (split_heads(f(hidden_states), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        if self.halves is None:
            out = explicit_attention(query, key, value)
        else:
            chunks = zip(query.chunk(self.halves), key.chunk(self.halves), value.chunk(self.halves), strict=True)
            out = torch.cat([self._half(*chunk) for chunk in chunks])
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    def _half(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first_key, first_value = key[:1].expand_as(key), value[:1].expand_as(value)
        if not self.union:
            return explicit_attention(query, first_key, first_value)
        joined = explicit_attention(query[1:], torch.cat([first_key, key], 2)[1:], torch.cat([first_value, value], 2)[1:])
        return torch.cat([explicit_attention(query[:1], key[:1], value[:1]), joined])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(rows, tokens, channels) -> (rows, heads, tokens, channels per head)."""
    rows, tokens, channels = x.shape
    return x.reshape(rows, tokens, heads, channels // heads).transpose(1, 2)


def explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All (rows, heads, tokens, channels per head)."""
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return torch.softmax(logits, -1) @ value


def targets_of(outputs: Outputs) -> Outputs:
    """The target rows alone."""
    return {row: out for row, out in outputs.items() if row.role == "target"}


def sources_of(outputs: Outputs) -> Outputs:
    """The source rows alone."""
    return {row: out for row, out in outputs.items() if row.role == "source"}


def distance(a: Outputs, b: Outputs) -> float:
    """The largest absolute difference, over the rows of `a`; `b` must hold them all."""
    assert a, "nothing to compare"
    return max((a[row] - b[row]).abs().max().item() for row in a)


def same_bits(a: Outputs, b: Outputs) -> bool:
    """Whether both hold the same rows with the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[row], b[row]) for row in a)


@dataclass(frozen=True)
class Routing:
    """A controller made of the given routes."""

    given: Sequence[Route]

    def program(self, run: Run) -> Program:
        return Program(routes=tuple(self.given))


WORDS = (
    Words(("a", "red", "cube"), ((1,), (2,), (3, 4)), 7),
    Words(("a", "red", "ball"), ((1,), (2,), (3,)), 7),
    Words(("a", "blue", "cube"), ((1,), (2,), (3, 4)), 7),
    Words(("a", "red", "cone"), ((1,), (2,), (3,)), 7),
)
"""Of a source's prompt and of three targets'."""


def reading_source(sites: str, start: float | int = 0, stop: float | int = 1.0, share: float = 1.0) -> Route:
    """MasaCtrl's route at the given sites and steps."""
    return Route("own", "source", "source", sites, start, stop, share)
