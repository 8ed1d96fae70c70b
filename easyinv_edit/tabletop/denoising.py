"""Train the tabletop UNet together with its text encoder on whitened latents and random captions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from easyinv_edit.tabletop.captions import training_caption
from easyinv_edit.tabletop.fitting import Fit, fit
from easyinv_edit.tabletop.networks import build_scheduler
from easyinv_edit.tabletop.scene import Scene

TRAIN_STEPS = 1000
BANDS = (0, 300, 600, TRAIN_STEPS)
"""Timestep bands whose errors are logged apart: edges and texture, parts, layout."""


def loss_weight(alphas: Tensor, progress: float) -> Tensor:
    """Weight of the squared epsilon error at cumulative alphas (B,): (B,).

    min(snr + 1, 5) / snr, at most 30: v-prediction's weighting on an epsilon model, without which the layout, all of which is
    decided in strong noise on a 16 x 16 latent, is never learnt. In the last 40 % of the budget half of it gives way to a
    constant, so that low noise, where textures and inversion's accuracy live, is trained too.
    """
    snr = alphas / (1 - alphas)
    layout = ((snr + 1).clamp(max=5) / snr).clamp(max=30)
    return layout if progress < 0.6 else 0.5 * layout + 0.75


def train(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    scenes: Sequence[Scene],
    settings: Fit,
    folder: Path,
    on_save: Callable[[int], None] | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Train both networks in place on latents (N, 4, 16, 16) of `scenes`; returns the record. See `fit` for the rest.

    compiled: the UNet runs through torch.compile. On two CPU cores that took 3 to 6 minutes to begin with, and then the log had
    118 samples a second instead of 97 to 100 (a UNet half as wide at the top as today's).
    """
    device = next(unet.parameters()).device
    predict = torch.compile(unet) if compiled else unet
    alphas_cumprod = build_scheduler().alphas_cumprod

    def loss(generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(latents), (settings.batch,), generator=generator)
        rng = random.Random(int(torch.randint(2**31, (), generator=generator)))
        captions = [training_caption(scenes[i], rng) for i in rows.tolist()]
        # Stratified timesteps: every batch sees all noise levels.
        share = (torch.arange(settings.batch) + torch.rand(settings.batch, generator=generator)) / settings.batch
        timesteps = (share * TRAIN_STEPS).long().clamp(max=TRAIN_STEPS - 1)
        alphas = alphas_cumprod[timesteps]
        noise = torch.randn(latents[rows].shape, generator=generator)
        signal, spread = alphas.sqrt()[:, None, None, None], (1 - alphas).sqrt()[:, None, None, None]
        noisy = (signal * latents[rows] + spread * noise).contiguous(memory_format=torch.channels_last)
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        text = text_encoder(tokens.to(device))[0]
        output = predict(noisy.to(device), timesteps.to(device), encoder_hidden_states=text)[0]
        error = (output.float() - noise.to(device)).square().mean((1, 2, 3))
        return (loss_weight(alphas, progress).to(device) * error).mean(), _bands(timesteps, error)

    model = nn.ModuleDict({"unet": unet.to(memory_format=torch.channels_last), "text": text_encoder}).train()
    record = fit("unet", model, loss, settings, folder, on_save)
    model.eval()
    return record


def _bands(timesteps: Tensor, error: Tensor) -> dict[str, float]:
    """Mean squared epsilon error per timestep band."""
    error = error.detach().cpu()
    inside = {f"t{low}": (timesteps >= low) & (timesteps < high) for low, high in pairwise(BANDS)}
    return {name: error[rows].mean().item() for name, rows in inside.items()}
