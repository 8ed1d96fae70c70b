"""Pixels to latents and back, by whatever autoencoder the pipeline holds: AutoencoderKL, AutoencoderTiny and their like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels (rows, 3, H, W) in [-1, 1] -> latents by the posterior's mode, in the units of the UNet."""
    with _float32(vae):
        encoded = vae.encode(pixels.to(vae.dtype))
    z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    mean, factor = _units(vae, z)
    return (z - mean) * factor


def decode(vae: Any, z: Tensor) -> Tensor:
    """Latents -> pixels (rows, 3, H, W) in about [-1, 1], float32."""
    mean, factor = _units(vae, z)
    with _float32(vae):
        return vae.decode((z / factor + mean).to(vae.dtype), return_dict=False)[0].float()


def _units(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """(mean, factor): the UNet's latents are (the autoencoder's - mean) * factor."""
    scale: float = vae.config.scaling_factor
    mean, deviation = (getattr(vae.config, key, None) for key in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return 0.0, scale
    return _channels(mean, like), scale / _channels(deviation, like)


def _channels(values: Any, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(1, -1, 1, 1)


@contextmanager
def _float32(vae: Any) -> Iterator[None]:
    """The autoencoder in float32 where it is float16, whose range its activations leave; cast back, without loss, afterwards.

    One whose configuration says `force_upcast: false` (the float16 fix of SDXL's, AutoencoderTiny) stays as it is, and so does
    one of several dtypes (layerwise casting, quantisation), which could not be cast back.
    """
    half = getattr(vae.config, "force_upcast", True) and {p.dtype for p in vae.parameters()} == {torch.float16}
    try:
        if half:
            nn.Module.to(vae, torch.float32)  # diffusers' own `to` logs a warning about the cast
        yield
    finally:
        if half:
            nn.Module.to(vae, torch.float16)
