"""The switches of a diffusers pipeline that save memory and leave what is computed alone."""

from __future__ import annotations

from typing import Any

from easyinv_edit.errors import InputError


def save_memory(pipe: Any) -> list[str]:
    """Turn them on; returns what was turned on, in words.

    Attention slicing is not among them: it replaces every attention processor and with them any control. Model offload needs an
    accelerator, and is left as it is where the pipeline's parts are placed by a device map or offloaded already.
    """
    done = []
    for name, words in (("enable_tiling", "the autoencoder works in tiles"), ("enable_slicing", "one picture at a time")):
        if hasattr(pipe.vae, name):
            getattr(pipe.vae, name)()
            done.append(words)
    return done + _offloaded(pipe)


def _offloaded(pipe: Any) -> list[str]:
    import torch

    if pipe.hf_device_map or any(hasattr(part, "_hf_hook") for part in pipe.components.values()):
        return []
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return []
    try:
        pipe.enable_model_cpu_offload()
    except (ImportError, RuntimeError, ValueError) as error:
        raise InputError(f"low memory: {str(error).splitlines()[0]}") from error
    return ["parts wait in host memory for their turn"]
