"""What an edit promises whatever the inversion method and the controller: every pair of registered rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from attention_control import CONTROLLERS
from easyinv_edit.inversion import INVERSIONS, sampler_of
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory

T = 4
SOURCE, TARGET, OTHER = "a red cube", "a ball", "a green cone"
QUICK: dict[str, dict[str, Any]] = {"null_text": {"iterations": 2}, "prompt_tuning": {"iterations": 2}}
"""Settings that make a method fast; the others run with their defaults."""
ROUTED: dict[str, dict[str, Any]] = {"masactrl": {"start_step": 0}}
"""Settings with which a controller acts from the first of so few steps."""

pytestmark = [
    pytest.mark.parametrize("inversion", INVERSIONS),
    pytest.mark.parametrize("controller", CONTROLLERS),
    pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning"),
]


@pytest.fixture(scope="module")
def pipe(untrained_folder: Path) -> EditPipeline:
    """One pipeline for all pairs, so that what an edit leaves behind shows in the next."""
    pipe = EditPipeline.from_pretrained(untrained_folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def inversions(pipe: EditPipeline) -> Iterator[dict[str, Trajectory]]:
    """Inversions made so far, by method."""
    yield {}


@pytest.fixture
def trajectory(pipe: EditPipeline, inversions: dict[str, Trajectory], inversion: str) -> Trajectory:
    if inversion not in inversions:
        image = Image.new("RGB", (64, 64), (235, 235, 225))
        ImageDraw.Draw(image).rectangle((16, 20, 48, 52), fill=(200, 40, 40))
        method = {"name": inversion, **QUICK.get(inversion, {})}
        generator = torch.Generator().manual_seed(0)
        inversions[inversion] = pipe.invert(image, SOURCE, method, num_inference_steps=T, generator=generator)
    return inversions[inversion]


def edited(pipe: EditPipeline, trajectory: Trajectory, controller: str, prompt: Any = TARGET, **options: Any) -> Tensor:
    control = {"name": controller, **ROUTED.get(controller, {})}
    settings = {"guidance_scale": 3, "output_type": "latent", **options}
    images = pipe.edit(trajectory, prompt, control=control, **settings).images
    assert isinstance(images, Tensor)
    assert images.isfinite().all()
    return images


@pytest.mark.parametrize("pinned", [True, False])
def test_a_second_edit_is_bitwise_the_first(pipe: EditPipeline, trajectory: Trajectory, controller: str, pinned: bool) -> None:
    before = dict(pipe.backbone.network.attn_processors)
    first = edited(pipe, trajectory, controller, pin_source=pinned)
    assert first.shape == (1, 4, 16, 16)
    assert first.dtype == torch.float32
    assert torch.equal(edited(pipe, trajectory, controller, pin_source=pinned), first)
    after = pipe.backbone.network.attn_processors
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before), "its own processors are back"


def test_it_depends_on_the_prompt_and_the_guidance(pipe: EditPipeline, trajectory: Trajectory, controller: str) -> None:
    first = edited(pipe, trajectory, controller)
    assert (edited(pipe, trajectory, controller, OTHER) - first).abs().max() > 1e-4
    assert (edited(pipe, trajectory, controller, guidance_scale=6) - first).abs().max() > 1e-4


def test_saved_and_reloaded_it_edits_bitwise_the_same(
    pipe: EditPipeline, trajectory: Trajectory, controller: str, tmp_path: Path
) -> None:
    trajectory.save(tmp_path / "a.safetensors")
    again = Trajectory.load(tmp_path / "a.safetensors")
    for pinned in (True, False):
        both = [edited(pipe, t, controller, pin_source=pinned) for t in (trajectory, again)]
        assert torch.equal(*both)


@pytest.mark.parametrize("pinned", [True, False])
def test_two_prompts_are_two_edits(pipe: EditPipeline, trajectory: Trajectory, controller: str, pinned: bool) -> None:
    both = edited(pipe, trajectory, controller, [TARGET, OTHER], pin_source=pinned)
    assert both.shape == (2, 4, 16, 16)
    assert (both[0] - both[1]).abs().max() > 1e-3
    for row, prompt in zip(both, (TARGET, OTHER), strict=True):
        assert (row - edited(pipe, trajectory, controller, prompt, pin_source=pinned)[0]).abs().max() < 1e-4


def test_the_source_branch_is_the_inversions_own(pipe: EditPipeline, trajectory: Trajectory, controller: str) -> None:
    """Pinned, it is the inversion's latent in every step; unpinned, what the method's sampler alone gives."""
    alone, _ = pipe.reconstruct(trajectory)
    levels: list[Tensor] = []

    def watch(_pipe: EditPipeline, step: int, _timestep: int, tensors: dict[str, Tensor]) -> None:
        levels.append(tensors["latents"][:1].clone())

    edited(pipe, trajectory, controller, pin_source=False, callback_on_step_end=watch)
    assert len(levels) == (sampler_of(trajectory).start or T)
    assert (levels[-1] - alone).abs().max() < 1e-4
    result = pipe.edit(trajectory, TARGET, control=controller if controller == "none" else {"name": controller, **ROUTED[controller]})
    assert result.quality["psnr"] == pytest.approx(result.quality["vae_psnr"], abs=0.01)


def test_the_network_is_called_as_often_as_the_sampler_steps(
    pipe: EditPipeline, trajectory: Trajectory, controller: str
) -> None:
    """Twice a level for a pair that steps in turn; the source's row, and no other, is saved where nobody reads it."""
    control = {"name": controller, **ROUTED.get(controller, {})}
    options: dict[str, Any] = {"control": control, "output_type": "latent", "guidance_scale": 1.0, "source_guidance_scale": 1.0}
    steps = sampler_of(trajectory).start or T
    per_level = 2 if trajectory.method == "edict" else 1
    for pinned in (True, False):
        cost = pipe.edit(trajectory, [TARGET, OTHER], pin_source=pinned, **options).cost["edit"]
        assert cost.calls == per_level * steps
        rows = 3 if not pinned or controller != "none" else 2
        assert cost.evaluations == rows * cost.calls
