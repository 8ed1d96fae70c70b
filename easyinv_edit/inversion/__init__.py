"""Inversion methods: a clean latent becomes a trajectory of latents. One paper per file.

To add one: a file with a frozen dataclass that satisfies `InversionMethod`, and a row here. Tests, recipes, the command line
and the README table find it by that row.
"""

from __future__ import annotations

from easyinv_edit.inversion.base import InversionMethod, climb
from easyinv_edit.inversion.ddim import DDIM
from easyinv_edit.inversion.easyinv import EasyInv
from easyinv_edit.inversion.fixed_point import FixedPoint

INVERSIONS: dict[str, type[InversionMethod]] = {
    "ddim": DDIM,
    "easyinv": EasyInv,
    "fixed_point": FixedPoint,
}

__all__ = ["DDIM", "INVERSIONS", "EasyInv", "FixedPoint", "InversionMethod", "climb"]
