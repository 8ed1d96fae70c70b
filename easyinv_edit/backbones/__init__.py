"""Model families: thin adapters over loaded diffusers pipelines. The only room that imports pipelines and text encoders.

To add a family: a file with a class that satisfies `easyinv_edit.denoiser.Backbone` and has `serves(pipe)`, and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyinv_edit.backbones.loading import load_lora, load_pipeline
from easyinv_edit.backbones.sd import StableDiffusion
from easyinv_edit.backbones.sdxl import StableDiffusionXL
from easyinv_edit.errors import ModelError

BACKBONES: dict[str, type[StableDiffusion]] = {"sd": StableDiffusion, "sdxl": StableDiffusionXL}


def wrap(pipe: Any, schedule: Mapping[str, Any] | None = None) -> StableDiffusion:
    """The adapter for a loaded pipeline. schedule: overrides, see `StableDiffusion`. Raises ModelError without a family."""
    for family in BACKBONES.values():
        if family.serves(pipe):
            return family(pipe, schedule)
    raise ModelError(
        f"{type(pipe).__name__} is of no known family ({', '.join(BACKBONES)}); load a text-to-image pipeline of Stable "
        "Diffusion 1.x, 2.x or XL (base), no inpainting model and no refiner"
    )


__all__ = ["BACKBONES", "StableDiffusion", "StableDiffusionXL", "load_lora", "load_pipeline", "wrap"]
