"""Train, whiten and gate the tabletop autoencoder, and train its decoder on.

The gate comes before any UNet is trained: what the latents cannot hold, no sampler can draw.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from easyinv_edit.tabletop.fitting import Fit, fit

OBJECT_WEIGHT = 5.0
EDGE_WEIGHT = 0.5
KL_WEIGHT = 3e-7
"""Per picture, on the summed KL divergence: just enough to keep the latents bounded."""
CROP = 64
"""Side of the crops around the objects that the first part of the training sees, pixels: the ground is learnt soon."""
CROPPED_UNTIL = 0.6
"""Share of the budget that is spent on crops."""
FLIPPED_SHARE = 0.25
HALVED_SHARE = 0.1
"""How often the decoder gets mirrored or halved latents and must draw the mirrored or halved picture: latents that behave as
a picture does are easier to learn for the UNet (EQ-VAE, arXiv 2502.09509, which also turns them)."""
AT_ONCE = 8
"""Pictures that are encoded or decoded together: what a CPU's cache holds; more at once take longer there."""


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
    """Train `vae` on uint8 pictures (N, 3, H, W) and masks (N, 1, H, W), mirrored at random; returns the record.

    A step sees `settings.batch` pictures, or, in the first part, four crops for each of them.
    """
    device = next(vae.parameters()).device

    def loss(generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        cropped = progress < CROPPED_UNTIL
        rows = torch.randint(len(pictures), (settings.batch * (4 if cropped else 1),), generator=generator)
        bytes_, cover = pictures[rows], masks[rows]
        if cropped:
            bytes_, cover = object_crops(bytes_, cover, generator)
        picture, mask = to_model_range(bytes_).to(device), cover.to(device).float() / 255
        if torch.rand((), generator=generator) < 0.5:
            picture, mask = picture.flip(-1), mask.flip(-1)
        posterior = vae.encode(picture).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        changed = equivariant(posterior.mean + posterior.std * noise, picture, mask, generator)
        output = vae.decode(changed[0].contiguous(memory_format=torch.channels_last)).sample
        kl = posterior.kl().mean()
        with torch.autocast(device.type, enabled=False):
            value = reconstruction_loss(output.float(), *changed[1:])
        return value + KL_WEIGHT * kl.float(), {"reconstruction": value.item(), "kl": kl.item()}

    return fit("autoencoder", vae.to(memory_format=torch.channels_last), loss, settings, folder)


def train_decoder(
    vae: AutoencoderKL, latents: Tensor, pictures: Tensor, masks: Tensor, settings: Fit, folder: Path
) -> dict[str, Any]:
    """Train the decoder alone, on latents (N, 4, h, w) of `pictures` that stay as they are; returns the record.

    A step costs no pass through the encoder, and a UNet that was trained on the latents stays fit for them.
    """
    device = next(vae.parameters()).device

    def loss(generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(pictures), (settings.batch,), generator=generator)
        z = latents[rows].to(device).contiguous(memory_format=torch.channels_last)
        picture, mask = to_model_range(pictures[rows]).to(device), masks[rows].to(device).float() / 255
        output = vae.decode(z).sample
        with torch.autocast(device.type, enabled=False):
            value = reconstruction_loss(output.float(), picture, mask)
        return value, {}

    vae.to(memory_format=torch.channels_last)
    trained = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    record = fit("decoder", trained.train(), loss, settings, folder)
    trained.eval()
    return record


def object_crops(pictures: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One crop of side `CROP` from each picture (B, 3, H, W) and mask (B, 1, H, W), around a random point of its objects."""
    coarse = nn.functional.avg_pool2d(masks.float(), 8) + 1e-3
    points = torch.multinomial(coarse.flatten(1), 1, generator=generator)[:, 0]
    jitter = torch.randint(8, (2, len(points)), generator=generator)
    width = coarse.shape[-1]
    corners = torch.stack([points // width, points % width]) * 8 + jitter - CROP // 2
    tops, lefts = corners.clamp(0, pictures.shape[-1] - CROP).tolist()
    cut = [
        [images[i, :, top : top + CROP, left : left + CROP] for i, (top, left) in enumerate(zip(tops, lefts, strict=True))]
        for images in (pictures, masks)
    ]
    return torch.stack(cut[0]), torch.stack(cut[1])


def equivariant(latents: Tensor, picture: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The latents, the picture and the mask, now and then all mirrored or all halved: see `FLIPPED_SHARE`."""
    draw = torch.rand((), generator=generator).item()
    if draw < FLIPPED_SHARE:
        return latents.flip(-1), picture.flip(-1), mask.flip(-1)
    if draw < FLIPPED_SHARE + HALVED_SHARE:
        half = nn.functional.avg_pool2d
        return half(latents, 2), half(picture, 2), half(mask, 2)
    return latents, picture, mask


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = AT_ONCE) -> Tensor:
    """Posterior modes of uint8 pictures: (N, 4, H / 8, W / 8) float32 on the CPU."""
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
def round_trip(vae: AutoencoderKL, pictures: Tensor, batch: int = AT_ONCE) -> Tensor:
    """Encode and decode uint8 pictures: float32 [0, 1] on the CPU."""
    device = next(vae.parameters()).device
    decoded = [vae.decode(part.to(device)).sample.float().cpu() for part in torch.split(encode(vae, pictures, batch), batch)]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


def gate(vae: AutoencoderKL, pictures: Tensor, masks: Tensor) -> dict[str, float]:
    """PSNR in dB of the round trip on held-out pictures: over the whole picture and inside the object."""
    error = (round_trip(vae, pictures) - pictures.float() / 255).square()
    inside = (masks > 127).expand_as(error)
    return {"psnr": -10 * math.log10(error.mean().item()), "object_psnr": -10 * math.log10(error[inside].mean().item())}
