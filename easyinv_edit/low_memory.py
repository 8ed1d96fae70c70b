"""The switches of a diffusers pipeline that save memory and leave what its UNet computes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from easyinv_edit.errors import InputError, first_line


def save_memory(pipe: Any, device: torch.device | None = None) -> list[str]:
    """Turn them on; returns what was turned on, in words.

    device: the accelerator that offloaded parts visit, by default the one that is there. Attention slicing is not among them:
    it replaces every attention processor and with them any control. Model offload needs an accelerator, and is left as it is
    where the pipeline's parts are placed by a device map or offloaded already.
    """
    done = []
    for name, words in (("enable_tiling", "the autoencoder works in tiles"), ("enable_slicing", "one picture at a time")):
        if hasattr(pipe.vae, name):
            getattr(pipe.vae, name)()
            done.append(words)
    return done + _offloaded(pipe, _accelerator() if device is None else device)


def _accelerator() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def _offloaded(pipe: Any, device: torch.device) -> list[str]:
    if device.type == "cpu" or getattr(pipe, "hf_device_map", None):
        return []
    if any(hasattr(part, "_hf_hook") for part in pipe.components.values()) or _in_groups(pipe):
        return []
    try:
        pipe.enable_model_cpu_offload(device=device)
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(f"low memory: {first_line(error)}") from error
    return ["parts wait in host memory for their turn"]


def _in_groups(pipe: Any) -> bool:
    """Whether any part is offloaded by groups of layers, beside which diffusers refuses to offload whole parts."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    hooks: list[Any] = [getattr(module, "_diffusers_hook", None) for part in parts for module in part.modules()]
    return any(hook is not None and hook.get_hook("group_offloading") is not None for hook in hooks)
