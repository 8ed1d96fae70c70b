"""Model presets: every shipped file is right, a wrong one is told by its places, and what they claim can be counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from easyinv_edit.backbones import BACKBONES, wrap
from easyinv_edit.errors import RecipeError
from easyinv_edit.models import ModelPreset, cached_folder, on_disk, preset, presets, read_preset
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.recipe import parse
from easyinv_edit.terminal import shipped
from tests import models

NAMES = ["embedded", "lcm-sd15", "sd-turbo", "sd14", "sd15", "sd21", "sd21-base", "sdxl", "sdxl-lightning", "sdxl-turbo"]
FEW_STEPS = ["lcm-sd15", "sd-turbo", "sdxl-lightning", "sdxl-turbo"]


def known(name: str) -> ModelPreset:
    """A preset that is there."""
    found = preset(name)
    assert found is not None
    return found


def test_every_preset_is_found_by_its_name() -> None:
    assert sorted(presets()) == NAMES
    assert all(preset(name) == found for name, found in presets().items())
    assert preset("sd") is None
    assert preset("") is None


@pytest.mark.parametrize("name", NAMES)
def test_a_recommended_recipe_is_a_recipe(name: str) -> None:
    found = known(name)
    recipe = parse(yaml.safe_dump(found.recipe))
    assert recipe.size == found.size
    assert {"dtype", "size", "num_inference_steps", "guidance_scale", "inversion", "control"} == found.recipe.keys()
    assert found.family in BACKBONES
    assert found.title in shipped_text(name).splitlines()[0]
    assert (recipe.dtype == "float32") == (name == "embedded")


def shipped_text(name: str) -> str:
    """A preset's file."""
    return next(path for path in shipped("models") if path.stem == name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FEW_STEPS)
def test_models_of_few_steps_are_used_without_guidance(name: str) -> None:
    recipe = parse(yaml.safe_dump(known(name).recipe))
    assert recipe.guidance_scale == 1
    assert recipe.num_inference_steps <= 8
    assert recipe.inversion == {"name": "renoise"}
    assert 0 < recipe.control["start_step"] < recipe.num_inference_steps


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_starts_where_the_model_does(name: str) -> None:
    """Trailing timesteps end at the last training step, leading ones stop short of it."""
    found = known(name)
    steps = found.recipe["num_inference_steps"]
    published = EulerDiscreteScheduler(**models.BETAS, timestep_spacing="leading", steps_offset=1)
    last = wrap(models.sd(scheduler=published), found.schedule).schedule(steps).timesteps[-1]
    spacing = found.schedule.get("timestep_spacing", "leading")
    assert last == (999 if spacing == "trailing" else 1000 // steps * (steps - 1) + 1)


TRANSFORMER = {"vocab_size": 49408, "max_position_embeddings": 77}
TEXTS: dict[str, Callable[[], nn.Module]] = {
    "ViT-L": lambda: CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **TRANSFORMER)
    ),
    "ViT-H": lambda: CLIPTextModel(
        CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, **TRANSFORMER)
    ),
    "ViT-G": lambda: CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
            **TRANSFORMER,
        )
    ),
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD2 = {"attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
PUBLISHED: dict[int, tuple[dict[str, Any], list[str]]] = {
    768: ({}, ["ViT-L"]),
    1024: (SD2, ["ViT-H"]),
    2048: (SDXL, ["ViT-L", "ViT-G"]),
}
"""The UNet's configuration and the text encoders of the published models, by the width of their text."""


@pytest.mark.parametrize("width", PUBLISHED)
def test_the_memory_lines_count_the_published_networks(width: int) -> None:
    """Built on a device without memory, so that only shapes are made."""
    changes, texts = PUBLISHED[width]
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=width, **changes)
        vae = AutoencoderKL(latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks)
        networks = [unet, *(TEXTS[text]() for text in texts), vae]
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    lines = [found.memory for found in presets().values() if found.unet.cross_attention_dim == width]
    assert len(lines) >= 3
    for line in lines:
        assert re.findall(r"([\d.]+) M\b", line) == [f"{count / 1e6:.1f}" for count in counts]
        assert f"{2 * sum(counts) / 1e9:.2f} GB of float16 weights" in line


def test_every_memory_line_says_that_it_is_computed() -> None:
    for name, found in presets().items():
        assert found.memory.startswith("computed, not measured: "), name
        stated = float(re.search(r"([\d.]+) GB of float16", found.memory)[1])  # type: ignore[index]
        millions = sum(map(float, re.findall(r"([\d.]+) M\b", found.memory)))
        assert stated == pytest.approx(2 * millions / 1000, abs=0.005), name
        assert f"an edit at {found.size} pixels" in found.memory


def test_the_embedded_preset_is_the_embedded_model(embedded: EditPipeline) -> None:
    found, unet = known("embedded"), embedded.backbone.pipe.unet
    assert embedded.backbone.native_size == (found.size, found.size)
    assert unet.config.cross_attention_dim == found.unet.cross_attention_dim
    assert embedded.backbone.pipe.scheduler.config.prediction_type == found.unet.prediction_type


def run_lines(name: str) -> EditPipeline:
    """Run a preset's lines of Python; they leave a pipeline."""
    content: dict[str, Any] = {}
    exec(compile(known(name).load, name, "exec"), content)
    assert isinstance(content["pipe"], EditPipeline)
    return content["pipe"]


def test_lcm_is_built_as_its_preset_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model in the place of what the hub would send: the lines run, and LCM's own timesteps are used."""
    done: list[Any] = []
    monkeypatch.setattr(
        DiffusionPipeline, "from_pretrained", lambda name, **options: done.append((name, options)) or models.sd()
    )
    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", lambda _pipe, name: done.append(name))
    monkeypatch.setattr(StableDiffusionPipeline, "fuse_lora", lambda _pipe: done.append("fused"))
    monkeypatch.setattr(StableDiffusionPipeline, "to", lambda pipe, _device: pipe)
    pipe = run_lines("lcm-sd15")
    assert done == [(known("lcm-sd15").id, {"dtype": torch.float16}), "latent-consistency/lcm-lora-sdv1-5", "fused"]
    own = LCMScheduler.from_config(pipe.backbone.pipe.scheduler.config)
    own.set_timesteps(4)
    assert pipe.backbone.schedule(4).timesteps[1:] == tuple(sorted(own.timesteps.tolist()))


def test_lightning_is_built_as_its_preset_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With tiny weights in the place of what the hub would send: they end up in the UNet, and the last timestep is 999."""
    other = models.sdxl_unet()
    save_file({name: torch.full_like(value, 0.5) for name, value in other.state_dict().items()}, tmp_path / "unet.safetensors")
    wanted: list[Any] = []

    def load(name: str, *, unet: Any, **options: Any) -> Any:
        wanted.append((name, options))
        pipe = models.sdxl()
        pipe.unet = unet
        return pipe

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", load)
    monkeypatch.setattr(UNet2DConditionModel, "load_config", lambda _name, **_options: dict(other.config))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: wanted.append(names) or tmp_path / "unet.safetensors")
    monkeypatch.setattr(DiffusionPipeline, "to", lambda pipe, _device: pipe)
    pipe = run_lines("sdxl-lightning")
    assert wanted[0] == ("ByteDance/SDXL-Lightning", "sdxl_lightning_4step_unet.safetensors")
    assert wanted[1] == (known("sdxl-lightning").id, {"dtype": torch.float16})
    assert pipe.backbone.family == "sdxl"
    assert pipe.backbone.network.dtype == torch.float16
    assert bool((pipe.backbone.network.conv_in.weight == 0.5).all())
    assert pipe.backbone.schedule(4).timesteps[1:] == (249, 499, 749, 999)


GOOD = """# A model
id: owner/model
family: sd
licence: none
memory: little
unet: {prediction_type: epsilon, cross_attention_dim: 768}
schedule: {}
recipe: {size: 512}
"""


def test_a_good_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    found = read_preset(file)
    assert (found.name, found.title, found.size, found.load) == ("mine", "A model", 512, "")
    assert asdict(found)["unet"] == {"prediction_type": "epsilon", "cross_attention_dim": 768}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("# A model\n", "", "{}:1:1: the first line must be a comment with the model's name"),
        ("# A model\n", "#\n", "{}:1:1: the first line must be a comment with the model's name"),
        ("id: owner/model\n", "", "{}: id: is missing"),
        ("id: owner/model", "id: ''", "{}:2:1: id: String should have at least 1 character (got '')"),
        ("family: sd", "family: flux", "{}:3:1: family: should be 'sd' or 'sdxl' (got 'flux')"),
        ("licence", "license", "{}:4:1: license: unknown key - did you mean 'licence'?; allowed: id, family, "),
        ("epsilon", "sample", "{}:6:8: unet.prediction_type: should be 'epsilon' or 'v_prediction' (got 'sample')"),
        ("768", "0", "{}:6:34: unet.cross_attention_dim: should be greater than or equal to 1 (got 0)"),
        (", cross_attention_dim: 768", "", "{}:6:1: unet.cross_attention_dim: is missing"),
        (
            ", cross",
            ", cros",
            "{}:6:34: unet.cros_attention_dim: unknown key - did you mean 'cross_attention_dim'?; allowed: pred",
        ),
        ("schedule: {}", "schedule: {spacing: 1}", "{}:7:12: schedule.spacing: is unknown - did you mean 'timestep_spacing'?"),
        ("schedule: {}", "schedule: {}\nname: other", "{}:8:1: name: is no key; the file's name and first line say it"),
        ("id: owner/model", "id: [", "not valid YAML"),
        ("id: owner/model", "id: a\nid: b", "{}:3:1: id: written twice; keep one"),
    ],
)
def test_a_wrong_file_is_told_by_its_places(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        read_preset(file)
    assert says.format(file) in str(caught.value)


def test_every_problem_of_every_file_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(GOOD.replace("family: sd", "family: 1").replace("licence: none\n", ""))
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    monkeypatch.setattr("easyinv_edit.models.shipped", lambda _group: sorted(tmp_path.glob("*.yaml")))
    with pytest.raises(RecipeError) as caught:
        presets()
    keys = ["family", "licence"]
    assert [re.search(r"(\w)\.yaml.*: (\w+): ", line).groups() for line in caught.value.problems[:4]] == [  # type: ignore[union-attr]
        (name, key) for name in "ab" for key in keys
    ]
    assert caught.value.problems[4:] == [f"{tmp_path}/c.yaml: cannot be read (it is not UTF-8 text)"]


def test_the_hub_cache_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    entry = tmp_path / "models--owner--model"
    snapshot = entry / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0" * 40)
    assert cached_folder("owner/model") is None
    (snapshot / "model_index.json").write_text("{}")
    assert cached_folder("owner/model") == snapshot
    assert cached_folder("owner/other") is None
    assert cached_folder("../../model") is None


@pytest.mark.parametrize("text", ["", "~nobody-of-that-name/x", "a" * 5000, "\0", "none"])
def test_no_text_is_too_odd_to_be_looked_for(text: str) -> None:
    assert on_disk(text) is None


def test_what_is_on_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert on_disk("~/model") == tmp_path / "model"
