"""MasaCtrl: mutual self-attention. The target keeps its own queries and reads the source's keys and values.

Cao, Wang, Qi, Shan, Qie and Zheng, "MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and
Editing", arXiv 2304.08465, eq. 3: Attention(Q_target, K_source, V_source), from a step on at which the target's layout has
formed and only in the decoder. It carries content into a new pose or shape; to keep layout and change appearance, use a
controller that routes queries instead.

Differences from the authors' code: no counter of attention calls, so a second image is edited as well as the first; any
number of steps and targets; guidance may be off; one fused attention per site instead of two explicit ones. Each guidance
half of a target reads the same half of the source, as there; where the source's prompt makes both halves equal one row
serves both, and the result is the same. Their union variant crashes as published; `strength` is what it intends.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from attention_control.routes import Route
from attention_control.sites import check_selector, check_step

Step = Annotated[int | float, BeforeValidator(check_step)]
Sites = Annotated[str, BeforeValidator(lambda n: str(n) if type(n) is int else n), AfterValidator(check_selector)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MasaCtrl:
    """Mutual self-attention (arXiv 2304.08465).

    start_step: first controlled step, a whole number or a share of all steps (the authors' 4 of 50 is 0.08);
    stop_step: first step no longer controlled; sites: self-attention sites by forward number, module path or size, e.g.
    "10-15", "up_blocks.2-3", "tokens<=1024"; strength: 1 reads only the source, 0 is plain attention, between them source
    and own keys are joined with these log-weights. Cost: the source's row at every controlled step.
    """

    start_step: Step = 0.08
    stop_step: Step = 1.0
    sites: Sites = "10-15"
    strength: Annotated[float, Field(ge=0, le=1)] = 1.0

    name: ClassVar[str] = "masactrl"
    paper: ClassVar[str] = "arXiv 2304.08465"

    def routes(self) -> tuple[Route, ...]:
        """One route: own queries, the source's keys and values."""
        return (Route("own", "source", "source", self.sites, self.start_step, self.stop_step, self.strength),)
