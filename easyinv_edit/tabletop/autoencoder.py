"""Train, whiten and gate the tabletop autoencoder.

The gate comes before any UNet is trained: what the latents cannot hold, no sampler can draw.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from easyinv_edit.tabletop.fitting import Fit, fit

OBJECT_WEIGHT = 5.0
EDGE_WEIGHT = 0.5
KL_WEIGHT = 1e-6
"""Per picture, on the summed KL divergence: just enough to keep the latents bounded."""


def to_model_range(pictures: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], channels last."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def reconstruction_loss(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Object-weighted L1 + 2 L2, and L1 of the picture's gradients; all (B, C, H, W)."""
    weight = 1 + OBJECT_WEIGHT * mask
    error = output - target
    value = (weight * (error.abs() + 2 * error.square())).sum() / (weight.sum() * error.shape[1])
    across, down = error.diff(dim=-1).abs(), error.diff(dim=-2).abs()
    edges = (weight[..., 1:] * across).mean() + (weight[..., 1:, :] * down).mean()
    return value + EDGE_WEIGHT * edges / weight.mean()


def train(vae: AutoencoderKL, pictures: Tensor, masks: Tensor, settings: Fit, folder: Path) -> dict[str, Any]:
    """Train `vae` on uint8 pictures (N, 3, H, W) and masks (N, 1, H, W), mirrored at random; returns the record."""
    device = next(vae.parameters()).device

    def loss(generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(pictures), (settings.batch,), generator=generator)
        picture, mask = to_model_range(pictures[rows]).to(device), masks[rows].to(device).float() / 255
        if torch.rand((), generator=generator) < 0.5:
            picture, mask = picture.flip(-1), mask.flip(-1)
        posterior = vae.encode(picture).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        output = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean()
        with torch.autocast(device.type, enabled=False):
            value = reconstruction_loss(output.float(), picture, mask)
        return value + KL_WEIGHT * kl.float(), {"reconstruction": value.item(), "kl": kl.item()}

    return fit("autoencoder", vae.to(memory_format=torch.channels_last), loss, settings, folder)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """Posterior modes of uint8 pictures: (N, 4, H / 4, W / 4) float32 on the CPU."""
    device = next(vae.parameters()).device
    return torch.cat(
        [vae.encode(to_model_range(part).to(device)).latent_dist.mode().cpu() for part in torch.split(pictures, batch)]
    )


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: Tensor) -> dict[str, list[float]]:
    """Give every latent channel mean 0 and deviation 1 by folding the change into the 1 x 1 convolutions; exact.

    Returns the statistics before the change.
    """
    latents = encode(vae, pictures)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    device = vae.quant_conv.weight.device
    m, d = mean.to(device), deviation.to(device)
    channels = len(m)
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:channels] /= d[:, None, None, None]
    bias[:channels] = (bias[:channels] - m) / d
    bias[channels:] -= 2 * d.log()
    post_weight, post_bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
    post_bias += (post_weight[:, :, 0, 0] * m).sum(1)
    post_weight *= d[None, :, None, None]
    return {"mean": mean.tolist(), "deviation": deviation.tolist()}


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """Encode and decode uint8 pictures: float32 [0, 1] on the CPU."""
    device = next(vae.parameters()).device
    parts = []
    for part in torch.split(pictures, batch):
        latents = vae.encode(to_model_range(part).to(device)).latent_dist.mode()
        parts.append((vae.decode(latents).sample.float().cpu() / 2 + 0.5).clamp(0, 1))
    return torch.cat(parts)


def gate(vae: AutoencoderKL, pictures: Tensor, masks: Tensor) -> dict[str, float]:
    """PSNR in dB of the round trip on held-out pictures: over the whole picture and inside the object."""
    error = (round_trip(vae, pictures) - pictures.float() / 255).square()
    inside = (masks > 127).expand_as(error)
    return {"psnr": -10 * math.log10(error.mean().item()), "object_psnr": -10 * math.log10(error[inside].mean().item())}
