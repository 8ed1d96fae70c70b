"""The inverting half of an edit: images become rows, rows become one batch of latents, and the batch comes apart again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attention_control import CONTROLLERS, Run
from easyinv_edit import images as pictures
from easyinv_edit.choices import build
from easyinv_edit.conditions import Conditions, Row, given_parts
from easyinv_edit.cost import Cost
from easyinv_edit.denoiser import Denoiser, Prompt
from easyinv_edit.images import Fit, ImageInput, Policy
from easyinv_edit.inversion import InversionMethod
from easyinv_edit.inversion.base import Generators, OnLevel
from easyinv_edit.mask_files import reader
from easyinv_edit.source_features import fingerprint, kept_while_inverting
from easyinv_edit.trajectory import Trajectory


@dataclass(frozen=True)
class Source:
    """One image to be inverted. pixels: (1, 3, H, W) in [-1, 1]; fit: how it came to that size; given: see `given_parts`."""

    pixels: Tensor
    fit: Fit
    prompt: Prompt
    given: Mapping[str, Tensor]

    @property
    def row(self) -> Row:
        """What it is conditioned on."""
        return Row(self.prompt, self.fit.framing, self.given)


def sources_of(
    backbone: Any,
    images: Sequence[ImageInput],
    prompts: Sequence[Prompt],
    size: tuple[int, int],
    policy: Policy,
    conditions: Conditions,
) -> list[Source]:
    """The images, read and fitted to `size` (height, width), each with its prompt; all see the same `conditions`."""
    made = []
    for image, prompt in zip(images, prompts, strict=True):
        picture, record = pictures.fit(pictures.load(image), size, policy)
        made.append(Source(pictures.to_tensor(picture), record, prompt, given_parts(backbone, prompt, conditions, size)))
    return made


def inverted(
    denoiser: Denoiser,
    method: InversionMethod,
    sources: Sequence[Source],
    keep_features: Any,
    generator: Generators,
    on_level: OnLevel,
) -> Trajectory:
    """All sources as one trajectory of several rows, with the features a controller wants kept, if one is given."""
    backbone: Any = denoiser.backbone
    z0 = backbone.encode(torch.cat([source.pixels for source in sources]).to(backbone.device))
    if keep_features is None:
        batch = method.invert(denoiser, z0, on_level, generator)
    else:
        control = build(CONTROLLERS, keep_features, "controller")
        run = Run(len(denoiser.schedule), _sides(z0), read_mask=_mask_reader(sources[0].fit), device=backbone.device)
        with ExitStack() as stack:
            kept = kept_while_inverting(denoiser, control, run, method.name, getattr(method, "passes", 1))
            watched, features = stack.enter_context(kept)
            batch = method.invert(watched, z0, on_level, generator)
        features.source = fingerprint(batch)
        batch = replace(batch, features=features)
    told = denoiser.conditioning.guidance  # the scale of a distilled model, whose rows have no twins
    return batch if told is None else replace(batch, guidance_scale=told[0].item())


def _sides(z: Tensor) -> tuple[int, int]:
    return z.shape[-2], z.shape[-1]


def _mask_reader(fit: Fit) -> Callable[[Any], Tensor]:
    return reader(fit.as_dict(), fit.size)


def apart(batch: Trajectory, sources: Sequence[Source], model: Mapping[str, Any], cost: Cost) -> list[Trajectory]:
    """One trajectory per source, with all that an edit needs to know of it."""
    rows = replace(batch, model=model, cost=cost).rows()
    return [
        replace(
            row,
            prompt=source.prompt if isinstance(source.prompt, str) else "",
            source=pictures.to_uint8(source.pixels)[0],
            fit=source.fit.as_dict(),
            given=source.given,
        )
        for row, source in zip(rows, sources, strict=True)
    ]
