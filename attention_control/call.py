"""One UNet call of a run: what is done in it is decided before it begins, so that a compiled UNet never sees its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from attention_control.errors import ControlError
from attention_control.routes import Route
from attention_control.run import CrossEdit
from attention_control.streams import Streams


@dataclass
class Call:
    """streams: its rows; step: which of the run's, 0-dim, since a Python number would be compiled in and every step anew;
    routes: what acts at each self-attention site; edits: of cross-attention; copied: the features that are copied; reference:
    source rows that are not in the batch, with what they put into each site; reached: routed sites and copied features met so
    far."""

    streams: Streams
    step: Tensor
    routes: Mapping[str, Route] = field(default_factory=dict)
    edits: Sequence[CrossEdit] = ()
    copied: frozenset[str] = frozenset()
    reference: Mapping[str, tuple[Streams, Tensor]] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)

    def require_rows(self, batch_rows: int) -> None:
        """Raises ControlError where the UNet was called with other rows than were declared."""
        if batch_rows != len(self.streams):
            raise ControlError(f"the UNet was called with {batch_rows} rows, but the step declared {len(self.streams)}")

    def require_reached(self) -> None:
        """Raises ControlError where a site or feature that should have been controlled was never met."""
        missed = sorted(self.routes.keys() - self.reached) or sorted(self.copied - self.reached)
        if not missed:
            return
        what = (
            "a UNet that was compiled and ran without control does not look for hooks again; call torch.compiler.reset() first"
            if missed[0] in self.copied
            else "something replaced the processors (attention slicing, for one); leave them alone while an edit runs"
        )
        raise ControlError(f"attention control was bypassed at {missed[0]} and {len(missed) - 1} more sites: {what}")
