"""What bad input gets: exit code 2, one line a problem, no traceback, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory
from tests.helpers import Command

STEPS = ("inversion=ddim", "num_inference_steps=2")


@pytest.fixture
def home(tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: one picture and nothing else."""
    picture.save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(untrained_folder: Path) -> str:
    """The override that chooses the untrained model."""
    return f"model={untrained_folder}"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model is opened: the input must be refused before that."""

    def opened(*_given: object, **_options: object) -> None:
        raise AssertionError("a model was opened for input that cannot be used")

    monkeypatch.setattr("easyinv_edit.pipeline.load_pipeline", opened)


def refused(command: Command, *arguments: str, lines: int = 1) -> list[str]:
    """Run a command that must be refused; returns its lines on stderr."""
    before = sorted(Path.cwd().rglob("*"))
    code, printed, errors = command(*arguments)
    found = errors.splitlines()
    assert (code, printed, len(found)) == (2, "", lines), errors
    assert found[0].startswith("error: ")
    assert "Traceback" not in errors
    assert sorted(Path.cwd().rglob("*")) == before
    return found


def truncated(path: Path) -> None:
    """Half a picture."""
    torch.manual_seed(0)
    Image.frombytes("RGB", (64, 64), bytes(torch.randint(256, (64 * 64 * 3,)).tolist())).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:6000])


def animated(path: Path) -> None:
    """Two frames."""
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _path: None, "there is no such file; give the path of an existing picture"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
        (truncated, "cannot be read as a picture"),
        (lambda path: path.write_text("hello"), "cannot be read as a picture"),
        (lambda path: Image.new("RGB", (1, 1)).save(path, "PNG"), "is 1 x 1 pixels"),
        (lambda path: Image.new("L", (20_000, 8)).save(path, "PNG"), "is 20000 x 8 pixels"),
        (animated, "has 2 frames"),
    ],
)
@pytest.mark.usefixtures("no_model")
def test_an_image_that_cannot_be_used(command: Command, home: Path, make: Callable[[Path], object], says: str) -> None:
    make(home / "bad.png")
    for arguments in (("edit", "bad.png", "x", "-o", "out"), ("invert", "bad.png", "-o", "a.safetensors")):
        line = refused(command, *arguments)[0]
        assert line.startswith("error: bad.png: ")
        assert says in line


@pytest.mark.usefixtures("no_model", "home")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("edit", "photo.png", "x", "inversion=easyinf"), "'easyinf' is unknown; choose easyinv"),
        (("edit", "photo.png", "x", "control=masactl"), "did you mean 'masactrl'?"),
        (("edit", "photo.png", "x", "num_inference_steps=0"), "command line: 'num_inference_steps=0'"),
        (
            ("edit", "photo.png", "x", "prompts=[a,b]"),
            "'prompts=[a,b]': given a second time; give each once; for several prompts",
        ),
        (
            ("edit", "photo.png", "prompts=[a]", "image=b.png"),
            "command line: 'image=b.png': given a second time; give each once",
        ),
        (("edit", "photo.png", "prompts=[]"), "prompts: is missing; an edit needs it"),
        (("edit", "photo.png", "x", "-s", "a", "source_prompt=b"), "'source_prompt=b': given a second time; give each once"),
        (("edit", "photo.png", "x", "-o", "a", "output=b"), "'output=b': given a second time"),
        (("invert", "photo.png", "image=b.png"), "'image=b.png': given a second time"),
        (("edit", "photo.png", "x", "-c", "masactl"), "'control=masactl': control.name: 'masactl' is unknown; choose none"),
        (
            ("edit", "photo.png", "x", "-c", "portrait"),
            "'control=portrait': control: portrait reads a second picture; give it as",
        ),
        (("edit", "photo.png", "x", "control.source_mask=none.png"), "none.png: there is no such file; give the path"),
        (("edit", "photo.png", "x", "guidance_scale"), "write key=value, e.g. guidance_scale=5"),
        (("edit", "photo.png", "x", "model=${oc.env:HOME}"), "are not allowed"),
        (("edit", "", "x"), "image: is missing; an edit needs it"),
        (("edit", "scene:", "x"), "write scene:SEED with a whole number"),
        (("edit", "scene:seven", "x"), "write scene:SEED with a whole number"),
        (("edit", "table:seven", "x"), "write table:SEED with a whole number"),
        (("edit", "photo.png", "x", "-r", "none.yaml"), "none.yaml: cannot be read"),
        (("edit", "photo.png", "x", "-o", "photo.png/below/out"), "photo.png is no folder); choose another output folder"),
        (("edit", "photo.png", "x", "-o", "photo.png"), "photo.png is no folder"),
        (("edit", "photo.png", "x", "device=gpu"), "device 'gpu' cannot be used here"),
        (("invert", "photo.png", "-o", "photo.png/a.safetensors"), "cannot be written"),
        (("invert", "photo.png", "-o", "a.pt"), "must end in .safetensors"),
        (("invert", "none.safetensors", "-o", "a.safetensors"), "there is no such file"),
        (("edit", "none.safetensors", "x"), "none.safetensors: cannot be read as an inversion"),
        (("run", "none"), "none: cannot be read (No such file or directory); give a YAML file, or a name from `recipes list`"),
        (("recipes", "show", "mine"), "mine: cannot be read"),
        (("recipes", "check", "mine"), "mine: cannot be read"),
    ],
)
def test_a_request_that_cannot_be_served(command: Command, arguments: tuple[str, ...], says: str) -> None:
    assert says in refused(command, *arguments)[0]


@pytest.mark.usefixtures("no_model", "home")
def test_what_a_controller_lacks_is_blamed_on_its_name(command: Command) -> None:
    found = refused(command, "edit", "photo.png", "x", "-r", "masactrl", "--control", "object_add", "control.word=x", "-q")
    assert found == ["error: command line: 'control=object_add': control.box: is missing; object_add needs it"]


@pytest.mark.usefixtures("no_model")
def test_a_recipe_with_five_mistakes(command: Command, home: Path) -> None:
    mistakes = ["modle: a", "image: photo.png", "prompts: [1]", "inversion: {eta: 2}", "control: masactl", "fit: crp"]
    (home / "mine.yaml").write_text("\n".join(mistakes))
    for arguments in (("run", "mine.yaml"), ("recipes", "check", "mine.yaml", "plain")):
        found = refused(command, *arguments, lines=5)
        assert found[0].startswith("error: mine.yaml:1:1: modle: ")
        assert [line.split(":")[1] for line in found[1:]] == ["3", "4", "5", "6"]


@pytest.mark.usefixtures("no_model", "home")
def test_a_recipe_without_an_image_or_prompts(command: Command, home: Path) -> None:
    (home / "mine.yaml").write_text("seed: 1")
    found = refused(command, "run", "mine.yaml", lines=2)
    assert "image: is missing" in found[0]
    assert "prompts: is missing" in found[1]


@pytest.mark.usefixtures("home")
def test_a_size_the_model_cannot_serve(command: Command, model: str) -> None:
    assert "multiples of 32" in refused(command, "edit", "photo.png", "x", model, *STEPS, "size=70")[0]


@pytest.mark.usefixtures("home")
def test_a_controller_that_hits_nothing(command: Command, model: str) -> None:
    assert "match none" in refused(command, "edit", "photo.png", "x", model, *STEPS, "control.sites=90-95")[0]


@pytest.mark.usefixtures("home")
def test_more_steps_than_the_model_has(command: Command, model: str) -> None:
    assert "use fewer steps" in refused(command, "edit", "photo.png", "x", model, "num_inference_steps=1000")[0]


def test_a_model_folder_with_pickle_weights_only(command: Command, home: Path, untrained_folder: Path) -> None:
    shutil.copytree(untrained_folder, home / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"weight": torch.zeros(1)}, home / "pickled" / "unet" / "diffusion_pytorch_model.bin")
    line = refused(command, "edit", "photo.png", "x", "model=./pickled")[0]
    assert "pickled: cannot be loaded as a diffusers model" in line
    assert "text_encoder: has no weights" in line
    assert "easyinv-edit models check ./pickled" in line


def test_a_missing_model_folder(command: Command, home: Path) -> None:
    assert f"{home}/none: cannot be loaded" in refused(command, "edit", "photo.png", "x", f"model={home}/none")[0]


@pytest.fixture
def stored(untrained: EditPipeline, home: Path, picture: Image.Image) -> Trajectory:
    """An inversion of the untrained model, in a.safetensors."""
    trajectory = untrained.invert(picture, method="ddim", num_inference_steps=1)
    trajectory.save(home / "a.safetensors")
    return trajectory


def test_an_inversion_made_by_another_model(command: Command, home: Path, model: str, stored: Trajectory) -> None:
    other = {**stored.model, "name": "another", "probe": [value + 1 for value in stored.model["probe"]]}
    replace(stored, model=other).save(home / "b.safetensors")
    line = refused(command, "edit", "b.safetensors", "x", model)[0]
    assert line.startswith("error: the inversion was made by another, not by ")
    assert line.endswith("invert the image again with this model")


@pytest.mark.usefixtures("stored", "no_model")
@pytest.mark.parametrize(
    "given",
    [
        "num_inference_steps=5",
        "inversion=ddim",
        "inversion.eta=1",
        "inversion_guidance_scale=2",
        "size=32",
        "fit=pad",
        "image=a",
    ],
)
def test_what_an_inversion_has_decided_cannot_be_asked_again(command: Command, given: str) -> None:
    line = refused(command, "edit", "a.safetensors", "x", given)[0]
    assert line.startswith(f"error: {given.split('=')[0]}: decided when the inversion was made")
    assert "source_prompt" in refused(command, "edit", "a.safetensors", "x", "-s", "a ball")[0]


@pytest.mark.usefixtures("stored", "no_model")
def test_a_recipe_cannot_ask_an_inversion_again_either(command: Command, home: Path) -> None:
    (home / "mine.yaml").write_text("image: a.safetensors\nprompts: [x]\nnum_inference_steps: 5\nsize: 32")
    for arguments in (("run", "mine.yaml"), ("recipes", "check", "mine.yaml")):
        found = refused(command, *arguments, lines=2)
        assert found[0].startswith("error: mine.yaml:3:1: num_inference_steps: decided when the inversion was made")
        assert found[1].startswith("mine.yaml:4:1: size: decided when the inversion was made")


def test_a_recipe_of_an_inversion_runs(command: Command, home: Path, model: str, stored: Trajectory) -> None:
    (home / "mine.yaml").write_text("image: a.safetensors\nprompts: [x]\ncontrol: none\noutput: out")
    assert command("run", "mine.yaml", model, "-q")[0] == 0
    facts = json.loads((home / "out" / "result.json").read_text())
    assert facts["recipe"]["num_inference_steps"] == len(stored.schedule) == 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("content", [b"", b"hello", b"\x10" + bytes(40)])
def test_a_damaged_inversion(command: Command, home: Path, content: bytes) -> None:
    (home / "a.safetensors").write_bytes(content)
    assert "cannot be read as an inversion" in refused(command, "edit", "a.safetensors", "x")[0]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.usefixtures("no_model")
def test_a_folder_without_permission(command: Command, home: Path) -> None:
    (home / "locked").mkdir(mode=0o500)
    assert "permission denied" in refused(command, "edit", "photo.png", "x", "-o", "locked/out")[0]


def test_a_failure_that_is_no_input_error_is_one_line_and_1(
    command: Command, home: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_given: object, **_options: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("easyinv_edit.editing.sample", broken)
    given = ("edit", "photo.png", "x", model, *STEPS, "-o", "out")
    assert command(*given) == (1, "", "error: RuntimeError: out of luck (--debug shows where)\n")
    assert not (home / "out").exists()
    monkeypatch.setattr("sys.argv", ["easyinv-edit", *given, "--debug"])
    from easyinv_edit.cli import main

    with pytest.raises(RuntimeError, match="out of luck"):
        main()


def test_a_command_that_does_not_exist_is_bad_input(command: Command) -> None:
    code, printed, errors = command("edti")
    assert (code, printed) == (2, "")
    assert "No such command 'edti'" in errors


def test_the_module_is_the_command(home: Path) -> None:
    """The whole way once, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "easyinv_edit", "edit", "none.png", "x"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: none.png: there is no such file; give the path of an existing picture\n"
    assert sorted(path.name for path in home.iterdir()) == ["photo.png"]
