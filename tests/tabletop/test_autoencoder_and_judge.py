"""Whitening is exact, the gate measures what it says, the judge counts only what can be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from easyinv_edit.tabletop import autoencoder, judge, networks
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import WORDS, Scene, random_scene, replace


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


def test_words_that_cannot_be_seen_are_ignored() -> None:
    plain_ball = Scene("ball", "plain", "red")
    labels = judge.labels([plain_ball, replace(plain_ball, texture="dotted"), replace(plain_ball, shape="cube")])
    assert [labels["second"][i].item() == judge.IGNORED for i in range(3)] == [True, False, True]
    assert [labels["pose"][i].item() == judge.IGNORED for i in range(3)] == [True, False, False]


class _Reader:
    """Reads every picture as one fixed scene."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    def read(self, pictures: Tensor) -> list[dict[str, str]]:
        return [{field: getattr(self.scene, field) for field in WORDS}] * len(pictures)


def test_accuracy_is_the_share_of_right_words() -> None:
    scene = Scene("ball", "dotted", "red", "white")
    reader: Any = _Reader(scene)
    shares = judge.accuracy(reader, torch.zeros(4, 3, 8, 8), [scene, scene, replace(scene, colour="blue"), scene])
    assert shares["colour"] == 0.75
    assert shares["shape"] == shares["second"] == 1.0


def test_accuracy_leaves_out_words_that_cannot_be_seen() -> None:
    scene = Scene("ball", "plain", "red", "white")
    reader: Any = _Reader(replace(scene, second="black", pose="tilted"))
    assert judge.accuracy(reader, torch.zeros(1, 3, 8, 8), [scene]).keys() == WORDS.keys() - {"second", "pose"}
    cube = replace(scene, shape="cube")
    shares = judge.accuracy(reader, torch.zeros(2, 3, 8, 8), [scene, cube])
    assert shares["pose"] == 0.0
    assert shares["shape"] == 0.5


def test_a_saved_judge_reads_the_same(tmp_path: Path, bytes_and_masks: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    original = judge.Judge().eval()
    judge.save(original, tmp_path / "judge.safetensors")
    again = judge.load(tmp_path / "judge.safetensors")
    pictures = bytes_and_masks[0].float() / 255
    with torch.no_grad():
        assert all(
            (a - b).abs().max() < 1e-2 for a, b in zip(original(pictures).values(), again(pictures).values(), strict=True)
        )
