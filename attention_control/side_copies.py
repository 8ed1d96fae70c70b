"""Copies to a CUDA device beside what it computes, on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class SideCopies:
    """Tested against a stand-in for CUDA's streams, not on CUDA: what waits for what is known, the time saved is not."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Start copying tensors, from pinned memory without waiting. The result gives the copies, and has the work that is
        queued after it wait for them."""
        # copies let go of earlier may still be read by queued work, and their memory is what this stream takes first
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copies = {path: tensor.to(self.device, non_blocking=True) for path, tensor in tensors.items()}
            done = self.stream.record_event()

        def copied() -> dict[str, Tensor]:
            torch.cuda.current_stream(self.device).wait_event(done)
            return copies

        return copied
