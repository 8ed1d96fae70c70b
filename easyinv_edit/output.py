"""From the latents an edit ends with to what the user asked for: decoded, checked, brought back to the image's own size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from easyinv_edit import images
from easyinv_edit.cost import Cost
from easyinv_edit.denoiser import Prompt
from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.result import EditResult
from easyinv_edit.trajectory import Trajectory

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def finish(
    backbone: Any,
    trajectory: Trajectory,
    prompts: Sequence[str],
    z: Tensor,
    *,
    recipe: Mapping[str, Any],
    cost: Mapping[str, Cost],
    output_type: str,
    pinned: bool,
    features: Mapping[str, Any] | None,
) -> EditResult:
    """Build the result of an edit from its latents z (1 + targets, C, H, W), the source branch first.

    A pinned source branch ends as the encoded source itself, so its picture is decoded once for both.
    """
    if output_type == "latent":
        return EditResult(z[1:], prompts, trajectory, recipe, cost, features=features)
    pixels = backbone.decode(torch.cat([trajectory.clean.to(z), z[1:] if pinned else z]))
    ceiling, reconstruction = pixels[:1], pixels[:1] if pinned else pixels[1:2]
    checked, flagged = backbone.check_pixels(pixels[-len(prompts) :])
    source, quality = None, {}
    if trajectory.source is not None:
        truth = trajectory.source.permute(2, 0, 1)[None].cpu()
        source = images.to_pil(truth.float() / 127.5 - 1)[0]
        unit = truth.double() / 255
        quality = {
            "psnr": psnr(images.to_unit(reconstruction).double(), unit),
            "vae_psnr": psnr(images.to_unit(ceiling).double(), unit),
        }
    return EditResult(
        images=_output(checked, trajectory, output_type),
        prompts=prompts,
        trajectory=trajectory,
        recipe=recipe,
        cost=cost,
        source=source,
        reconstruction=images.to_pil(reconstruction)[0],
        edited=images.to_pil(checked),
        quality=quality,
        flagged=flagged,
        features=features,
    )


def texts_of(prompts: Sequence[Prompt]) -> list[str]:
    """The prompts as a result records them: embeddings cannot be written down."""
    return [prompt if isinstance(prompt, str) else "(embeddings)" for prompt in prompts]


def inversion_recipe(trajectory: Trajectory) -> dict[str, Any]:
    """What an inversion contributes to the recipe of an edit."""
    return {
        "source_prompt": trajectory.prompt,
        "num_inference_steps": len(trajectory.schedule),
        "inversion": {"name": trajectory.method, **trajectory.settings},
        "inversion_guidance_scale": trajectory.guidance_scale,
        "fit": (trajectory.fit or {}).get("policy", "crop"),
    }


def _output(pixels: Tensor, trajectory: Trajectory, output_type: str) -> Any:
    """Pixels (B, 3, H, W) in [-1, 1] in the form asked for."""
    if output_type == "pt":
        return images.to_unit(pixels)
    if output_type == "np":
        return images.to_unit(pixels).permute(0, 2, 3, 1).cpu().numpy()
    pictures: list[Image.Image] = images.to_pil(pixels)
    if trajectory.fit is None:
        return pictures
    record = images.Fit.from_dict(dict(trajectory.fit))
    return [images.undo(picture, record) for picture in pictures]
