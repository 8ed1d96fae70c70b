"""What the source's rows put into the routed sites, kept so that many targets can read one evaluation of the source.

With the source pinned these layer inputs do not depend on the target. The INPUT of a site is kept, not its keys and values:
half the memory, and any route can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention_control.errors import ControlError
from attention_control.side_copies import SideCopies
from attention_control.streams import StreamRow, Streams


@dataclass
class ReferenceCache:
    """Layer inputs (rows, tokens, channels) by step and site.

    rows, frame, source: which source rows each holds, (steps, (height, width)) of the run, and a few values that tell the
    source; who fills it sets them; dtype: of storage, by default what they come in; device: where they lie, by default where
    they come from; on the CPU of a CUDA run they lie in pinned memory and the next step's are fetched ahead; max_bytes: what
    would exceed it is not kept, and raises ControlError.
    """

    rows: tuple[StreamRow, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    max_bytes: int | None = None
    frame: tuple[int, tuple[int, int]] | None = None
    source: tuple[float, ...] | None = None
    _inputs: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _ahead: dict[int, Callable[[], dict[str, Tensor]]] = field(default_factory=dict)
    _copies: SideCopies | None = None

    @property
    def bytes(self) -> int:
        """How much is kept."""
        return sum(t.numel() * t.element_size() for sites in self._inputs.values() for t in sites.values())

    @property
    def stored(self) -> tuple[torch.dtype, torch.device] | None:
        """In which dtype and where the inputs lie; None while nothing is kept."""
        return next(((t.dtype, t.device) for sites in self._inputs.values() for t in sites.values()), None)

    @property
    def steps(self) -> list[int]:
        """Steps of which something is kept."""
        return sorted(self._inputs)

    def put(self, step: int, path: str, hidden_states: Tensor) -> None:
        """Keep what the source's rows (rows, tokens, channels) put into a site at a step."""
        if hidden_states.shape[0] != len(self.rows):
            raise ControlError(f"the cache holds {len(self.rows)} source rows, but {hidden_states.shape[0]} were given")
        kept = hidden_states.detach().to(device=self.device, dtype=self.dtype, copy=True)
        if kept.device.type == "cpu" and hidden_states.device.type == "cuda":
            kept = kept.pin_memory()
        before = self._inputs.get(step, {}).get(path)
        size = kept.numel() * kept.element_size() - (0 if before is None else before.numel() * before.element_size())
        if self.max_bytes is not None and self.bytes + size > self.max_bytes:
            raise ControlError(
                f"the source's features need more than the {self.max_bytes:,} bytes allowed: {self.bytes:,} are kept, and step "
                f"{step} needs {size:,} more at {path}; allow more, store them in half precision, or edit without keeping them"
            )
        self._inputs.setdefault(step, {})[path] = kept

    def clear(self) -> None:
        """Forget everything, to be filled anew."""
        self._inputs, self._ahead = {}, {}

    def holds(self, step: int, paths: Sequence[str]) -> bool:
        """Whether every one of these sites is kept at a step."""
        return all(path in self._inputs.get(step, {}) for path in paths)

    def get(self, step: int, path: str) -> tuple[Streams, Tensor]:
        """The source's rows and what they put into a site. Never written to."""
        ahead = self._ahead[step]() if step in self._ahead else {}
        return Streams(self.rows), ahead.get(path, self._inputs[step][path])

    def fetch(self, step: int, device: torch.device) -> None:
        """Start to bring a step's inputs to a CUDA device while it computes, and let go of earlier ones; `get` waits for them.
        On other devices, and for steps of which nothing is kept, nothing happens."""
        if device.type != "cuda" or step not in self._inputs or step in self._ahead:
            return
        self._ahead = {s: copied for s, copied in self._ahead.items() if s >= step - 1}
        self._copies = self._copies or SideCopies(device)
        self._ahead[step] = self._copies.start(self._inputs[step])
