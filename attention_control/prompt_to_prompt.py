"""Prompt-to-Prompt: the target's cross-attention follows the source's, word by word.

Hertz, Mokady, Tenenbaum, Aberman, Pritch and Cohen-Or, "Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv
2208.01626: the map of every word that both prompts share is the source's, for the first part of the steps; words may be weighed
up or down; self-attention follows the source's for some steps; and outside what given words point at the source's latents
are put back (local blend). Applied to the conditional half of guidance, as in the authors' code.

Differences from it: words are matched through the tokenizer's offsets, so case and punctuation do not matter and a missing word
is an error; the prompts' shared words are found by their longest common subsequence, which is their alignment's score; the
padding is aligned from the end marks on; maps have any size; self-attention supplies the source's queries and keys instead of
storing maps, which is the same thing.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from attention_control.blends import LocalBlend
from attention_control.errors import ControlError
from attention_control.routes import Route
from attention_control.run import Program, Run
from attention_control.settings import Phrases, Share, Sites, Step
from attention_control.sites import resolve_step
from attention_control.words import Words, is_mark, normal


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PromptToPrompt:
    """Prompt-to-Prompt (arXiv 2208.01626). Needs a source prompt.

    mode: "refine" keeps the maps of the words both prompts share; "replace" pairs the words one by one, so that a new word gets
    its predecessor's map, and needs as many words in both; cross_steps: until when maps follow the source's, a whole number of
    steps or a share; word_steps: the same for single words of the target; reweight: factors on the maps of target words, while
    they follow; self_steps: until when self-attention follows, at `sites`; blend_source, blend_target: words outside of which
    the source is put back, one or both, blend_target one text that stands in every target prompt or a list of one for each;
    blend_threshold: of their maps, scaled by the maximum; blend_start: from when.
    Cost: the source's row while anything follows, at every step with blend words.
    """

    mode: Literal["refine", "replace"] = "refine"
    cross_steps: Step = 0.8
    word_steps: dict[str, Step] = field(default_factory=dict)
    reweight: dict[str, Annotated[float, Field(ge=-100, le=100)]] = field(default_factory=dict)
    self_steps: Step = 0.4
    sites: Sites = "tokens<=256, 4-9 of 16, 4-63 of 70"
    blend_source: str = ""
    blend_target: Phrases = ""
    blend_threshold: Share = 0.3
    blend_start: Step = 0.2

    name: ClassVar[str] = "prompt_to_prompt"
    paper: ClassVar[str] = "arXiv 2208.01626"

    def program(self, run: Run) -> Program:
        """The edit of cross-attention, the route of self-attention, and the local blend."""
        source = run.source_words("prompt_to_prompt")
        targets = [run.words[1 + i] for i in run.targets]
        cross = WordEdit(tuple(self._target(source, target, run.num_steps) for target in targets))
        follows = resolve_step(self.self_steps, run.num_steps) > 0
        route = Route("source", "source", "own", self.sites, 0, self.self_steps, halves="conditional")
        return Program(
            routes=(route,) if follows else (),
            cross=(cross,) if cross.last > 0 else (),
            blends=self._blend(source, run),
        )

    def _target(self, source: Words, target: Words, num_steps: int) -> TargetEdit:
        pairs = _paired(source, target) if self.mode == "replace" else _shared(source, target)
        matrix, follows = token_map(source, target, pairs)
        stops = torch.full((target.length,), float(resolve_step(self.cross_steps, num_steps)))
        for word, step in self.word_steps.items():
            stops[target.find(word)] = float(resolve_step(step, num_steps))
        factors = torch.ones(target.length, dtype=torch.float64)
        for word, factor in self.reweight.items():
            factors[target.find(word)] = factor
        return TargetEdit(matrix, follows, stops, factors)

    def _blend(self, source: Words, run: Run) -> tuple[LocalBlend, ...]:
        if not self.blend_source and not self.blend_target:
            return ()
        theirs = tuple(source.find(self.blend_source)) if self.blend_source else ()
        own = run.target_tokens(self.blend_target, "blend_target")
        return (LocalBlend(theirs, own, self.blend_threshold, resolve_step(self.blend_start, run.num_steps)),)


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class TargetEdit:
    """One target. matrix: (source tokens, target tokens) taking the source's map to the target's tokens; follows: which target
    tokens have one; stops: the step at which each stops following; factors: on each token's map."""

    matrix: Tensor
    follows: Tensor
    stops: Tensor
    factors: Tensor


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class WordEdit:
    """The change of cross-attention for every target."""

    targets: tuple[TargetEdit, ...]
    reads_source: bool = True

    @property
    def last(self) -> float:
        """The first step at which nothing follows any more."""
        return max((float(t.stops.max()) for t in self.targets), default=0.0)

    def active(self, step: int) -> bool:
        """Whether any word still follows."""
        return step < self.last

    def bias(self, step: Tensor, target: int, size: tuple[int, int]) -> Tensor | None:
        """Logits are left alone."""
        return None

    def edit(self, step: Tensor, target: int, source: Tensor, own: Tensor) -> Tensor:
        """Equations of the paper's section 3: replace or refine, then reweight."""
        edit = self.targets[target]
        now = (step < edit.stops).to(own)
        share = now * edit.follows.to(own)
        mixed = share * (source @ edit.matrix.to(source)) + (1 - share) * own
        return mixed * (1 + now * (edit.factors.to(own) - 1))


def token_map(source: Words, target: Words, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(matrix, follows) for pairs of word indices; the start mark, the end mark and the padding follow each other.

    A word of several tokens spreads over its partner's: one to one where they are as many, else each gets an equal share.
    """
    matrix = torch.zeros(source.length, target.length, dtype=torch.float64)
    matrix[0, 0] = 1
    for i, j in pairs:
        theirs, own = source.tokens[i], target.tokens[j]
        if len(theirs) == len(own):
            matrix[list(theirs), list(own)] = 1
        elif theirs and own:
            for token in own:
                matrix[list(theirs), token] = 1 / len(own)
    for offset in range(target.length - target.end):
        matrix[min(source.end + offset, source.length - 1), target.end + offset] = 1
    return matrix, matrix.sum(0) > 0


def _paired(source: Words, target: Words) -> list[tuple[int, int]]:
    theirs, own = ([i for i, word in enumerate(w.words) if not is_mark(word)] for w in (source, target))
    if len(theirs) != len(own):
        raise ControlError(
            f"mode 'replace' pairs the words one by one, but the source prompt has {len(theirs)} and the target {len(own)}: "
            f"{' '.join(target.words)!r}; write as many, or use mode 'refine'"
        )
    return list(zip(theirs, own, strict=True))


def _shared(source: Words, target: Words) -> list[tuple[int, int]]:
    """The longest common subsequence of both prompts' words."""
    a, b = [normal(word) for word in source.words], [normal(word) for word in target.words]
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) - 1, -1, -1):
        for j in range(len(b) - 1, -1, -1):
            best[i][j] = best[i + 1][j + 1] + 1 if a[i] == b[j] else max(best[i + 1][j], best[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
