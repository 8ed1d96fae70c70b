"""A model that cannot be fetched: one line that says which, why not, and what to do. No network is used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from easyinv_edit.backbones.loading import load_pipeline
from easyinv_edit.errors import ModelError
from easyinv_edit.pipeline import EditPipeline
from tests import models

http: Any = import_module(HfHubHTTPError.__bases__[0].__module__.split(".")[0])
"""The library by which huggingface_hub asks the hub: httpx, or its successor."""
NAME = "owner/model"
GET_IT = "where there is network run `hf download owner/model --local-dir FOLDER`, and give that FOLDER here"
NOT_HERE = "owner/model: is no folder and not, or not wholly, in the local hub cache, and "


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with nothing in it, and a current folder with nothing else."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def refused(name: str | Path, **options: Any) -> str:
    """The one line by which a model is refused."""
    with pytest.raises(ModelError) as caught:
        load_pipeline(name, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def raising(*chain: BaseException) -> Callable[..., Any]:
    """Stands for `from_pretrained`: raises the first error because of the second, and so on."""
    for error, cause in pairwise(chain):
        error.__cause__ = cause

    def load(*_given: Any, **_options: Any) -> Any:
        raise chain[0]

    return load


def test_asked_to_stay_local(empty_cache: Path) -> None:
    for options in ({}, {"cache_dir": empty_cache}):
        line = refused(NAME, local_files_only=True, **options)
        assert line == f"{NOT_HERE}local_files_only=True keeps the hub from being asked; {GET_IT}"


def test_switched_off_by_the_environment(tmp_path: Path) -> None:
    """In a process of its own, because the hub's library reads the switch when it is imported."""
    code = f"from easyinv_edit.backbones.loading import load_pipeline\nload_pipeline({NAME!r})"
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    last = done.stderr.rstrip().splitlines()[-1]
    assert last == f"easyinv_edit.errors.ModelError: {NOT_HERE}the hub is switched off by HF_HUB_OFFLINE; {GET_IT}"


def test_the_switch_is_named_that_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused(NAME) == f"{NOT_HERE}the hub is switched off by TRANSFORMERS_OFFLINE; {GET_IT}"


@pytest.mark.parametrize(
    "chain",
    [
        (OSError("not fully cached"), http.ConnectError("no route to host")),
        (http.ConnectTimeout("no route to host"),),
        (LocalEntryNotFoundError("not found"), http.ReadTimeout("no route to host")),
        (OSError("not fully cached"), ConnectionResetError("no route to host")),
        (ValueError("x"), OSError("y"), TimeoutError("no route to host")),
    ],
)
def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, chain: tuple[BaseException, ...]) -> None:
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", raising(*chain))
    assert refused(NAME) == f"{NOT_HERE}the hub cannot be reached (no route to host); {GET_IT}"


def answered(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    """An error for an answer of the hub."""
    request = http.Request("GET", "https://hub.example")
    return kind("an answer\nof two lines", response=http.Response(status, request=request))


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, GatedRepoError])
def test_the_hub_does_not_hand_it_out(monkeypatch: pytest.MonkeyPatch, kind: type[HfHubHTTPError]) -> None:
    """diffusers looks into the cache then, and says that the model is not cached: not the reason."""
    chain = (OSError("not cached"), answered(kind, 401), http.HTTPStatusError("401", request=None, response=None))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", raising(*chain))
    line = refused(NAME)
    assert line.startswith("owner/model: is no folder, and the hub has no model of that name, or keeps it private or gated; ")
    assert line.endswith("run `hf auth login`")


@pytest.mark.parametrize(
    "chain",
    [
        (answered(HfHubHTTPError, 500), http.HTTPStatusError("500", request=None, response=None)),
        (OSError("an answer\nof two lines"), ValueError("x")),
    ],
)
def test_any_other_trouble_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch, chain: tuple[BaseException, ...]) -> None:
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", raising(*chain))
    assert refused(NAME).startswith("owner/model: cannot be loaded as a diffusers model (an answer")
    assert "hf download" not in refused(NAME)


@pytest.mark.parametrize("name", ["./model", "../model", ".", "~/model", "/none/model", "a/b/c", "~nobody-of-that-name/x"])
def test_a_path_is_never_looked_for_on_the_hub(name: str) -> None:
    line = refused(name)
    assert line.startswith(f"{name}: cannot be loaded as a diffusers model: ")
    assert re.search(r"there is no such folder|is no model: it has no model_index.json", line)
    assert "hub cache" not in line


def test_a_preset_is_told_from_a_model() -> None:
    line = refused("sd15", local_files_only=True)
    assert line.startswith("sd15: is the name of a preset; its model is stable-diffusion-v1-5/stable-diffusion-v1-5, see ")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder, to break."""
    models.sd().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_loaded_wherever_it_is_named_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in ("model", "./model", "~/model", folder):
        assert type(load_pipeline(name, local_files_only=True)).__name__ == "StableDiffusionPipeline"


def test_a_folder_says_what_is_wrong_with_it(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    line = refused(folder)
    assert "text_encoder: has its weights as the variant 'fp16' only" in line
    assert line.endswith(f"(2 more: `easyinv-edit models check {folder}`)")
    assert load_pipeline(folder, variant="fp16", local_files_only=True).unet is not None
    shutil.rmtree(folder / "vae")
    assert "config.json" in refused(folder, variant="fp16")
    assert "variant" not in refused(folder, variant="fp16")


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_that_knows_no_word_is_refused(tmp_path: Path, part: str) -> None:
    """transformers makes an empty one without a word where the files are missing, and every prompt would mean nothing."""
    models.sdxl().save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    line = refused(tmp_path / "model", local_files_only=True)
    assert re.search(rf": the {part} has \d entries and the text encoder 646; its vocabulary .* is missing, so download", line)


def test_the_facade_says_the_same() -> None:
    with pytest.raises(ModelError, match="local_files_only=True keeps the hub from being asked"):
        EditPipeline.from_pretrained(NAME, local_files_only=True)
