"""How an edit lays out its rows: the source is row 0, a second source (a style) row 1, the others are targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attention_control import StreamRow, Streams, Words
from easyinv_edit.denoiser import BatchRow, Denoiser, Prompt
from easyinv_edit.sampling import Sampler
from easyinv_edit.trajectory import Trajectory


def streams_of(batch: Sequence[BatchRow], sources: int = 1) -> Streams:
    """Name the rows of a UNet batch for attention control; the first `sources` of the sampled rows are sources."""
    return Streams(tuple(stream_row(b, sources) for b in batch))


def stream_row(row: BatchRow, sources: int = 1) -> StreamRow:
    """The name of one row."""
    if row.row < sources:
        return StreamRow("source", row.row, row.half)
    return StreamRow("target", row.row - sources, row.half)


def words_of(backbone: Any, prompts: Sequence[Prompt]) -> list[Words]:
    """The words of each prompt and their tokens."""
    found = [backbone.words(prompt) for prompt in prompts]
    return [Words(tuple(w for w, _ in pairs), tuple(t for _, t in pairs), length) for pairs, length in found]


def source_scale(trajectory: Trajectory, sampler: Sampler, given: float | None) -> float:
    """The guidance scale of the source branch: the user's, else the method's, else that of the inversion."""
    return next(s for s in (given, sampler.source_guidance, trajectory.guidance_scale) if s is not None)


def start_rows(
    trajectory: Trajectory, sampler: Sampler, targets: int, noise_mix: float, generator: torch.Generator | None
) -> Tensor:
    """The latents an edit starts from, the sources' first, at the sampler's first level; targets start from row 0's.

    noise_mix: share of fresh noise in the targets, variance kept.
    """
    sources = trajectory.latents[-1 if sampler.start is None else sampler.start]
    own = sources[:1].repeat(targets, 1, 1, 1)
    if noise_mix > 0:
        on = "cpu" if generator is None else generator.device
        fresh = torch.randn(own.shape, generator=generator, device=on, dtype=own.dtype).to(own.device)
        own = (1 - noise_mix**2) ** 0.5 * own + noise_mix * fresh
    return torch.cat([sources, own])


def laid_out(
    sampler: Sampler, reads_both_halves: Callable[[int], bool], num_steps: int, sources: int = 1, pinned: bool = False
) -> Sampler:
    """The sampler with the twins of the source rows decided at every level, after its own conditioning."""

    def condition(denoiser: Denoiser, level: int) -> Denoiser:
        return with_source_twins(sampler.condition(denoiser, level), reads_both_halves(num_steps - level), sources, pinned)

    return replace(sampler, condition=condition)


def with_source_twins(denoiser: Denoiser, read_by_targets: bool, sources: int = 1, pinned: bool = False) -> Denoiser:
    """Decide whether a source row needs an unconditional twin.

    Not where its prompt equals the negative one: guidance is then the identity, and one row serves both halves. Else where
    its own guidance asks for it and it is not pinned, or where guided targets read it: each half reads its own, as in
    MasaCtrl's own layout.
    """
    assert denoiser.negative is not None
    guidance, rows = list(denoiser.guidance), range(len(denoiser.guidance))
    guided = any(scale != 1 for scale in guidance[sources:])
    twins = [scale != 1 for scale in guidance]
    for r in rows[:sources]:
        if pinned:
            guidance[r] = 1.0
        if denoiser.conditioning.select([r]).equals(denoiser.negative.select([r])):
            guidance[r], twins[r] = 1.0, False
        else:
            twins[r] = guidance[r] != 1 or (read_by_targets and guided)
    return replace(denoiser, guidance=tuple(guidance), twins=tuple(twins))
