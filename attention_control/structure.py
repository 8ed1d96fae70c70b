"""Structure keeping: the target's values under the source's own attention map.

Liu, Wang, Cao, Jia and Huang, "Towards Understanding Cross and Self-Attention in Stable Diffusion for Text-Guided Image
Editing" (Free-Prompt-Editing), arXiv 2403.03431: replacing a self-attention map by the source's keeps the layout and lets the
prompt change the look. A map is a softmax of queries and keys, so replacing it is supplying the source's queries and keys;
nothing is stored. No source prompt and no alignment of words is needed. As in their code, sites up to half the latent's side,
the first 0.8 of the steps, and the conditional half of guidance only.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from attention_control.routes import Route
from attention_control.run import Program, Run
from attention_control.settings import Sites, Step


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Structure:
    """Free-Prompt-Editing (arXiv 2403.03431).

    start_step, stop_step: controlled steps, whole numbers or shares of all; sites: self-attention sites, by default those up to
    half the latent's side of Stable Diffusion (2-12) and XL (all); halves: which half of a guidance pair is controlled,
    "conditional" as in their code, or "both". Cost: the source's row at every controlled step.
    """

    start_step: Step = 0
    stop_step: Step = 0.8
    sites: Sites = "2-12 of 16, 0-69 of 70"
    halves: Literal["conditional", "both"] = "conditional"

    name: ClassVar[str] = "structure"
    paper: ClassVar[str] = "arXiv 2403.03431"

    def program(self, run: Run) -> Program:
        """One route: the source's queries and keys, own values."""
        route = Route("source", "source", "own", self.sites, self.start_step, self.stop_step, halves=self.halves)
        return Program(routes=(route,))
