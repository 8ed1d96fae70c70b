"""Several controllers at once.

Within a step everything acts in one order, whoever asked for it: features are copied, self-attention is routed, cross-attention
is changed, and after the step latents are blended; things of one kind in the order of the list. Two routes may not meet at one
site and step: that is refused, naming the place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict
from pydantic.dataclasses import dataclass

from attention_control.run import Program, Run, merged


def _controller(choice: Any) -> Any:
    from attention_control import CONTROLLERS  # late: the registry imports this

    choice = {"name": choice} if isinstance(choice, str) else choice
    if not isinstance(choice, Mapping):
        if not hasattr(choice, "program"):
            raise ValueError(f"should hold controllers: names, or mappings with name and settings ({', '.join(CONTROLLERS)})")
        return choice
    fields = {str(key): value for key, value in choice.items() if key != "name"}
    name = choice.get("name")
    if not isinstance(name, str) or name not in CONTROLLERS:
        raise ValueError(f"controller {name!r} is unknown; choose {', '.join(CONTROLLERS)}")
    return CONTROLLERS[name](**fields)


def _some(controllers: tuple[Any, ...]) -> tuple[Any, ...]:
    if not controllers:
        raise ValueError("should hold at least one controller")
    return controllers


Part = Annotated[Any, BeforeValidator(_controller)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Compose:
    """Several controllers over disjoint sites or steps, or of different kinds.

    controllers: a list of names or mappings with name and settings. Cost: the source's row wherever one of them needs it, once.
    """

    controllers: Annotated[tuple[Part, ...], AfterValidator(_some)]

    name: ClassVar[str] = "compose"
    example: ClassVar[dict[str, Any]] = {
        "controllers": ({"name": "structure", "stop_step": 0.5}, {"name": "masactrl", "start_step": 0.5})
    }
    paper: ClassVar[str] = "-"

    @property
    def sources(self) -> int:
        """How many sources the neediest of them has."""
        return max(getattr(controller, "sources", 1) for controller in self.controllers)

    def program(self, run: Run) -> Program:
        """Everything the controllers want, in the order given."""
        return merged([controller.program(run) for controller in self.controllers])
