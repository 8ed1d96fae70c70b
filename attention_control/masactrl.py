"""MasaCtrl: mutual self-attention. The target keeps its own queries and reads the source's keys and values.

Cao, Wang, Qi, Shan, Qie and Zheng, "MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and
Editing", arXiv 2304.08465, eq. 3: Attention(Q_target, K_source, V_source), from a step on at which the target's layout has
formed and only in the decoder. It carries content into a new pose or shape; to keep layout and change appearance, use a
controller that routes queries instead. With masks (eq. 4) the target's foreground reads the source's foreground and the
background the rest.

Differences from the authors' code: no counter of attention calls, so a second image is edited as well as the first; any
number of steps and targets; guidance may be off; one fused attention per site instead of two explicit ones. Each guidance
half of a target reads the same half of the source, as there; where the source's prompt makes both halves equal one row
serves both, and the result is the same. Their union variant crashes as published; `strength` is what it intends. Their masks
are square and the last target's only; their automatic masks exist at 512 pixels only and are chosen by token numbers. Here
masks have any size and soft edges, an empty foreground or background reads everything, and words are written as words.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from attention_control.blends import KeepBackground
from attention_control.masks import GivenMask, RouteMask, WordMask
from attention_control.routes import Route
from attention_control.run import Program, Run
from attention_control.settings import Mask, Phrases, Share, Sites, Step


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MasaCtrl:
    """Mutual self-attention (arXiv 2304.08465).

    start_step: first controlled step, a whole number or a share of all steps (the authors' 4 of 50 is 0.08);
    stop_step: first step no longer controlled; sites: self-attention sites: "strong" (the authors' 10-15 of Stable Diffusion,
    44-69 of XL), "medium" or "light", or by forward number, module path or size, e.g. "10-15", "up_blocks.2-3", "tokens<=1024";
    strength: 1 reads only the source, 0 is plain attention, between them source
    and own keys are joined with these log-weights.

    source_mask, target_mask: pictures (white is foreground) or arrays; or by words of the prompts: source_words, and
    target_words, one text that stands in every target prompt or a list of one for each, with mask_threshold in [0, 1] of their
    scaled cross-attention. Without a source mask the foreground reads everything; without a target mask everything is
    foreground. keep_background: in cells of the latent that no mask touches the source's latents are put back after every step,
    which keeps them exactly. Cost: the source's row at every controlled step, at all of them with words or keep_background.
    """

    start_step: Step = 0.08
    stop_step: Step = 1.0
    sites: Sites = "strong"
    strength: Share = 1.0
    source_mask: Mask = None
    target_mask: Mask = None
    source_words: str = ""
    target_words: Phrases = ""
    mask_threshold: Share = 0.1
    keep_background: bool = False

    name: ClassVar[str] = "masactrl"
    paper: ClassVar[str] = "arXiv 2304.08465"

    def __post_init__(self) -> None:
        given = self.source_mask is not None or self.target_mask is not None
        if given and (self.source_words or self.target_words):
            raise ValueError("give masks or words, not both")
        if self.keep_background and not (given or self.source_words or self.target_words):
            raise ValueError("keep_background needs a mask: give source_mask and target_mask, or source_words and target_words")

    def program(self, run: Run) -> Program:
        """One route: own queries, the source's keys and values, maybe masked."""
        mask = self._mask(run)
        route = Route("own", "source", "source", self.sites, self.start_step, self.stop_step, share=self.strength, mask=mask)
        kept = mask is not None and self.keep_background
        return Program(routes=(route,), blends=(KeepBackground(mask),) if kept and mask is not None else ())

    def _mask(self, run: Run) -> RouteMask | None:
        if self.source_words or self.target_words:
            source = run.source_words("source_words").find(self.source_words) if self.source_words else []
            return WordMask(tuple(source), run.target_tokens(self.target_words, "target_words"), self.mask_threshold)
        if self.source_mask is None and self.target_mask is None:
            return None
        masks = [None if given is None else run.mask(given) for given in (self.source_mask, self.target_mask)]
        return GivenMask(masks[0], masks[1])
