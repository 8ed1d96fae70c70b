"""A whole edit against MasaCtrl's own procedure, written out: four rows, explicit softmax, guidance on every row.

`EditPipeline.edit` leaves out the rows that cannot change the result; here nothing is left out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory
from tests.attention_control.reference import SELF_PATHS, Explicit

STEPS, START = 5, 1  # 0.08 of 5 steps, rounded up
SCALE = 7.5


@pytest.fixture
def exact(untrained_folder: Path) -> EditPipeline:
    pipe = EditPipeline.from_pretrained(untrained_folder, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def official(pipe: EditPipeline, trajectory: Trajectory, prompt: str, pinned: bool) -> Tensor:
    """[source, target] latents of level 0 by the authors' loop: rows [s_u, t_u, s_c, t_c], the source overwritten if pinned."""
    unet, schedule = pipe.backbone.pipe.unet, trajectory.schedule
    source, target, empty = pipe.backbone.embed([trajectory.prompt, prompt, ""]).embeddings
    text = torch.stack([empty, empty, source, target])
    z = trajectory.noise.repeat(2, 1, 1, 1)
    own = dict(unet.attn_processors)
    for level in range(STEPS, 0, -1):
        z = torch.cat([trajectory.latents[level], z[1:]]) if pinned else z
        for index, path in enumerate(SELF_PATHS):
            routed = index >= 10 and STEPS - level >= START
            unet.get_submodule(path).set_processor(Explicit(2 if routed else None, union=False))
        unconditional, conditional = unet(z.repeat(2, 1, 1, 1), schedule.timesteps[level], text).sample.chunk(2)
        output = unconditional + SCALE * (conditional - unconditional)
        z = schedule.keep[level] * z + schedule.push[level] * output
    unet.set_attn_processor(own)
    return torch.cat([trajectory.latents[0], z[1:]]) if pinned else z


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(("source_prompt", "evaluations"), [("", (14, 15)), ("a red ball", (18, 20))])
def test_fewer_rows_make_the_same_edit(
    exact: EditPipeline, picture: Image.Image, source_prompt: str, evaluations: tuple[int, int], pinned: bool
) -> None:
    trajectory = exact.invert(picture, source_prompt, "ddim", num_inference_steps=STEPS)
    options = {"source_guidance_scale": SCALE, "pin_source": pinned, "output_type": "latent"}
    ours = exact.edit(trajectory, "a blue cube", guidance_scale=SCALE, **options)
    with torch.no_grad():
        theirs = official(exact, trajectory, "a blue cube", pinned)
    assert (ours.images - theirs[1:]).abs().max() <= 1e-10 * theirs.abs().max()
    assert ours.cost["edit"].evaluations == evaluations[0 if pinned else 1]
