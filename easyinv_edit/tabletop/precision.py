"""The number format that training computes in; weights, their averages and optimisers stay in float32."""

from __future__ import annotations

import torch

EMULATED = ("DEFAULT", "NO AVX", "AVX2")
"""What `torch.backends.cpu.get_cpu_capability` calls processors that convolve and multiply bfloat16 only by emulation."""


def working(device: torch.device) -> torch.dtype:
    """bfloat16, or float32 on a CPU that would emulate it, many times slower."""
    emulated = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in EMULATED
    return torch.float32 if emulated else torch.bfloat16


def autocast(device: torch.device) -> torch.autocast:
    """A context in which a model on `device` runs in the working format."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=working(device) == torch.bfloat16)
