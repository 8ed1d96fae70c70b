"""What a controller is told about a run, and what it answers: its program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from attention_control.errors import ControlError
from attention_control.words import Words

if TYPE_CHECKING:
    from attention_control.cross_maps import CrossMaps
    from attention_control.features import FeatureCopy
    from attention_control.routes import Route


@dataclass(frozen=True)
class Run:
    """num_steps: T; latent_size: (height, width); first_step: the step sampling starts at; words: of the source's prompt, then
    of each target's, where known; read_mask: turns what the user gave as a mask into a tensor (h, w) in [0, 1]; device: where
    the UNet computes, by default where its weights are, which is not the same under offload; part: which targets the batch
    holds, by default all."""

    num_steps: int
    latent_size: tuple[int, int]
    first_step: int = 0
    words: Sequence[Words] = ()
    read_mask: Callable[[Any], Tensor] | None = None
    device: torch.device | None = None
    part: Sequence[int] | None = None

    @property
    def targets(self) -> Sequence[int]:
        """The batch's targets whose words are known, in its order."""
        return range(max(0, len(self.words) - 1)) if self.part is None or not self.words else self.part

    def target_tokens(self, phrases: str | tuple[str, ...], what: str) -> tuple[tuple[int, ...], ...]:
        """Where phrases stand in the batch's targets: one text in all of them, or one for each of the edit's targets.

        An empty text has no tokens. what: how to call the phrases in errors. Raises ControlError where they are another number
        than the targets, or one does not stand in its prompt.
        """
        count = len(self.words) - 1
        if not isinstance(phrases, str) and count > 0 and len(phrases) != count:
            raise ControlError(
                f"{what} holds {len(phrases)} texts, but there are {count} target prompts; write one for each, or a single "
                "text that stands in every prompt"
            )
        texts = [(self.words[1 + i], phrases if isinstance(phrases, str) else phrases[i]) for i in self.targets]
        return tuple(tuple(words.find(text)) if text else () for words, text in texts)

    def source_words(self, what: str) -> Words:
        """The source prompt's words. Raises ControlError where there are none."""
        if not self.words or not self.words[0].words:
            raise ControlError(f"{what} needs a source prompt to point at; invert the image with one")
        return self.words[0]

    def mask(self, given: Any) -> Tensor:
        """A user's mask (h, w) in [0, 1] on the CPU, any size."""
        if self.read_mask is not None:
            return self.read_mask(given)
        if not isinstance(given, Tensor) or given.ndim != 2 or not given.numel():
            what = f"of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise ControlError(f"a mask must be a tensor (h, w) of values from 0 to 1 here, not {what}")
        return given.detach().cpu().float().clamp(0, 1)


class CrossEdit(Protocol):
    """A change of cross-attention, for conditional target rows. reads_source: whether it needs the source's row. Inside the
    UNet `step` is a 0-dim tensor: compiled code would be made anew for every Python number."""

    @property
    def reads_source(self) -> bool:
        """See above."""

    def active(self, step: int) -> bool:
        """Whether it acts at `step`."""

    def bias(self, step: Tensor, target: int, size: tuple[int, int]) -> Tensor | None:
        """Added to the logits of a target: (tokens of the site, text tokens), or None."""

    def edit(self, step: Tensor, target: int, source: Tensor, own: Tensor) -> Tensor:
        """New probabilities of a target from the source's and its own: (heads, tokens of the site, text tokens)."""


class Blend(Protocol):
    """A change of latents after a step."""

    @property
    def maps(self) -> bool:
        """Whether it looks at cross-attention maps."""

    def __call__(self, step: int, source: Tensor, targets: Tensor, maps: CrossMaps) -> Tensor:
        """source (1, C, H, W), targets (n, C, H, W), both after `step` -> the targets to go on with."""


@dataclass(frozen=True)
class Program:
    """What a controller wants done. routes: on self-attention; features: copied between rows; cross: changes of
    cross-attention; blends: changes of latents; in this order within a step. map_steps: whether cross-attention maps are wanted
    at a step, by routes with word masks."""

    routes: tuple[Route, ...] = ()
    features: tuple[FeatureCopy, ...] = ()
    cross: tuple[CrossEdit, ...] = ()
    blends: tuple[Blend, ...] = ()

    @property
    def wants_maps(self) -> bool:
        """Whether cross-attention maps must be collected."""
        return any(route.mask is not None and route.mask.maps for route in self.routes) or any(b.maps for b in self.blends)


def merged(programs: Sequence[Program]) -> Program:
    """Several programs as one, each part in the order given."""
    return Program(
        routes=tuple(route for program in programs for route in program.routes),
        features=tuple(feature for program in programs for feature in program.features),
        cross=tuple(edit for program in programs for edit in program.cross),
        blends=tuple(blend for program in programs for blend in program.blends),
    )
