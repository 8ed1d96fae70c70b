"""Plug-and-Play diffusion features: the source's attention maps and one block's features, for another appearance.

Tumanyan, Geyer, Bagon and Dekel, "Plug-and-Play Diffusion Features for Text-Driven Image-to-Image Translation", arXiv
2211.12572. Queries and keys of decoder self-attention come from the source for the first half of the steps, and the output of
one residual block's second convolution for the first 0.8. The authors replace forwards of one diffusers version; here the
feature is copied by a hook.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from attention_control.features import FeatureCopy
from attention_control.routes import Route
from attention_control.run import Program, Run
from attention_control.settings import Sites, Step
from attention_control.sites import resolve_step


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PlugAndPlay:
    """Plug-and-Play (arXiv 2211.12572).

    stop_step: until when attention is controlled, 0 for never; sites: decoder self-attention sites; feature: the module whose
    output is copied, empty for none, "of N" meaning UNets of N sites; feature_stop_step: until when. XL's defaults are ours:
    the same places in its decoder. The authors' source has an empty prompt; with another, each half of guidance reads its own.
    Cost: the source's row until the later of both stops.
    """

    stop_step: Step = 0.5
    sites: Sites = "8-15 of 16, 44-69 of 70"
    feature: str = "up_blocks.1.resnets.1.conv2 of 16, up_blocks.0.resnets.1.conv2 of 70"
    feature_stop_step: Step = 0.8

    name: ClassVar[str] = "plug_and_play"
    paper: ClassVar[str] = "arXiv 2211.12572"

    def program(self, run: Run) -> Program:
        """The route, and the copy of the feature."""
        copied = self.feature and resolve_step(self.feature_stop_step, run.num_steps) > 0
        routed = resolve_step(self.stop_step, run.num_steps) > 0
        return Program(
            routes=(Route("source", "source", "own", self.sites, 0, self.stop_step),) if routed else (),
            features=(FeatureCopy(self.feature, 0, self.feature_stop_step),) if copied else (),
        )
