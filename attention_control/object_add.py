"""ObjectAdd: an object from a word of the prompt, inside a box the user draws.

"ObjectAdd: Adding Objects into Image via a Training-Free Diffusion Modification Fashion", arXiv 2404.17230, by authors of
EasyInv. Of it only the idea is taken: their code overwrites files of one diffusers version and holds one box and one word.
Here: while the layout forms, cross-attention to the word is raised inside the box and lowered outside (a bias on the logits);
after every step the source is put back outside the box, and later outside what the word points at inside it. Their layout loss,
which takes gradients through the network, and their clustering are left out.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from attention_control.cross_maps import CrossMaps
from attention_control.errors import ControlError
from attention_control.masks import resized
from attention_control.run import Program, Run
from attention_control.settings import Share, Step
from attention_control.sites import resolve_step


def _box(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError("should be [left, top, right, bottom], shares of width and height, left < right and top < bottom")
    return box


Box = Annotated[tuple[Share, Share, Share, Share], AfterValidator(_box)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ObjectAdd:
    """ObjectAdd (arXiv 2404.17230), its idea.

    word: the object, as it stands in every target prompt; box: [left, top, right, bottom] in shares of the picture; strength:
    of the bias on the word's logits, plus inside and minus outside; bias_stop: until when; mask_start: from when the source is
    put back outside the object's own shape instead of the box; mask_threshold: of the word's map inside the box, scaled by its
    maximum. Cost: the source's row at every step.
    """

    word: str
    box: Box
    strength: Annotated[float, Field(ge=0, le=100)] = 5.0
    bias_stop: Step = 0.4
    mask_start: Step = 0.8
    mask_threshold: Share = 0.3

    name: ClassVar[str] = "object_add"
    example: ClassVar[dict[str, Any]] = {"word": "ball", "box": (0.25, 0.25, 0.75, 0.75)}
    paper: ClassVar[str] = "arXiv 2404.17230"

    def program(self, run: Run) -> Program:
        """The bias, and the paste."""
        if not run.targets:
            raise ControlError("object_add points at a word of the target prompt; give the prompts' words")
        tokens = tuple(tuple(run.words[1 + i].find(self.word)) for i in run.targets)
        lengths = tuple(run.words[1 + i].length for i in run.targets)
        bias = BoxBias(tokens, lengths, self.box, self.strength, resolve_step(self.bias_stop, run.num_steps))
        paste = BoxPaste(tokens, self.box, self.mask_threshold, resolve_step(self.mask_start, run.num_steps))
        return Program(cross=(bias,) if self.strength else (), blends=(paste,))


@dataclass(frozen=True)
class BoxBias:
    """Raises a word's logits inside a box and lowers them outside, until a step."""

    tokens: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    box: tuple[float, float, float, float]
    strength: float
    stop: int
    reads_source: bool = False

    def active(self, step: int) -> bool:
        """Whether it still acts."""
        return step < self.stop

    def bias(self, step: Tensor, target: int, size: tuple[int, int]) -> Tensor | None:
        """(places, text tokens)."""
        inside = box_mask(self.box, size).flatten()
        added = torch.zeros(inside.numel(), self.lengths[target], dtype=torch.float64)
        added[:, list(self.tokens[target])] = (self.strength * (2 * inside - 1))[:, None]
        return added

    def edit(self, step: Tensor, target: int, source: Tensor, own: Tensor) -> Tensor:
        """Probabilities are left alone."""
        return own


@dataclass(frozen=True)
class BoxPaste:
    """Outside the box, later outside the object in it, the source's latents."""

    tokens: tuple[tuple[int, ...], ...]
    box: tuple[float, float, float, float]
    threshold: float
    start: int
    maps: bool = True

    def __call__(self, step: int, source: Tensor, targets: Tensor, maps: CrossMaps) -> Tensor:
        """source (1, C, H, W), targets (n, C, H, W)."""
        size = source.shape[-2], source.shape[-1]
        rows = []
        for index, z in enumerate(targets):
            inside = box_mask(self.box, size).to(z)
            attended = maps.of("target", index) if step >= self.start else None
            if attended is not None:
                seen = resized(attended[list(self.tokens[index])].sum(0), size).to(z) * inside
                inside = (seen >= self.threshold * seen.max()) * inside
            rows.append(torch.lerp(source[0], z, inside))
        return torch.stack(rows)


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """1 inside the box, 0 outside, (h, w); at least one place."""
    height, width = size
    left, top, right, bottom = box
    mask = torch.zeros(size, dtype=torch.float64)
    mask[_span(top, bottom, height), _span(left, right, width)] = 1
    return mask


def _span(start: float, stop: float, count: int) -> slice:
    """Every place that lies in the interval by more than rounding."""
    return slice(math.floor(start * count + 1e-9), math.ceil(stop * count - 1e-9))
