"""No control at all: the target is sampled from the inverted noise by its prompt alone. The baseline of every editor."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from attention_control.run import Program, Run


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class NoControl:
    """Plain sampling. Has no settings. Cost: none."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = "-"

    def program(self, run: Run) -> Program:
        """Nothing."""
        return Program()
