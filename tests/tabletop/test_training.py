"""The whole training, in small; and its recipes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from easyinv_edit.errors import EasyInvError, RecipeError
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.tabletop import fitting, judge, training

CONFIGS = Path(__file__).parents[2] / "configs" / "tabletop"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 held-out pictures instead of 512, 4 sampled ones instead of 16."""
    monkeypatch.setattr(training, "TESTED", 16)
    monkeypatch.setattr(training, "sample_grid", partial(training.sample_grid, count=4))


def test_every_training_recipe_is_valid() -> None:
    found = {path.stem: training.read_training_recipe(path) for path in CONFIGS.rglob("*.yaml")}
    assert sorted(found) == ["cpu", "smoke"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("scenes: 3\nunet: {sample: 1}\n", "unet.sample"),
        ("scenes: many\n", "scenes: "),
        ("scenes: 0\n", "scenes: "),
        ("judge: {samples: 8, warmup: 0}\n", "judge.warmup: "),
        ("a: [", "cannot be read"),
        ("\xff", "cannot be read"),
    ],
)
def test_a_bad_training_recipe_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=problem):
        training.read_training_recipe(path)


def test_smoke_trains_resumes_and_yields_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run makes a folder the pipeline loads; a second finds everything done and changes nothing."""
    recipe = training.read_training_recipe(CONFIGS / "smoke.yaml")
    recipe = replace(recipe, scenes=32)
    folder = training.train(recipe, tmp_path, CPU, report=lambda text: None)
    pipe = EditPipeline.from_pretrained(folder)
    assert pipe.backbone.native_size == (64, 64)
    assert judge.load(folder / "judge.safetensors").read(torch.zeros(1, 3, 64, 64))[0].keys() >= {"shape", "colour"}
    record = json.loads((folder / "training.json").read_text())
    assert record["unet"]["samples"] == 64
    assert sorted(tmp_path.glob("samples-*.png"))
    weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    def no_step(name: str, *_: object) -> None:
        raise AssertionError(f"{name} is trained again")

    monkeypatch.setattr(fitting, "_step", no_step)
    training.train(recipe, tmp_path, CPU, report=lambda text: None)
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_an_autoencoder_below_its_gate_stops_the_training(tmp_path: Path) -> None:
    recipe = replace(training.read_training_recipe(CONFIGS / "smoke.yaml"), scenes=16, gate=99.0)
    with pytest.raises(EasyInvError, match=r"below the gate of 99.0; train it longer"):
        training.train(recipe, tmp_path, CPU, report=lambda text: None)
    assert not (tmp_path / "model").exists()
