"""Model folders and pipelines: what is opened, what is refused, each in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from easyinv_edit.backbones import load_pipeline, wrap
from easyinv_edit.backbones.sd import StableDiffusion
from easyinv_edit.errors import ModelError
from easyinv_edit.pipeline import EditPipeline


@pytest.fixture
def backbone(untrained: EditPipeline) -> StableDiffusion:
    """The adapter over the untrained model, float32."""
    return untrained.backbone


def one_line(load: Callable[[], Any], says: str) -> None:
    """The load is refused in one line that says so."""
    with pytest.raises(ModelError, match=says) as caught:
        load()
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def folder(untrained_folder: Path, tmp_path: Path) -> Path:
    """A copy of the untrained model to break; its weights are links."""
    return Path(shutil.copytree(untrained_folder, tmp_path / "model", copy_function=lambda a, b: Path(b).symlink_to(a)))


def load(folder: Path) -> Any:
    """Load a folder without a hub."""
    return load_pipeline(folder, local_files_only=True)


def test_a_missing_folder(tmp_path: Path) -> None:
    one_line(lambda: load(tmp_path / "none"), f"{tmp_path}/none: cannot be loaded")


def test_an_empty_folder(tmp_path: Path) -> None:
    one_line(lambda: load(tmp_path), "model_index.json")


def test_pickle_weights_are_never_opened(folder: Path, backbone: StableDiffusion) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.unlink()
    torch.save(backbone.pipe.unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    one_line(lambda: load(folder), "safetensors")
    for other in [*folder.rglob("*.safetensors")]:
        other.rename(other.with_suffix(".bin"))
    one_line(lambda: load(folder), "safetensors")


def test_a_truncated_weight_file(folder: Path) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    content = weights.read_bytes()[:100_000]
    weights.unlink()
    weights.write_bytes(content)
    one_line(lambda: load(folder), "cannot be loaded")


@pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": "NoSuchPipeline"}', ""])
def test_a_damaged_index(folder: Path, text: str) -> None:
    (folder / "model_index.json").unlink()
    (folder / "model_index.json").write_text(text)
    one_line(lambda: load(folder), "cannot be loaded")


@pytest.mark.parametrize("change", [{"unet": None}, {"text_encoder_2": object()}, {"vae": None}])
def test_a_pipeline_of_another_family_is_refused(backbone: StableDiffusion, change: dict[str, Any]) -> None:
    parts = {name: getattr(backbone.pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    one_line(lambda: wrap(SimpleNamespace(**{**parts, **change})), "SimpleNamespace is of no known family .*Stable Diffusion")
    assert isinstance(wrap(SimpleNamespace(**parts)), StableDiffusion)


def test_an_inpainting_unet_is_refused(backbone: StableDiffusion) -> None:
    backbone.pipe.unet.register_to_config(in_channels=9)
    one_line(lambda: wrap(backbone.pipe), "no known family")
    one_line(lambda: EditPipeline.from_pipe(object()), "object is of no known family")
