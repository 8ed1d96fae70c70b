"""Fixtures every room's tests share."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from easyinv_edit.cli import main
from easyinv_edit.pipeline import EditPipeline, embedded_folder
from tests.helpers import Command


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from a second thread, and on a busy machine two threads wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries() -> None:
    """No bars and no notices of other libraries in test output."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (transformers_logging, diffusers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


@pytest.fixture(scope="session")
def untrained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion model folder with the embedded model's structure at a quarter of its width, 64 pixels at factor 4:
    random weights, float32. What the vocabulary holds does not change the networks."""
    from easyinv_edit.tabletop import networks
    from tests.models import narrow_unet, small_autoencoder

    tokenizer = networks.build_tokenizer()
    torch.manual_seed(5)  # a draw on which the fixed-point iteration contracts within the few steps that tests take
    unet, autoencoder = narrow_unet(), small_autoencoder()
    folder = tmp_path_factory.mktemp("untrained")
    networks.build_pipeline(autoencoder, networks.build_text_encoder(tokenizer), tokenizer, unet).save_pretrained(folder)
    return folder


@pytest.fixture
def untrained(untrained_folder: Path) -> EditPipeline:
    """A fresh pipeline over `untrained_folder`, without progress bars."""
    pipe = EditPipeline.from_pretrained(untrained_folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def embedded() -> EditPipeline:
    """The shipped model; skips where a checkout has no weights."""
    if not (embedded_folder() / "model_index.json").exists():
        pytest.skip("the embedded weights are not in this checkout")
    pipe = EditPipeline.embedded()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: arguments -> (exit code, stdout, stderr)."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["easyinv-edit", *arguments])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def picture() -> Image.Image:
    """A 64-pixel picture with an object, an edge and a flat background."""
    image = Image.new("RGB", (64, 64), (255, 255, 255))
    image.paste((200, 40, 40), (16, 20, 48, 52))
    image.paste((240, 220, 60), (16, 32, 48, 40))
    return image
