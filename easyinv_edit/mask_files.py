"""A user's masks: a picture, array or tensor becomes values from 0 to 1, in the same frame as the edited picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from easyinv_edit import images
from easyinv_edit.errors import EasyInvWarning


def reader(fit: Mapping[str, Any] | None, size: tuple[int, int]) -> Callable[[Any], Tensor]:
    """A function from what the user gave to a mask (height, width) float32 in [0, 1], white being 1.

    fit: how the source was brought to the model's size (a trajectory's record): a mask of the original's size is brought there
    the same way; size: (height, width) of the model's picture: a mask of that size is taken as it is, any other is stretched to
    it with a warning. Booleans and tensors (h, w) are masks too. Raises ImageError where a mask cannot be read.
    """
    record = None if fit is None else images.Fit.from_dict(fit)

    def read(given: Any) -> Tensor:
        picture = _picture(given)
        if record is not None and picture.size == record.original:
            picture = images.fit(picture, size, record.policy)[0]
        elif picture.size != size[::-1]:
            warnings.warn(
                f"the mask is {picture.width} x {picture.height} pixels and the picture {size[1]} x {size[0]}; it is stretched",
                EasyInvWarning,
                stacklevel=2,
            )
            picture = images.fit(picture, size, "stretch")[0]
        return torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255)

    return read


def _picture(given: Any) -> Image.Image:
    array = given.detach().cpu().float().numpy() if isinstance(given, Tensor) else given
    if isinstance(array, np.ndarray) and array.dtype == bool:
        array = array.astype(np.float32)
    return images.load(array)
