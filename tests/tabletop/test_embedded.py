"""What holds, with margin, for the shipped model. Orderings only: no test depends on how pretty its pictures are."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from easyinv_edit.evaluation.ground_truth import TASKS, make_cases
from easyinv_edit.evaluation.reconstruction import Reconstruction, reconstruct
from easyinv_edit.evaluation.truth_edits import Outcome, run_task
from easyinv_edit.images import to_pil
from easyinv_edit.pipeline import EditPipeline, embedded_folder
from easyinv_edit.tabletop import judge
from easyinv_edit.tabletop.captions import caption
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import random_scene

SCENES = [random_scene(30_000_000 + i) for i in range(80)]


@pytest.fixture(scope="module")
def reconstructions(embedded: EditPipeline) -> dict[str, Reconstruction]:
    pictures = [to_pil(p[None] * 2 - 1)[0] for p in render(SCENES[:1], embedded.backbone.native_size[0])[0]]
    prompts = [caption(scene) for scene in SCENES[:1]]
    return {m: reconstruct(embedded, pictures, prompts, m, 10) for m in ("ddim", "easyinv", "fixed_point")}


@pytest.fixture(scope="module")
def shape_edits(embedded: EditPipeline) -> dict[str, Outcome]:
    critic = judge.load(embedded_folder() / "judge.safetensors")
    outcomes, _ = run_task(embedded, critic, make_cases(TASKS[0], SCENES, 4), num_inference_steps=10)
    return {outcome.method: outcome for outcome in outcomes}


def test_the_fixed_point_reconstructs_better_than_one_guess(reconstructions: dict[str, Reconstruction]) -> None:
    gain = reconstructions["fixed_point"].psnr_latent_ceiling - reconstructions["ddim"].psnr_latent_ceiling
    assert gain > 5


def test_easyinv_costs_what_ddim_costs_and_leaves_less_noise(reconstructions: dict[str, Reconstruction]) -> None:
    assert reconstructions["easyinv"].evaluations == reconstructions["ddim"].evaluations == 10
    assert reconstructions["easyinv"].noise_deviation < reconstructions["ddim"].noise_deviation


def test_inverted_noise_is_nearer_to_the_true_edit_than_fresh_noise(shape_edits: dict[str, Outcome]) -> None:
    assert shape_edits["inverted, plain"].object_psnr > shape_edits["random noise, plain"].object_psnr + 0.5


def test_masactrl_carries_over_what_the_prompts_leave_unsaid(shape_edits: dict[str, Outcome]) -> None:
    kept, alone = (shape_edits[name].kept for name in ("inverted, masactrl", "inverted, plain"))
    assert sum(kept.values()) > sum(alone.values())
    assert shape_edits["inverted, masactrl"].object_psnr > shape_edits["inverted, plain"].object_psnr + 0.3


def test_a_pinned_source_is_the_autoencoders_round_trip(embedded: EditPipeline) -> None:
    picture = to_pil(render(SCENES[:1], embedded.backbone.native_size[0])[0] * 2 - 1)[0]
    result = embedded(picture, "a small cube", num_inference_steps=10)
    assert result.quality["psnr"] == pytest.approx(result.quality["vae_psnr"], abs=0.01)
    assert result.quality["psnr"] > 24


def test_the_model_is_an_ordinary_one_of_at_most_30_megabytes() -> None:
    """Without the judge, the record and the card, which no pipeline loads."""
    folder = embedded_folder()
    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red ball", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert picture.shape == (1, 3, 128, 128)
    ours = {folder / "judge.safetensors", folder / "training.json", folder / "README.md"}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path not in ours) <= 30e6


def whole(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the stages of the models that it went on from."""
    return {**whole(record["start"]), **record} if "start" in record else record


def test_the_training_record_says_how_the_weights_were_made() -> None:
    record = whole(json.loads((embedded_folder() / "training.json").read_text()))
    assert record["autoencoder"]["object_psnr"] >= 24
    for stage in ("autoencoder", "unet", "judge"):
        assert record[stage]["samples"] > 0
        assert record[stage]["seconds"] > 0
        assert record["recipe"][stage]["seed"] >= 0
