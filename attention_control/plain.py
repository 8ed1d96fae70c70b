"""No control at all: the target is sampled from the inverted noise by its prompt alone. The baseline of every editor."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from attention_control.routes import Route


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class NoControl:
    """Plain sampling. Has no settings. Cost: none."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = "-"

    def routes(self) -> tuple[Route, ...]:
        """No routes."""
        return ()
