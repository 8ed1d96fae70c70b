"""easyinv-edit: training-free, prompt-driven editing of real images with diffusion models.

    from easyinv_edit import EditPipeline

    pipe = EditPipeline.embedded()
    result = pipe("ball.png", "a red striped cube", source_prompt="a red striped ball")

Names are imported when first used, so that `import easyinv_edit` is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easyinv_edit.conditioning import Conditioning
    from easyinv_edit.errors import EasyInvError, EasyInvWarning, InputError
    from easyinv_edit.inversion import (
        BDIA,
        DDIM,
        EDICT,
        INVERSIONS,
        OBELM,
        EasyInv,
        EditFriendly,
        FixedPoint,
        NegativePrompt,
        NullText,
        PromptTuning,
        Proximal,
        ReNoise,
    )
    from easyinv_edit.pipeline import EditPipeline
    from easyinv_edit.recipe import EditRecipe
    from easyinv_edit.result import EditResult
    from easyinv_edit.running import run_recipe
    from easyinv_edit.trajectory import Trajectory

_HOMES = {
    "BDIA": "inversion",
    "Conditioning": "conditioning",
    "DDIM": "inversion",
    "EDICT": "inversion",
    "EasyInv": "inversion",
    "EasyInvError": "errors",
    "EasyInvWarning": "errors",
    "EditFriendly": "inversion",
    "EditPipeline": "pipeline",
    "EditRecipe": "recipe",
    "EditResult": "result",
    "FixedPoint": "inversion",
    "INVERSIONS": "inversion",
    "InputError": "errors",
    "NegativePrompt": "inversion",
    "NullText": "inversion",
    "OBELM": "inversion",
    "PromptTuning": "inversion",
    "Proximal": "inversion",
    "ReNoise": "inversion",
    "Trajectory": "trajectory",
    "run_recipe": "running",
}

__all__ = [
    "BDIA",
    "Conditioning",
    "DDIM",
    "EDICT",
    "INVERSIONS",
    "OBELM",
    "EasyInv",
    "EasyInvError",
    "EasyInvWarning",
    "EditFriendly",
    "EditPipeline",
    "EditRecipe",
    "EditResult",
    "FixedPoint",
    "InputError",
    "NegativePrompt",
    "NullText",
    "PromptTuning",
    "Proximal",
    "ReNoise",
    "Trajectory",
    "run_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'easyinv_edit' has no attribute {name!r}")
    return getattr(import_module(f"easyinv_edit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
