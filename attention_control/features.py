"""Copies of a block's output from the source's rows to the targets', by a forward hook: no forward is replaced."""

from __future__ import annotations

import re
from dataclasses import dataclass

from attention_control.errors import ControlError
from attention_control.sites import resolve_step


@dataclass(frozen=True)
class FeatureCopy:
    """path: the module whose output is copied, or several joined by ',' with "of N": in a UNet of N self-attention sites;
    start, stop: as for routes."""

    path: str
    start: float | int = 0
    stop: float | int = 1.0

    def module(self, sites: int) -> str:
        """The module's path in a UNet of so many self-attention sites. Raises ControlError where none is given for it,
        or one cannot be read."""
        for choice in self.path.split(","):
            found = re.fullmatch(r"(\S+)(?:\s+of\s+(\d+))?", choice.strip())
            if found is None:
                raise ControlError(
                    f"feature {self.path!r}: cannot read {choice.strip()!r}; write a module's path, or 'path of N'"
                )
            if found[2] is None or int(found[2]) == sites:
                return found[1]
        raise ControlError(f"feature {self.path!r} names no module for a UNet of {sites} self-attention sites; give its path")

    def active(self, step: int, num_steps: int) -> bool:
        """Whether the copy is made at `step`."""
        return resolve_step(self.start, num_steps) <= step < resolve_step(self.stop, num_steps)
