"""Inversion methods: a clean latent becomes a trajectory of latents. One paper per file.

To add one: a file with a frozen dataclass that satisfies `InversionMethod`, and a row here. Tests, recipes, the command line
and the README table find it by that row.

Direct inversion (PnP inversion, Ju et al., arXiv 2310.01506) is not a row: its offsets put the source branch back on the
inversion's latents at every level, which is what the pinned source of every edit does (`pin_source`), bit for bit and free.
"""

from __future__ import annotations

import dataclasses

from easyinv_edit.choices import build
from easyinv_edit.inversion.base import InversionMethod, climb
from easyinv_edit.inversion.bdia import BDIA
from easyinv_edit.inversion.ddim import DDIM
from easyinv_edit.inversion.easyinv import EasyInv
from easyinv_edit.inversion.edict import EDICT
from easyinv_edit.inversion.edit_friendly import EditFriendly
from easyinv_edit.inversion.fixed_point import FixedPoint
from easyinv_edit.inversion.negative_prompt import NegativePrompt
from easyinv_edit.inversion.null_text import NullText
from easyinv_edit.inversion.obelm import OBELM
from easyinv_edit.inversion.prompt_tuning import PromptTuning
from easyinv_edit.inversion.proximal import Proximal
from easyinv_edit.inversion.renoise import ReNoise
from easyinv_edit.sampling import Sampler
from easyinv_edit.trajectory import Trajectory

INVERSIONS: dict[str, type[InversionMethod]] = {
    "easyinv": EasyInv,
    "ddim": DDIM,
    "fixed_point": FixedPoint,
    "renoise": ReNoise,
    "negative_prompt": NegativePrompt,
    "proximal": Proximal,
    "null_text": NullText,
    "prompt_tuning": PromptTuning,
    "edit_friendly": EditFriendly,
    "edict": EDICT,
    "bdia": BDIA,
    "obelm": OBELM,
}


def for_guidance(name: str, guidance: float) -> InversionMethod:
    """A registered method with its defaults; one that fits itself to the edit's guidance scale is told it."""
    fields = {f.name for f in dataclasses.fields(INVERSIONS[name])}  # type: ignore[arg-type]
    return INVERSIONS[name](**({"guidance_scale": guidance} if "guidance_scale" in fields else {}))


def sampler_of(trajectory: Trajectory) -> Sampler:
    """How a trajectory is sampled: as its method says, or by DDIM's steps where the method is not one of these.

    Raises InputError where the settings that came with the trajectory are none of its method's.
    """
    if trajectory.method not in INVERSIONS:
        return Sampler()
    method: InversionMethod = build(INVERSIONS, {"name": trajectory.method, **trajectory.settings}, "inversion method")
    return method.sampler(trajectory)


__all__ = [
    "BDIA",
    "DDIM",
    "EDICT",
    "INVERSIONS",
    "OBELM",
    "EasyInv",
    "EditFriendly",
    "FixedPoint",
    "InversionMethod",
    "NegativePrompt",
    "NullText",
    "PromptTuning",
    "Proximal",
    "ReNoise",
    "climb",
    "for_guidance",
    "sampler_of",
]
