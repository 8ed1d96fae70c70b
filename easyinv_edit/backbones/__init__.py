"""Model families: thin adapters over loaded diffusers pipelines. The only room that imports pipelines and text encoders.

To add a family: a file with a class that satisfies `easyinv_edit.denoiser.Backbone` and has `serves(pipe)`, and a row here.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from easyinv_edit.backbones.sd import StableDiffusion
from easyinv_edit.errors import ModelError

BACKBONES: dict[str, type[StableDiffusion]] = {"sd": StableDiffusion}


def wrap(pipe: Any) -> StableDiffusion:
    """The adapter for a loaded pipeline. Raises ModelError where no family serves it."""
    for family in BACKBONES.values():
        if family.serves(pipe):
            return family(pipe)
    raise ModelError(
        f"{type(pipe).__name__} is of no known family ({', '.join(BACKBONES)}); load a Stable Diffusion 1.x or 2.x "
        "text-to-image pipeline"
    )


def load_pipeline(model: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """`DiffusionPipeline.from_pretrained` with safetensors only and no remote code. Raises ModelError in one line."""
    from diffusers import DiffusionPipeline

    options = {"use_safetensors": True, "trust_remote_code": False, **options}
    if dtype is not None:
        options["dtype"] = dtype
    try:
        return DiffusionPipeline.from_pretrained(model, **options)
    except Exception as error:  # a damaged folder makes diffusers raise nearly every type
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ModelError(
            f"{model}: cannot be loaded as a diffusers model ({reason}); give a folder or hub name with safetensors weights"
        ) from error
