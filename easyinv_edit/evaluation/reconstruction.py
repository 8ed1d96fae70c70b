"""How well one inversion method is sampled back, on the pictures a tabletop model is judged by.

Sampled back means unpinned, at guidance 1, under the prompt it was inverted with. A pinned source is exact by construction.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.images import to_unit
from easyinv_edit.pipeline import EditPipeline


@dataclass(frozen=True)
class Reconstruction:
    """Means over pictures. psnr_latent_ceiling: dB against the autoencoder's round trip, the part inversion is to blame for;
    psnr: dB against the picture; ceiling: the round trip's own; noise_deviation: of z_T, 1 for true noise; evaluations: of
    inverting one picture; seconds: of inverting one picture."""

    method: str
    psnr_latent_ceiling: float
    psnr: float
    ceiling: float
    noise_deviation: float
    evaluations: float
    seconds: float


@torch.no_grad()
def reconstruct(
    pipe: EditPipeline, pictures: Sequence[Image.Image], prompts: Sequence[str], method: str, num_inference_steps: int = 50
) -> Reconstruction:
    """Invert and sample back every picture with one method."""
    rows = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        trajectory = pipe.invert(picture, prompt, method, num_inference_steps=num_inference_steps)
        back = to_unit(pipe.backbone.decode(pipe.reconstruct(trajectory, guidance_scale=1.0)[0]).double())
        ceiling = to_unit(pipe.backbone.decode(trajectory.clean).double())
        assert trajectory.source is not None
        truth = trajectory.source.permute(2, 0, 1)[None].cpu().double() / 255
        deviation = trajectory.noise.std().item()
        cost = trajectory.cost
        rows.append((psnr(back, ceiling), psnr(back, truth), psnr(ceiling, truth), deviation, cost.evaluations, cost.seconds))
    return Reconstruction(method, *(statistics.fmean(column) for column in zip(*rows, strict=True)))
