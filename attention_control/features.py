"""Copies of a block's output from the source's rows to the targets', by a forward hook: no forward is replaced."""

from __future__ import annotations

from dataclasses import dataclass

from attention_control.sites import resolve_step


@dataclass(frozen=True)
class FeatureCopy:
    """path: the module whose output is copied; start, stop: as for routes."""

    path: str
    start: float | int = 0
    stop: float | int = 1.0

    def active(self, step: int, num_steps: int) -> bool:
        """Whether the copy is made at `step`."""
        return resolve_step(self.start, num_steps) <= step < resolve_step(self.stop, num_steps)
