"""`easyinv-edit models`: what it prints, its exit codes, and that it answers at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from easyinv_edit.models import presets
from tests import models
from tests.helpers import Command

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Stable Diffusion 1.x model folder."""
    models.sd().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub cache with nothing in it, and a current folder of the test's own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_list(command: Command) -> None:
    code, printed, errors = command("models", "list")
    assert (code, errors) == (0, "")
    assert [line.split()[:2] for line in printed.splitlines()] == [[name, p.family] for name, p in presets().items()]
    assert "Stable Diffusion XL 1.0 base" in printed
    listed = json.loads(command("models", "list", "--json")[1])
    assert listed == {name: {"title": p.title, "family": p.family, "id": p.id} for name, p in presets().items()}


@pytest.mark.parametrize("name", ["sd15", "sdxl-lightning"])
def test_show(command: Command, name: str) -> None:
    code, printed, _ = command("models", "show", name)
    known = presets()[name]
    assert code == 0
    assert printed.startswith(f"# {known.title}\n")
    assert yaml.safe_load(printed)["recipe"] == known.recipe
    facts = json.loads(command("models", "show", name, "--json")[1])
    assert (facts["id"], facts["load"], facts["unet"]["prediction_type"]) == (known.id, known.load, "epsilon")


def test_show_of_the_shipped_one_whatever_lies_here(command: Command, tmp_path: Path) -> None:
    (tmp_path / "sd15").write_text("something else")
    assert command("models", "show", "sd15")[1].startswith("# Stable Diffusion 1.5\n")


def test_show_of_a_name_that_is_none(command: Command) -> None:
    code, printed, errors = command("models", "show", "sdx")
    assert (code, printed, len(errors.splitlines())) == (2, "", 1)
    assert "model preset 'sdx' is unknown; choose embedded, " in errors
    assert errors.endswith("did you mean 'sdxl'?\n")


def test_check_of_a_good_model(command: Command, folder: Path) -> None:
    code, printed, errors = command("models", "check", str(folder))
    assert (code, errors) == (0, "")
    lines = printed.splitlines()
    assert lines[0] == f"{folder}: can be used"
    assert [line.split()[0] for line in lines[1:10]] == [
        *("family", "pipeline", "prediction", "timesteps", "trained", "text", "sites", "on", "presets")
    ]
    assert "trained at   32 x 32 pixels" in lines
    assert "sites        16 of self-attention" in lines
    assert "presets      none fits" in lines
    assert "unet             0.2 M parameters, float32, 0.7 MB" in lines
    assert not [line for line in lines if line.startswith("problem")]
    code, printed, _ = command("models", "check", str(folder), "--json")
    assert (code, json.loads(printed)["usable"]) == (0, True)


def test_check_of_a_bad_model(command: Command, folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    code, printed, errors = command("models", "check", str(folder))
    assert (code, errors) == (1, "")
    assert printed.splitlines()[0] == f"{folder}: cannot be used"
    assert len([line for line in printed.splitlines() if line.startswith("problem: ")]) == 2
    code, printed, _ = command("models", "check", str(folder), "--json")
    assert (code, json.loads(printed)["usable"], len(json.loads(printed)["problems"])) == (1, False, 2)


def test_check_of_a_preset(command: Command) -> None:
    code, printed, _ = command("models", "check", "embedded")
    assert code == 0
    assert "presets      embedded" in printed.splitlines()
    code, printed, _ = command("models", "check", "sdxl")
    assert code == 1
    assert "run `hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir FOLDER`" in printed
    assert 'note: to leave out what is not read, add --include "*.json"' in printed


@pytest.mark.parametrize(("name", "says"), [("none", "none: is no folder"), (".", ".: is no model"), ("", ": is no folder")])
def test_check_of_what_is_no_model(command: Command, name: str, says: str) -> None:
    code, printed, errors = command("models", "check", name)
    assert (code, printed, len(errors.splitlines())) == (2, "", 1)
    assert errors.startswith(f"error: {says}")


@pytest.mark.parametrize("arguments", [["list"], ["show", "sdxl"], ["check", "embedded"], ["check", "FOLDER"], ["--help"]])
def test_the_answer_is_there_at_once(folder: Path, arguments: list[str]) -> None:
    """Processor time, because wall time on a busy machine says nothing."""
    heavy = "{'torch', 'diffusers', 'transformers', 'safetensors', 'omegaconf', 'numpy', 'PIL'}"
    code = f"""
import sys, time
sys.argv = ["easyinv-edit", "models", *{[a.replace("FOLDER", str(folder)) for a in arguments]!r}]
from easyinv_edit.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)
assert time.process_time() < 1, time.process_time()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
