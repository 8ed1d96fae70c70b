"""Portrait Diffusion: a content picture drawn with the attention of a style picture.

"Portrait Diffusion: Training-free Face Stylization with Chain-of-Painting", arXiv 2312.02212. Style and content are both
inverted and pinned. In the decoder the target looks at the style's keys and values with the CONTENT's queries; late, the output
is moved from there toward that of its own queries, and beyond. The content stream is itself drawn in the style, as in the
authors' code.

Differences: guidance may be on; masks really act (the authors' are scaled so that they never do).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from attention_control.masks import GivenMask
from attention_control.routes import Route
from attention_control.run import Program, Run
from attention_control.settings import Mask, Sites, Step


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Portrait:
    """Portrait Diffusion (arXiv 2312.02212). Needs a second inversion, the style's: `edit(content, prompt, style=...)`.

    switch_step: when the late blend begins (the authors' 35 of 50); style_guidance: how far toward the target's own queries the
    output is moved then, 1 being there (theirs is 1.5); sites: self-attention sites; style_mask, content_mask: pictures or
    arrays: the content's foreground takes the style's foreground, its background the rest; draw_content: whether the content
    stream is drawn in the style too. Cost: two rows, content's and style's, at every step.
    """

    switch_step: Step = 0.7
    style_guidance: Annotated[float, Field(ge=0, le=10)] = 1.5
    sites: Sites = "strong"
    style_mask: Mask = None
    content_mask: Mask = None
    draw_content: bool = True

    name: ClassVar[str] = "portrait"
    paper: ClassVar[str] = "arXiv 2312.02212"
    sources: ClassVar[int] = 2

    def program(self, run: Run) -> Program:
        """The early route with the content's queries, and the late one."""
        given = [None if m is None else run.mask(m) for m in (self.style_mask, self.content_mask)]
        mask = None if given == [None, None] else GivenMask(given[0], given[1])
        on: Literal["targets", "all"] = "all" if self.draw_content else "targets"
        switch = self.switch_step
        early = Route("source", "style", "style", self.sites, 0, switch, mask=mask, on=on)
        late = Route("own", "style", "style", self.sites, switch, 1.0, mask=mask, away=self.style_guidance, on=on)
        steps = range(run.first_step, run.num_steps)
        return Program(routes=tuple(r for r in (early, late) if any(r.active(step, run.num_steps) for step in steps)))
