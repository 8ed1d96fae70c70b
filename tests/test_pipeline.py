"""EditPipeline over a model with random weights: what an edit costs and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attention_control import MasaCtrl, NoControl
from easyinv_edit.errors import EasyInvWarning
from easyinv_edit.inversion import DDIM
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory

T = 3
CONTROLLED = MasaCtrl(start_step=1)
"""Acts in T - 1 of the steps, as the authors' 4 of 50 does in 46."""
SOURCE, TARGETS = "a red ball", ["a blue cube", "a green cone"]


@pytest.fixture
def inverted(untrained: EditPipeline, picture: Image.Image) -> Trajectory:
    """The picture inverted with DDIM in T steps, its prompt empty."""
    return untrained.invert(picture, method="ddim", num_inference_steps=T)


def latents(pipe: EditPipeline, source: Any, prompt: str | Sequence[str] = TARGETS[0], **options: Any) -> Tensor:
    """The edit's latents, controlled."""
    images = pipe.edit(source, prompt, **{"control": CONTROLLED, "output_type": "latent", **options}).images
    assert isinstance(images, Tensor)
    return images


# What it costs


def test_one_edit_costs_what_the_formula_says(untrained: EditPipeline, picture: Image.Image) -> None:
    """T to invert, two per step for the guided target, one for the source where it is read: 50 + 100 + 46 = 196 at T = 50."""
    steps = 25
    result = untrained(picture, TARGETS[0], num_inference_steps=steps, output_type="latent")
    assert result.cost["invert"].evaluations == steps
    assert result.cost["edit"].evaluations == 2 * steps + (steps - 2)  # 0.08 of 25 steps
    assert result.cost["edit"].calls == steps
    assert all(cost.seconds > 0 and cost.peak_memory_bytes > 0 for cost in result.cost.values())


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({}, 2 * T + T - 1),
        ({"prompt": TARGETS}, 4 * T + T - 1),
        ({"prompt": ["x", "y", "z"], "guidance_scale": 1.0}, 3 * T + T - 1),
        ({"guidance_scale": 1.0}, T + T - 1),
        ({"guidance_scale": 0.0}, T + T - 1),
        ({"control": "none"}, 2 * T),
        ({"control": NoControl(), "guidance_scale": 1.0}, T),
        ({"pin_source": False}, 2 * T + T),
        ({"pin_source": False, "control": "none"}, 2 * T + T),
        ({"negative_prompt": "a dark ring"}, 2 * T + 2 * (T - 1)),
        ({"negative_prompt": "a dark ring", "control": "none"}, 2 * T),
        ({"negative_prompt": "a dark ring", "pin_source": False, "control": "none"}, 2 * T + T),
        ({"source_guidance_scale": 3.0}, 2 * T + T - 1),
    ],
)
def test_what_an_edit_costs(untrained: EditPipeline, inverted: Trajectory, options: dict[str, Any], evaluations: int) -> None:
    result = untrained.edit(inverted, **{"prompt": TARGETS[0], "control": CONTROLLED, "output_type": "latent", **options})
    assert result.cost["edit"].evaluations == evaluations


def test_a_source_prompt_costs_the_source_a_twin_where_it_is_read(untrained: EditPipeline, picture: Image.Image) -> None:
    inverted = untrained.invert(picture, SOURCE, num_inference_steps=T, method=DDIM())
    cost = [untrained.edit(inverted, "x", control=c, output_type="latent").cost["edit"] for c in (CONTROLLED, "none")]
    assert [part.evaluations for part in cost] == [2 * T + 2 * (T - 1), 2 * T]
    assert inverted.cost.evaluations == T


def test_guidance_at_inversion_doubles_its_cost_and_warns(untrained: EditPipeline, picture: Image.Image) -> None:
    with pytest.warns(EasyInvWarning, match="guidance 3"):
        inverted = untrained.invert(picture, SOURCE, "ddim", num_inference_steps=T, guidance_scale=3.0)
    assert inverted.cost.evaluations == 2 * T
    assert inverted.guidance_scale == 3.0


# What it returns


def test_the_pinned_reconstruction_is_the_autoencoders_round_trip(untrained: EditPipeline, inverted: Trajectory) -> None:
    result = untrained.edit(inverted, TARGETS[0], control=CONTROLLED)
    assert result.quality["psnr"] == pytest.approx(result.quality["vae_psnr"], abs=0.01)
    free = untrained.edit(inverted, TARGETS[0], control=CONTROLLED, pin_source=False)
    assert free.quality["psnr"] != result.quality["psnr"]


def test_several_prompts_in_one_call_equal_single_calls(untrained: EditPipeline, picture: Image.Image) -> None:
    for prompt in ("", SOURCE):
        inverted = untrained.invert(picture, prompt, "ddim", num_inference_steps=T)
        both = latents(untrained, inverted, TARGETS)
        single = torch.cat([latents(untrained, inverted, target) for target in TARGETS])
        assert both.shape == (2, 4, 16, 16)
        assert (both - single).abs().max() <= 1e-4
        assert (both[0] - both[1]).abs().max() > 1e-3


def test_a_second_call_equals_the_first_bit_for_bit(untrained: EditPipeline, picture: Image.Image) -> None:
    first, second = (untrained(picture, TARGETS, SOURCE, num_inference_steps=8, output_type="latent") for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.trajectory.latents, second.trajectory.latents)


def test_the_call_is_invert_then_edit(untrained: EditPipeline, picture: Image.Image, inverted: Trajectory) -> None:
    options: dict[str, Any] = {"control": CONTROLLED, "output_type": "latent", "negative_prompt": "a ring"}
    whole = untrained(picture, TARGETS[0], inversion="ddim", num_inference_steps=T, **options)
    assert torch.equal(whole.images, latents(untrained, inverted, negative_prompt="a ring"))


def test_an_image_is_inverted_with_inverts_defaults(untrained: EditPipeline, picture: Image.Image, monkeypatch: Any) -> None:
    seen = []
    monkeypatch.setattr(untrained, "invert", lambda *given, **options: seen.append((given, options)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        untrained.edit(picture, "x")
    assert seen == [((picture,), {})]


def test_a_saved_trajectory_edits_like_the_live_one(untrained: EditPipeline, inverted: Trajectory, tmp_path: Path) -> None:
    inverted.save(tmp_path / "a.safetensors")
    loaded = Trajectory.load(tmp_path / "a.safetensors")
    assert torch.equal(latents(untrained, loaded), latents(untrained, inverted))
    live, again = (untrained.edit(t, "x", control="none") for t in (inverted, loaded))
    assert again.quality == live.quality
    assert again.recipe == live.recipe
    assert np.array_equal(np.asarray(again.comparison), np.asarray(live.comparison))


@pytest.mark.parametrize("size", [(64, 96), [96, 64], 32])
def test_another_size(untrained: EditPipeline, picture: Image.Image, size: Any) -> None:
    inverted = untrained.invert(picture, method="ddim", num_inference_steps=2, size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert inverted.latents.shape == (3, 1, 4, height // 4, width // 4)
    result = untrained.edit(inverted, TARGETS, control=CONTROLLED, output_type="pt")
    assert result.images.shape == (2, 3, height, width)
    assert result.recipe["size"] == [height, width]


@pytest.mark.parametrize(("given", "fit"), [((100, 60), "pad"), ((100, 60), "stretch"), ((30, 90), "pad"), ((64, 64), "crop")])
def test_the_original_size_comes_back(untrained: EditPipeline, given: tuple[int, int], fit: Any) -> None:
    result = untrained(
        Image.new("RGB", given, "red"), TARGETS, inversion="ddim", num_inference_steps=2, fit=fit, control="none"
    )
    assert [image.size for image in result.images] == [given, given]
    assert {image.size for image in (*result.edited, result.source, result.reconstruction)} == {(64, 64)}
    assert result.recipe["fit"] == fit


def test_a_crop_comes_back_at_the_size_of_the_part_used(untrained: EditPipeline) -> None:
    result = untrained(Image.new("RGB", (100, 60)), "x", inversion="ddim", num_inference_steps=2, control="none")
    assert result.images[0].size == (60, 60)


def test_output_types(untrained: EditPipeline, inverted: Trajectory) -> None:
    made = {kind: untrained.edit(inverted, TARGETS, control="none", output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    assert [type(image) for image in made["pil"].images] == [Image.Image] * 2
    assert made["np"].images.shape == (2, 64, 64, 3)
    assert made["pt"].images.shape == (2, 3, 64, 64)
    assert made["latent"].images.shape == (2, 4, 16, 16)
    assert made["latent"].edited == ()
    tensor = made["pt"].images
    assert 0 <= tensor.min() < tensor.max() <= 1
    assert np.array_equal(made["np"].images, tensor.permute(0, 2, 3, 1).numpy())
    levels = (tensor * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(np.asarray(image), row) for image, row in zip(made["pil"].images, levels, strict=True))


def test_every_kind_of_input_gives_the_same(untrained: EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    array = np.asarray(picture)
    inputs: list[Any] = [picture, str(tmp_path / "a.png"), tmp_path / "a.png", array, array / 255]
    inputs += [torch.from_numpy(array.copy()).permute(2, 0, 1), torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 255]
    inverted = [untrained.invert(given, method="ddim", num_inference_steps=1) for given in inputs]
    assert all(torch.equal(t.latents, inverted[0].latents) for t in inverted)
    assert torch.equal(torch.from_numpy(array.copy()), inverted[0].source)


def test_the_trajectory_says_where_it_comes_from(untrained: EditPipeline, picture: Image.Image) -> None:
    inverted = untrained.invert(picture, SOURCE, {"name": "easyinv", "eta": 0.7}, num_inference_steps=8)
    assert (inverted.method, inverted.settings["eta"], inverted.prompt) == ("easyinv", 0.7, SOURCE)
    assert inverted.model == untrained.backbone.identity()
    assert inverted.fit is not None
    assert inverted.latents.dtype == torch.float32
    assert torch.equal(
        inverted.clean, untrained.backbone.encode(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1)
    )


def test_noise_mix(untrained: EditPipeline, inverted: Trajectory) -> None:
    def mixed(share: float, seed: int) -> Tensor:
        return latents(untrained, inverted, TARGETS, noise_mix=share, generator=torch.Generator().manual_seed(seed))

    first = mixed(0.5, 1)
    assert torch.equal(first, mixed(0.5, 1))
    assert not torch.equal(first, mixed(0.5, 2))
    assert torch.equal(mixed(0.0, 1), latents(untrained, inverted, TARGETS))
    once = untrained.edit(inverted, "x", noise_mix=0.5, generator=torch.Generator().manual_seed(3), output_type="latent")
    assert (once.recipe["noise_mix"], once.recipe["seed"]) == (0.5, 3)


def test_control_and_guidance_change_the_edit(untrained: EditPipeline, inverted: Trajectory) -> None:
    plain = latents(untrained, inverted, control="none")
    assert not torch.allclose(plain, latents(untrained, inverted), atol=1e-4)
    assert not torch.allclose(plain, latents(untrained, inverted, control="none", guidance_scale=1.0), atol=1e-4)
    assert torch.equal(plain, latents(untrained, inverted, control={"name": "none"}))
