"""The command line: what it writes and prints. What bad input gets is in test_cli_bad_input.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from easyinv_edit.doctor import Finding, examine
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.recipe import EditRecipe, parse
from easyinv_edit.trajectory import Trajectory
from tests.helpers import Command

QUICK = ("inversion=ddim", "num_inference_steps=2")
FILES = {"source.png", "reconstruction.png", "edited.png", "comparison.png", "result.json"}


@pytest.fixture
def photo(picture: Image.Image, tmp_path: Path) -> str:
    """A picture file."""
    picture.save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def model(untrained_folder: Path) -> str:
    """The override that chooses the untrained model."""
    return f"model={untrained_folder}"


@pytest.mark.parametrize("arguments", [["--help"], ["edit", "--help"], ["recipes", "list"]])
def test_help_is_instant(arguments: list[str]) -> None:
    """Processor time, because wall time on a busy machine says nothing."""
    heavy = "{'torch', 'diffusers', 'transformers', 'omegaconf', 'numpy', 'PIL'}"
    code = f"""
import sys, time
sys.argv = ["easyinv-edit", *{arguments!r}]
from easyinv_edit.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)
assert time.process_time() < 1, time.process_time()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "edit" in done.stdout or "masactrl" in done.stdout


def test_edit_writes_the_promised_files(command: Command, photo: str, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, errors = command("edit", photo, "a red cube", *QUICK, model, "-s", "a red ball", "-o", str(out))
    assert (code, errors) == (0, "")
    assert {path.name for path in out.iterdir()} == FILES
    assert printed.startswith(f"{out}: ")
    assert "UNet evaluations: 2 to invert, 6 to edit" in printed
    recipe = json.loads((out / "result.json").read_text())["recipe"]
    assert (recipe["image"], recipe["prompts"], recipe["source_prompt"]) == (photo, ["a red cube"], "a red ball")
    assert EditRecipe(**recipe).output == str(out)


def test_json_is_one_object_and_nothing_else(command: Command, photo: str, model: str, tmp_path: Path) -> None:
    code, printed, errors = command("edit", photo, "x", *QUICK, model, "-o", str(tmp_path / "out"), "--json")
    assert (code, errors) == (0, "")
    assert json.loads(printed) == json.loads((tmp_path / "out" / "result.json").read_text())


def test_quiet_prints_nothing(command: Command, photo: str, model: str, tmp_path: Path) -> None:
    steps = "num_inference_steps=4"  # too few for EasyInv's window, which warns
    assert command("edit", photo, "x", steps, model, "-o", str(tmp_path / "out"), "--quiet") == (0, "", "")
    assert command("invert", photo, *QUICK, model, "-o", str(tmp_path / "a.safetensors"), "-q") == (0, "", "")
    assert (tmp_path / "a.safetensors").exists()


def test_edit_takes_several_prompts(command: Command, photo: str, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, errors = command("edit", photo, "prompts=[a cube, a ball]", *QUICK, model, "-o", str(out), "--json")
    assert (code, errors, json.loads(printed)["recipe"]["prompts"]) == (0, "", ["a cube", "a ball"])
    assert {path.name for path in out.iterdir()} == (FILES - {"edited.png"}) | {"edited-1.png", "edited-2.png"}


def test_the_style_pictures_inversion_is_told(command: Command, photo: str, model: str, tmp_path: Path) -> None:
    given = ("edit", photo, "x", "-c", "portrait", f"style={photo}", *QUICK, model, "-o", str(tmp_path / "out"))
    code, printed, errors = command(*given)
    assert (code, errors) == (0, "")
    spent = json.loads((tmp_path / "out" / "result.json").read_text())["evaluations"]
    assert spent["style"] == 2
    assert f"UNet evaluations: 2 to invert, 2 to invert the style, {spent['edit']} to edit; seconds: " in printed
    assert re.search(r"seconds: \d+\.\d to invert, \d+\.\d to invert the style, \d+\.\d to edit;", printed)


def test_a_stored_inversion_edits_like_the_image(command: Command, photo: str, model: str, tmp_path: Path) -> None:
    stored, one, two = tmp_path / "sub" / "a.safetensors", tmp_path / "one", tmp_path / "two"
    code, printed, _ = command("invert", photo, *QUICK, model, "-s", "a red ball", "-o", str(stored), "--json")
    assert (code, json.loads(printed)["file"], json.loads(printed)["evaluations"]) == (0, str(stored), 2)
    assert Trajectory.load(stored).prompt == "a red ball"
    assert [path.name for path in stored.parent.iterdir()] == [stored.name]
    assert command("edit", str(stored), "a cube", model, "guidance_scale=5", "-o", str(one), "-q")[0] == 0
    direct = ("edit", photo, "a cube", *QUICK, model, "guidance_scale=5", "-s", "a red ball", "-o", str(two), "-q")
    assert command(*direct)[0] == 0
    assert np.array_equal(np.asarray(Image.open(one / "edited.png")), np.asarray(Image.open(two / "edited.png")))
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
    assert first["reconstruction"] == second["reconstruction"]
    assert first["recipe"]["source_prompt"] == "a red ball"


def test_run_carries_out_a_recipe_with_overrides(command: Command, model: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "image: scene:20000001\nprompts: [a cube, a ball]\nnum_inference_steps: 3\ninversion: ddim\ncontrol: none\n"
    )
    code, _, errors = command("run", str(recipe), model, "num_inference_steps=2", f"output={tmp_path / 'out'}")
    assert (code, errors) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == (FILES - {"edited.png"}) | {"edited-1.png", "edited-2.png"}
    facts = json.loads((tmp_path / "out" / "result.json").read_text())
    assert facts["evaluations"] == {"invert": 2, "edit": 8}
    assert facts["recipe"]["image"] == "scene:20000001"


def test_a_recipe_of_words_takes_masks_by_path(command: Command, model: str, tmp_path: Path) -> None:
    """As the recipe's header says: beside them the words of the recipe would be refused."""
    mask = tmp_path / "mask.png"
    Image.new("L", (64, 64), 0).save(mask)
    masks = (f"control.source_mask={mask}", f"control.target_mask={mask}", "control.keep_background=true")
    given = ("run", "masactrl-masks", "-c", "masactrl", *masks, *QUICK, model, f"output={tmp_path / 'out'}", "--json")
    code, printed, errors = command(*given)
    assert (code, errors) == (0, "")
    control = json.loads(printed)["recipe"]["control"]
    assert (control["source_mask"], control["source_words"], control["keep_background"]) == (str(mask), "", True)
    edited, kept = (np.asarray(Image.open(tmp_path / "out" / f"{name}.png")) for name in ("edited", "reconstruction"))
    assert np.array_equal(edited, kept), "nothing is in the masks, so that all of the source is put back"


def test_edit_starts_from_a_recipe(command: Command, photo: str, model: str, tmp_path: Path) -> None:
    given = ("edit", photo, "x", *QUICK, model, "-o", str(tmp_path / "out"), "--recipe", "plain", "--json")
    code, printed, _ = command(*given)
    recipe = json.loads(printed)["recipe"]
    assert (code, recipe["control"], recipe["guidance_scale"], recipe["prompts"]) == (0, {"name": "none"}, 3.0, ["x"])
    assert recipe["image"] == photo


def test_a_step_count_the_window_cannot_serve_works_with_one_warning(
    command: Command, photo: str, model: str, tmp_path: Path
) -> None:
    given = ("edit", photo, "x", model, "num_inference_steps=4", "-o", str(tmp_path / "out"), "--json")
    code, printed, errors = command(*given)
    assert code == 0
    assert json.loads(printed)["evaluations"]["invert"] == 4
    assert len(errors.splitlines()) == 1
    assert errors.startswith("warning: easyinv: the window (0.05, 0.25) holds none of the 4 steps")


@pytest.mark.parametrize("source", [False, True])
def test_a_long_prompt_is_one_warning(command: Command, photo: str, model: str, tmp_path: Path, source: bool) -> None:
    long = " ".join(["red"] * 22 + ["blue", "ball"])
    prompts = ("x", "-s", long) if source else (long,)
    code, _, errors = command("edit", photo, *prompts, *QUICK, model, "-o", str(tmp_path / "out"))
    assert code == 0
    assert len(errors.splitlines()) == 1
    assert errors.startswith("warning: the prompt has 24 tokens")
    assert errors.rstrip().endswith("these words are dropped: 'blue ball'")


@pytest.mark.parametrize("stop_at", ["sample", "save_png", "write_text"])
def test_ctrl_c_leaves_no_half_written_file(
    command: Command, photo: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str
) -> None:
    def interrupted(*_given: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    def half_written(_picture: Any, path: Path, **_options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    if stop_at == "sample":
        monkeypatch.setattr("easyinv_edit.editing.sample", interrupted)
    elif stop_at == "save_png":
        monkeypatch.setattr(Image.Image, "save", half_written)
    else:
        monkeypatch.setattr(Path, "write_text", lambda path, *_given, **_options: half_written(None, path))
    out = tmp_path / "out"
    code, printed, errors = command("edit", photo, "x", *QUICK, model, "-o", str(out))
    assert (code, printed) == (130, "")
    assert "Traceback" not in errors
    left = {path.name for path in out.iterdir()} if out.exists() else set()
    assert left == (FILES - {"result.json"} if stop_at == "write_text" else set())


def test_ctrl_c_while_an_inversion_is_written(
    command: Command, photo: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_written(_tensors: Any, path: Path, **_options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("easyinv_edit.trajectory.save_file", half_written)
    before = set(tmp_path.iterdir())
    assert command("invert", photo, *QUICK, model, "-o", str(tmp_path / "a.safetensors"))[0] == 130
    assert set(tmp_path.iterdir()) == before


def test_recipes_list_show_and_check(command: Command) -> None:
    code, printed, _ = command("recipes", "list", "--json")
    listed = json.loads(printed)
    assert (code, len(listed)) == (0, 18)
    assert all("arXiv" in line and not line.startswith("#") for line in listed.values())
    text = command("recipes", "list")[1]
    assert [line.split()[0] for line in text.splitlines()] == list(listed)
    code, printed, _ = command("recipes", "show", "masactrl", "guidance_scale=3")
    assert (code, parse(printed).guidance_scale, parse(printed).control["name"]) == (0, 3.0, "masactrl")
    assert command("recipes", "check", *listed) == (0, "18 recipes: no problems\n", "")


def test_doctor_reports_and_never_dies(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("versions", True, "a 1"), Finding("devices", True, "cpu")]
    monkeypatch.setattr("easyinv_edit.doctor.examine", lambda: findings)
    assert command("doctor") == (0, "ok   versions: a 1\nok   devices: cpu\n", "")
    findings.append(Finding("hub", False, "no way"))
    code, printed, _ = command("doctor", "--json")
    assert (code, json.loads(printed)[-1]) == (1, {"what": "hub", "good": False, "found": "no way"})
    assert "BAD  hub: no way" in command("doctor")[1]


def test_every_check_is_a_line_even_where_it_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("easyinv_edit.pipeline.embedded_folder", lambda: tmp_path / "none")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {finding.what: finding for finding in examine()}
    assert list(found) == ["versions", "torchvision", "devices", "hub", "embedded model"]
    assert all(len(finding.found.splitlines()) == 1 for finding in found.values())
    assert not found["embedded model"].good
    assert "offline by HF_HUB_OFFLINE" in found["hub"].found
    assert found["devices"].found.startswith("cpu")


@pytest.mark.usefixtures("embedded")
def test_doctor_finds_the_embedded_model() -> None:
    assert next(finding for finding in examine() if finding.what == "embedded model").good


@pytest.mark.usefixtures("embedded")
def test_demo(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps instead of fifty: what is written and printed, not how good it looks."""
    whole: Callable[..., Any] = EditPipeline.__call__
    quick = {"num_inference_steps": 5}
    monkeypatch.setattr(EditPipeline, "__call__", lambda pipe, *given, **options: whole(pipe, *given, **{**options, **quick}))
    code, printed, errors = command("demo", "-o", str(tmp_path / "demo"), "--json")
    assert (code, errors) == (0, "")
    rows = json.loads(printed)["rows"]
    assert len(rows) == 6
    keys = {"source", "prompt", "method", "psnr", "sampled_back", "evaluations", "seconds"}
    assert all(row.keys() == keys for row in rows)
    assert {row["method"] for row in rows} == {"easyinv", "ddim"}
    folders = [path for path in (tmp_path / "demo").iterdir() if path.is_dir()]
    assert {folder.name for folder in folders} == {f"{row['source']}-{row['method']}" for row in rows}
    assert all({path.name for path in folder.iterdir()} == FILES for folder in folders)
    assert {path.name for path in (tmp_path / "demo").iterdir() if path.is_file()} == {"overview.png", "result.json"}


def test_version_is_the_installed_one(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: f"{package}-1.2.3")
    assert command("--version")[:2] == (0, "easyinv-edit easyinv-edit-1.2.3\n")


@pytest.mark.parametrize(("world", "options"), [("scene", ()), ("table", ("--table",))])
def test_a_scene_is_rendered_as_an_edit_reads_it(
    command: Command, model: str, tmp_path: Path, world: str, options: tuple[str, ...]
) -> None:
    code, printed, errors = command("tabletop", "render", "20000531", *options, "--size", "64", "-o", str(tmp_path))
    picture = tmp_path / f"{world}-20000531.png"
    assert (code, errors) == (0, "")
    assert printed.startswith(f"{picture}: a ")
    assert printed.endswith(" background\n")
    assert ("on the left" in printed) == (world == "table"), "the two worlds' scenes of a seed differ"
    edit = ("edit", f"{world}:20000531", "a ball", model, "size=64", "control=none", *QUICK, "-o", str(tmp_path / "out"))
    assert command(*edit)[0] == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "source.png")), np.asarray(Image.open(picture)))
