"""How an edit lays out its rows: row 0 is the source, the others are targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attention_control import StreamRow, Streams
from easyinv_edit.denoiser import BatchRow, Denoiser


def streams_of(batch: Sequence[BatchRow]) -> Streams:
    """Name the rows of a UNet batch for attention control."""
    return Streams(tuple(StreamRow("source" if b.row == 0 else "target", max(b.row - 1, 0), b.half) for b in batch))


def with_source_twin(denoiser: Denoiser, read_by_targets: bool) -> Denoiser:
    """Decide whether the source row needs an unconditional twin.

    Not where its prompt equals the negative one: guidance is then the identity, and one row serves both halves. Else where
    its own guidance asks for it, or where guided targets read it: each half reads its own, as in MasaCtrl's own layout.
    """
    assert denoiser.negative is not None
    first = [0]
    if denoiser.conditioning.select(first).equals(denoiser.negative.select(first)):
        return replace(denoiser, guidance=(1.0, *denoiser.guidance[1:]))
    guided = tuple(scale != 1 for scale in denoiser.guidance[1:])
    return replace(denoiser, twins=(denoiser.guidance[0] != 1 or (read_by_targets and any(guided)), *guided))
