"""Whitening is exact, the gate measures what it says, the judge counts only what can be seen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from easyinv_edit.tabletop import autoencoder, judge, networks
from easyinv_edit.tabletop.fitting import Fit
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import BESIDE, WORDS, Scene, Solid, random_scene, replace


@pytest.fixture(scope="module")
def bytes_and_masks() -> tuple[Tensor, Tensor]:
    pictures, masks = render([random_scene(seed) for seed in range(8)], 64)
    return (pictures * 255).round().byte(), (masks * 255).round().byte()


@torch.no_grad()
def posterior_deviation(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    return vae.encode(autoencoder.to_model_range(pictures)).latent_dist.std


def test_whitening_changes_the_latents_and_not_the_pictures(bytes_and_masks: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    vae = networks.build_autoencoder().eval()
    before, noise = autoencoder.round_trip(vae, bytes_and_masks[0]), posterior_deviation(vae, bytes_and_masks[0])
    old = torch.tensor(autoencoder.whiten(vae, bytes_and_masks[0])["deviation"])
    latents = autoencoder.encode(vae, bytes_and_masks[0])
    assert (autoencoder.round_trip(vae, bytes_and_masks[0]) - before).abs().max() < 1e-4
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    torch.testing.assert_close(posterior_deviation(vae, bytes_and_masks[0]) * old[:, None, None], noise, rtol=1e-3, atol=0)


def test_the_gate_tells_the_object_from_the_background(
    bytes_and_masks: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round trip that is wrong by 0.1 inside objects only scores 20 dB there."""
    pictures, masks = bytes_and_masks
    inside = (masks > 127).float()
    monkeypatch.setattr(autoencoder, "round_trip", lambda vae, p: p.float() / 255 + 0.1 * inside)
    found = autoencoder.gate(networks.build_autoencoder(), pictures, masks)
    assert found["object_psnr"] == pytest.approx(20.0, abs=1e-3)
    assert found["psnr"] == pytest.approx(20.0 - 10 * inside.mean().log10().item(), abs=1e-3)


def test_the_loss_is_zero_for_equal_pictures_and_weighs_the_object(bytes_and_masks: tuple[Tensor, Tensor]) -> None:
    picture, mask = autoencoder.to_model_range(bytes_and_masks[0]), bytes_and_masks[1].float() / 255
    assert autoencoder.reconstruction_loss(picture, picture, mask) == 0
    noise = 0.1 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    solid = (mask > 0.5).float()
    object_error = autoencoder.reconstruction_loss(picture + noise * solid, picture, mask) / solid.mean()
    ground_error = autoencoder.reconstruction_loss(picture + noise * (1 - solid), picture, mask) / (1 - solid).mean()
    assert object_error > 3 * ground_error


def test_crops_show_the_object(bytes_and_masks: tuple[Tensor, Tensor]) -> None:
    """Cut from picture and mask at one place, never outside, and nearly always with a part of the object in them."""
    pictures, masks = (part.repeat(8, 1, 1, 1).repeat_interleave(2, -1).repeat_interleave(2, -2) for part in bytes_and_masks)
    both = torch.cat([pictures, masks], 1)
    generator = torch.Generator().manual_seed(0)
    crops, cover = autoencoder.object_crops(both, masks, generator)
    assert crops.shape == (64, 4, autoencoder.CROP, autoencoder.CROP)
    assert (crops[:, 3:] == cover).all()
    assert (cover.amax((1, 2, 3)) > 127).float().mean() > 0.95
    assert len({tuple(crop.flatten().tolist()) for crop in cover}) > 48


@pytest.mark.parametrize(
    ("draw", "change"),
    [(0.0, lambda x: x.flip(-1)), (0.3, lambda x: nn.functional.avg_pool2d(x, 2)), (0.9, lambda x: x)],
    ids=["mirrored", "halved", "left alone"],
)
def test_latents_pictures_and_masks_are_changed_alike(draw: float, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(draw))
    given = [torch.arange(256.0).reshape(1, 1, 16, 16) + i for i in range(3)]
    made = autoencoder.equivariant(given[0], given[1], given[2], torch.Generator())
    assert all(torch.equal(a, change(b)) for a, b in zip(made, given, strict=True))


def test_words_that_cannot_be_seen_are_ignored() -> None:
    plain_ball = Scene(shape="ball", texture="plain", colour="red")
    labels = judge.labels([plain_ball, replace(plain_ball, texture="dotted"), replace(plain_ball, shape="cube")])
    assert [labels["second"][i].item() == judge.IGNORED for i in range(3)] == [True, False, True]
    assert [labels["pose"][i].item() == judge.IGNORED for i in range(3)] == [True, False, False]


def test_a_pair_shows_neither_size_nor_place_but_the_second_solids_words() -> None:
    ball = Scene(shape="ball", texture="dotted", size="small", offset=-BESIDE)
    assert judge.shown(ball).keys() == {*WORDS, "place", "company"}
    words = judge.shown(replace(ball, beside=Solid(shape="cube", offset=BESIDE)))
    assert words.keys() == {*WORDS, "company", *(f"beside {field}" for field in judge.OF_SOLIDS)} - {"size", "beside second"}
    assert (words["shape"], words["beside shape"], words["company"]) == ("ball", "cube", "pair")


class _Reader:
    """Reads every picture as one fixed scene."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def read(self, pictures: Tensor) -> list[dict[str, str]]:
        return [{field: getattr(self.scene, field) for field in WORDS}] * len(pictures)


def test_accuracy_is_the_share_of_right_words() -> None:
    scene = Scene(shape="ball", texture="dotted", colour="red", second="white")
    reader: Any = _Reader(scene)
    shares = judge.accuracy(reader, torch.zeros(4, 3, 8, 8), [scene, scene, replace(scene, colour="blue"), scene])
    assert shares["colour"] == 0.75
    assert shares["shape"] == shares["second"] == 1.0


def test_accuracy_leaves_out_words_that_cannot_be_seen() -> None:
    scene = Scene(shape="ball", texture="plain", colour="red", second="white")
    reader: Any = _Reader(replace(scene, second="black", pose="tilted"))
    shares = judge.accuracy(reader, torch.zeros(1, 3, 8, 8), [scene])
    assert shares.keys() == WORDS.keys() - {"second", "pose"}
    cube = replace(scene, shape="cube")
    shares = judge.accuracy(reader, torch.zeros(2, 3, 8, 8), [scene, cube])
    assert shares["pose"] == 0.0
    assert shares["shape"] == 0.5


@pytest.mark.parametrize("fields", [tuple(judge.READ), ("shape", "pose")], ids=["all", "some"])
def test_a_saved_judge_reads_the_same(tmp_path: Path, bytes_and_masks: tuple[Tensor, Tensor], fields: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    original = judge.Judge(fields).eval()
    judge.save(original, tmp_path / "judge.safetensors")
    again = judge.load(tmp_path / "judge.safetensors")
    assert list(again.heads) == list(fields)
    pictures = bytes_and_masks[0].float() / 255
    with torch.no_grad():
        assert all(
            (a - b).abs().max() < 1e-2 for a, b in zip(original(pictures).values(), again(pictures).values(), strict=True)
        )


def test_a_judge_learns_what_its_scenes_show_and_a_batch_without_it_costs_nothing(tmp_path: Path) -> None:
    scenes = [random_scene(seed) for seed in range(4)]
    pictures = (render(scenes, 64)[0] * 255).byte()
    made, _ = judge.train(pictures, scenes, Fit(samples=8, batch=4, warmup=1), tmp_path, torch.device("cpu"))
    assert set(made.heads) == {*WORDS, "place", "company"}
    logits = torch.zeros(2, 3, requires_grad=True)
    nothing = judge._loss(logits, torch.full((2,), judge.IGNORED))
    assert nothing.item() == 0
    assert judge._loss(logits, torch.tensor([judge.IGNORED, 1])).item() == pytest.approx(math.log(3))
