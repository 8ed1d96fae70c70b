"""What a piece of work costs: UNet evaluations, time and memory, counted at one place.

An evaluation is one UNet forward of ONE row, so a classifier-free guidance pair is two. The count is taken by a hook on the
network itself: no method counts anything, so none can miscount.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Cost:
    """evaluations: rows sent through the UNet; calls: forward calls; seconds: wall clock, device work finished;
    peak_memory_bytes: peak of the CUDA allocator, elsewhere the largest resident size of the process so far."""

    evaluations: int = 0
    calls: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0


@contextmanager
def measured(network: nn.Module, device: torch.device | None = None) -> Iterator[Cost]:
    """Measure what runs on `network` inside the block; the yielded Cost is complete when the block ends.

    device: where it computes, by default where its weights are, which is not the same under offload.
    """
    cost = Cost()

    def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        cost.evaluations += sample.shape[0]
        cost.calls += 1

    device = next(network.parameters()).device if device is None else device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    hook = network.register_forward_pre_hook(count, with_kwargs=True)
    began = time.perf_counter()
    try:
        yield cost
    finally:
        hook.remove()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - began
        cost.peak_memory_bytes = _peak_memory(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
