"""DINO structure distance: how far the layout of two pictures is apart, whatever their colours and textures.

Tumanyan, Bar-Tal, Bagon and Dekel, "Splicing ViT Features for Semantic Appearance Transfer", arXiv 2201.00424, eq. 2 and 3: the
keys of the last block of a DINO vision transformer, all heads together, give a matrix of cosine similarities between all
places of a picture (and the class token); the distance is the mean squared difference of two pictures' matrices. The model is
read from a local folder; nothing is downloaded.

PIE-Bench's evaluation feeds the network pixels from 0 to 255 with ImageNet's mean and deviation of pixels from 0 to 1, and
resizes without antialiasing (torchvision 0.13, which it names, does so for tensors). Its tables can only be compared with
`compat=True`, which does the same; `compat=False` is what the paper means. The two are different quantities.
"""

from __future__ import annotations

import math
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import ViTModel

from easyinv_edit.errors import InputError
from easyinv_edit.evaluation.clip_score import open_model, vit_name
from easyinv_edit.evaluation.metrics import black_outside, check_pictures

ADVICE = "download facebook/dino-vitb8 from https://huggingface.co"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of pictures in [0, 1]."""
KEYS = (".attention.k_proj", ".attention.attention.key")
"""How the module that makes a block's keys is called, by versions of transformers."""


class StructureDistance:
    """DINO structure distance with a model from a local folder, float32.

    folder: a vision transformer as transformers saves it, for PIE-Bench DINO's ViT-B/8; compat: as PIE-Bench computes it, see
    this module's text; device: where to compute. Raises InputError where the folder holds something else.
    """

    def __init__(self, folder: str | PathLike[str], *, compat: bool, device: str | torch.device = "cpu") -> None:
        self.compat, self.device = compat, torch.device(device)
        options = {"add_pooling_layer": False}
        self._model = open_model(ViTModel, Path(folder), "a vision transformer", ADVICE, **options).to(self.device)
        named = [module for name, module in self._model.named_modules() if name.endswith(KEYS)]
        if not named:
            raise InputError(f"{folder}: no block of {type(self._model).__name__} has keys called {' or '.join(KEYS)}")
        self._last_keys = named[-1]
        self._mean, self._deviation = (torch.tensor(c, device=self.device)[:, None, None] for c in (MEAN, DEVIATION))

    @property
    def name(self) -> str:
        """What tables call it; the net and PIE-Bench's scale are part of the name."""
        return f"DINO structure ({vit_name(self._model.config)}{', 0-255' if self.compat else ''})"

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
        """Distances (B,) of RGB pictures (B, 3, H, W) in [0, 1], float32 on the CPU; 0 where they are equal.

        Pictures are resized, without keeping their proportions, to the square the model was trained on (224 x 224). mask:
        (B or 1, 1, H, W): both pictures are made black where it is not above 0.5 ("compat"); nan where it is empty. Raises
        InputError for other shapes or values.
        """
        check_pictures(a, b)
        if mask is None:
            return self._distance(a, b)
        (a, empty), (b, _) = black_outside(a, mask), black_outside(b, mask)
        return self._distance(a, b).masked_fill(empty, math.nan)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        return (self._self_similarity(a) - self._self_similarity(b)).square().mean((1, 2)).cpu()

    def _self_similarity(self, pictures: Tensor) -> Tensor:
        """Cosines (B, places, places) between the keys of all places, the class token first."""
        side = self._model.config.image_size
        size = (side, side) if isinstance(side, int) else tuple(side)
        levels = pictures.to(self.device, torch.float32) * (255 if self.compat else 1)
        small = functional.interpolate(levels, size, mode="bilinear", antialias=not self.compat)
        keys = self._keys((small - self._mean) / self._deviation)
        norms = keys.norm(dim=2, keepdim=True)
        return keys @ keys.mT / (norms @ norms.mT).clamp(min=1e-8)

    def _keys(self, pixels: Tensor) -> Tensor:
        """Keys (B, places, width) of the last block."""
        found: list[Tensor] = []
        hook = self._last_keys.register_forward_hook(lambda _module, _given, keys: found.append(keys))
        try:
            self._model(pixel_values=pixels)
        finally:
            hook.remove()
        return found[0]
