"""The whole training, in small; and its recipes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from easyinv_edit.errors import EasyInvError, RecipeError
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.tabletop import autoencoder, denoising, fitting, judge, networks, precision, training
from easyinv_edit.tabletop.scene import random_table
from tests.helpers import Command
from tests.models import narrow_autoencoder, narrow_unet

CONFIGS = Path(__file__).parents[2] / "configs" / "tabletop"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of a quarter of their width; 8 held-out pictures instead of 512, 2 sampled ones instead of 16."""
    for name, build in (("build_unet", narrow_unet), ("build_autoencoder", narrow_autoencoder)):
        monkeypatch.setattr(networks, name, build)
    monkeypatch.setattr(training, "TESTED", 8)
    monkeypatch.setattr(training, "sample_grid", partial(training.sample_grid, count=2))


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
    assert pipe.backbone.native_size == (128, 128)
    assert judge.load(folder / "judge.safetensors").read(torch.zeros(1, 3, 64, 64))[0].keys() >= {"shape", "colour"}
    record = json.loads((folder / "training.json").read_text())
    assert record["unet"]["samples"] == 32
    assert sorted(tmp_path.glob("samples-*.png"))
    weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    def no_step(name: str, *_: object) -> None:
        raise AssertionError(f"{name} is trained again")

    monkeypatch.setattr(fitting, "_step", no_step)
    training.train(recipe, tmp_path, CPU, report=lambda text: None)
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_a_finished_model_is_trained_on(tmp_path: Path) -> None:
    """Judge and latents stay as they are, decoder and UNet begin where they were, and the record holds both trainings."""
    recipe = replace(training.read_training_recipe(CONFIGS / "smoke.yaml"), scenes=16)
    idle = replace(recipe.unet, samples=16, rate=1e-9, muon_rate=1e-9)
    still = replace(recipe, unet=idle, decoder=replace(recipe.decoder, rate=1e-9))
    first = training.train(recipe, tmp_path / "first", CPU, report=lambda text: None)
    second = training.train(still, tmp_path / "second", CPU, report=lambda text: None, start=first)
    for part in ("vae", "unet", "text_encoder"):
        file = next((first / part).glob("*.safetensors")).name
        before, after = (load_file(folder / part / file) for folder in (first, second))
        assert all(torch.allclose(before[key].float(), after[key].float(), atol=1e-4) for key in before), part
    assert (first / "judge.safetensors").read_bytes() == (second / "judge.safetensors").read_bytes()
    record = json.loads((second / "training.json").read_text())
    assert record["start"] == json.loads((first / "training.json").read_text())
    configs = [path.read_text() for path in second.rglob("config.json")]
    assert len(configs) == 3
    assert not any(str(tmp_path) in config for config in configs), "where it was trained is nobody's business"
    assert record["unet"]["samples"] == 16
    assert not (tmp_path / "second" / "autoencoder.checkpoint").exists()


def test_a_trained_decoder_leaves_the_latents_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are encoded again for another encoder only."""
    vae, pictures = networks.build_autoencoder().eval(), torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    latents = training._latents(vae, pictures, tmp_path)
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, "encode", None)
        assert torch.equal(training._latents(vae, pictures, tmp_path), latents)
    torch.nn.init.zeros_(vae.quant_conv.weight)
    assert not torch.equal(training._latents(vae, pictures, tmp_path), latents)


@pytest.mark.parametrize("there", [(), ("judge.safetensors",), ("judge.safetensors", "training.json")])
def test_training_on_from_what_is_no_tabletop_model_is_refused(
    command: Command, tmp_path: Path, there: tuple[str, ...]
) -> None:
    for file in there:
        (tmp_path / file).write_text("{}")
    code, _, told = command("tabletop", "train", "smoke", "-o", str(tmp_path / "run"), "--start", str(tmp_path))
    assert code == 2
    missing = ["has no judge.safetensors, so it is no", "has no training.json, so it is no", "damaged"]
    assert missing[len(there)] in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_a_model_of_another_size_is_not_trained_on(command: Command, tmp_path: Path, untrained_folder: Path) -> None:
    model = shutil.copytree(untrained_folder, tmp_path / "model")
    judge.save(judge.Judge(), model / "judge.safetensors")
    (model / "training.json").write_text("{}")
    code, _, told = command("tabletop", "train", "smoke", "-o", str(tmp_path / "run"), "--start", str(model))
    assert code == 2
    assert "draws 64 pixels, and training is on 128" in told
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_below_its_gate_stops_the_training(tmp_path: Path) -> None:
    recipe = replace(training.read_training_recipe(CONFIGS / "smoke.yaml"), scenes=16, gate=99.0)
    with pytest.raises(EasyInvError, match=r"below the gate of 99.0; train it longer"):
        training.train(recipe, tmp_path, CPU, report=lambda text: None)
    assert not (tmp_path / "model").exists()


def test_a_machine_that_cannot_compile_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_arguments: Any) -> None:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", lambda function: no_compiler)
    recipe = replace(training.read_training_recipe(CONFIGS / "smoke.yaml"), compile=True)
    with pytest.raises(EasyInvError, match=r"\(No working C\+\+ compiler found\); install .*, or leave compile out"):
        training.train(recipe, tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["training.json", "judge.safetensors"])
def test_a_damaged_file_of_a_start_is_named(
    command: Command, tmp_path: Path, untrained_folder: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr(networks, "PICTURE_SIZE", 64)
    model = shutil.copytree(untrained_folder, tmp_path / "model")
    judge.save(judge.Judge(), model / "judge.safetensors")
    (model / "training.json").write_text("{}")
    (model / file).write_text("{")
    code, _, told = command("tabletop", "train", "smoke", "-o", str(tmp_path / "run"), "--start", str(model))
    assert code == 2
    assert f"{model / file}: " in told
    assert "damaged" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("processor", "dtype"), [("AVX2", torch.float32), ("AVX512", torch.bfloat16)])
def test_a_processor_without_bfloat16_trains_in_float32(
    monkeypatch: pytest.MonkeyPatch, processor: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    with precision.autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == precision.working(CPU) == dtype
    assert precision.working(torch.device("cuda")) == torch.bfloat16


def test_a_compiled_unet_is_trained_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile does its tracing only, which needs no C++ compiler."""
    trace, rows = torch.compile, []

    def compile_eagerly(unet: UNet2DConditionModel) -> Callable[..., Any]:
        traced = trace(unet, backend="eager")

        def run(noisy: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            rows.append(len(noisy))
            return traced(noisy, *arguments, **options)

        return run

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    scenes, tokenizer = [random_table(seed) for seed in range(16)], networks.build_tokenizer()
    latents = torch.randn(16, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = fitting.Fit(samples=16, batch=8, warmup=1)
    trained = []
    for flag in (False, True):
        torch.manual_seed(0)
        unet, text = networks.build_unet(), networks.build_text_encoder(tokenizer)
        folder = tmp_path / str(flag)
        folder.mkdir()
        denoising.train(unet, text, tokenizer, latents, scenes, settings, folder, compiled=flag)
        trained.append(unet.state_dict())
    assert rows == [8, 8], "two steps of the second training"
    plain, traced = trained
    assert all(torch.allclose(plain[key], traced[key], atol=1e-4) for key in plain)
