"""How an edit lays out its rows: row 0 is the source, the others are targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attention_control import StreamRow, Streams
from easyinv_edit.denoiser import BatchRow, Denoiser
from easyinv_edit.sampling import Sampler
from easyinv_edit.trajectory import Trajectory


def streams_of(batch: Sequence[BatchRow]) -> Streams:
    """Name the rows of a UNet batch for attention control."""
    return Streams(tuple(StreamRow("source" if b.row == 0 else "target", max(b.row - 1, 0), b.half) for b in batch))


def start_rows(
    trajectory: Trajectory, sampler: Sampler, targets: int, noise_mix: float, generator: torch.Generator | None
) -> Tensor:
    """The latents an edit starts from, the source's first, at the sampler's first level.

    noise_mix: share of fresh noise in the targets, variance kept.
    """
    source = trajectory.latents[-1 if sampler.start is None else sampler.start]
    own = source.repeat(targets, 1, 1, 1)
    if noise_mix > 0:
        on = "cpu" if generator is None else generator.device
        fresh = torch.randn(own.shape, generator=generator, device=on, dtype=own.dtype).to(own.device)
        own = (1 - noise_mix**2) ** 0.5 * own + noise_mix * fresh
    return torch.cat([source, own])


def source_scale(trajectory: Trajectory, sampler: Sampler, given: float | None) -> float:
    """The guidance scale of the source branch: the user's, else the method's, else that of the inversion."""
    return next(s for s in (given, sampler.source_guidance, trajectory.guidance_scale) if s is not None)


def laid_out(sampler: Sampler, reads_source: Callable[[int], bool], num_steps: int) -> Sampler:
    """The sampler with the twin of the source row decided at every level, after its own conditioning."""

    def condition(denoiser: Denoiser, level: int) -> Denoiser:
        return with_source_twin(sampler.condition(denoiser, level), reads_source(num_steps - level))

    return replace(sampler, condition=condition)


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
