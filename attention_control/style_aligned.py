"""StyleAligned: targets look at the source beside themselves, with its statistics, and so share its style.

Hertz, Voynov, Fruchter and Cohen-Or, "Style Aligned Image Generation via Shared Attention", arXiv 2312.02133, eqs. 2 and 3:
attention of AdaIN(queries) over [the source's keys; AdaIN(own keys)] with the values of both. Several targets share one source.
The authors also share the statistics of group norms by replacing their forwards; this does not.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from attention_control.routes import Route
from attention_control.run import Program, Run
from attention_control.settings import Sites, Step


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class StyleAligned:
    """StyleAligned (arXiv 2312.02133).

    reference_weight: of the source's keys against the own ones, 1 weighing them alike, 2 being the shift of ln 2 the authors
    use for real images; adain: give queries and own keys the source's statistics; sites, start_step, stop_step: where and when.
    Style shows in a target that starts from noise of its own: use it with `noise_mix: 1`. Cost: the source's row at every
    controlled step.
    """

    reference_weight: Annotated[float, Field(ge=0, le=1000)] = 1.0
    adain: bool = True
    sites: Sites = "0-"
    start_step: Step = 0
    stop_step: Step = 1.0

    name: ClassVar[str] = "style_aligned"
    paper: ClassVar[str] = "arXiv 2312.02133"

    def program(self, run: Run) -> Program:
        """One route: own queries, the source's keys and values joined with the own ones."""
        share = self.reference_weight / (1 + self.reference_weight)
        return Program(
            routes=(
                Route("own", "source", "source", self.sites, self.start_step, self.stop_step, share=share, adain=self.adain),
            )
        )
