"""The benchmarks' one loop: it can be stopped and killed, goes on past what fails, and does finished work once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from easyinv_edit.errors import InputError, NonFiniteError
from easyinv_edit.evaluation import environment
from easyinv_edit.evaluation.benchmark import Benchmark, from_mapping
from easyinv_edit.evaluation.inversion_bench import InversionBench
from easyinv_edit.evaluation.ledger import Ledger
from easyinv_edit.evaluation.runner import run
from easyinv_edit.evaluation.work import file_names, fitted_mask, slug
from easyinv_edit.pipeline import EditPipeline
from tests import models
from tests.helpers import Command

pytestmark = pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion's structure at 32 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    models.sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of the user's own."""
    home = tmp_path_factory.mktemp("photos")
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        levels = torch.randint(256, (6, 6, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(levels.numpy()).resize((32, 32)).save(home / f"{number}.png")
    return home


def config(model: Path, photos: Path, **changes: Any) -> Benchmark:
    content = {"kind": "inversion", "title": "test", "model": str(model), "device": "cpu", "guidance_scale": 3.0, "batch": 2}
    content |= {"data": {"set": "folder", "path": str(photos)}, "inversions": ["ddim", "edit_friendly"]}
    return from_mapping({**content, "num_inference_steps": 3, "metrics": ["PSNR", "PSNR, guided", "seconds"], **changes})


def quiet(_text: str) -> None:
    pass


def rows_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def nothing_left(text: str) -> None:
    pytest.fail(f"nothing is left to do, but: {text}")


@pytest.fixture(scope="module")
def once(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("once")
    run(config(model, photos), place, quiet)
    return place


@pytest.fixture
def finished(once: Path, tmp_path: Path) -> Path:
    """A run that is done, to be damaged."""
    return Path(shutil.copytree(once, tmp_path / "finished"))


# --- going on -----------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_and_ends_with_the_same_results(
    model: Path, photos: Path, tmp_path: Path, finished: Path
) -> None:
    told: list[str] = []

    def stop(text: str) -> None:
        told.append(text)
        if len(told) == 5:
            raise KeyboardInterrupt

    place = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        run(config(model, photos), place, stop)
    assert 0 < len(rows_of(place)) < len(rows_of(finished))
    run(config(model, photos), place, quiet)
    assert without_times(rows_of(place)) == without_times(rows_of(finished))
    facts = environment.known(place)
    assert len(facts["resumed"]) == 1
    assert facts["finished"] >= facts["resumed"][0] >= facts["started"]


@pytest.mark.parametrize("torn", ["line", "batch"])
def test_what_a_crash_cut_short_is_measured_again(model: Path, photos: Path, finished: Path, torn: str) -> None:
    whole = rows_of(finished)
    lines = (finished / "results.jsonl").read_text().splitlines()
    kept = [*lines[:-1], lines[-1][:20]] if torn == "line" else lines[:3]
    (finished / "results.jsonl").write_text("\n".join(kept))
    run(config(model, photos), finished, quiet)
    assert without_times(rows_of(finished)) == without_times(whole)


def test_a_finished_run_is_left_alone(model: Path, photos: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.rglob("*") if path.is_file()}
    monkeypatch.setattr(EditPipeline, "from_pretrained", lambda *_given, **_options: nothing_left("a model was opened"))
    again = run(config(model, photos), finished, nothing_left)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.rglob("*") if path.is_file()} == before
    assert again.summary == json.loads((finished / "summary.json").read_text())
    assert (again.failed, again.results) == ([], len(rows_of(finished)))


def test_another_request_in_the_same_folder_is_refused(model: Path, photos: Path, finished: Path) -> None:
    with pytest.raises(InputError, match=r"holds another run \(.*run\.json: other values of pictures, seed\)"):
        run(config(model, photos, seed=3, pictures=2), finished, nothing_left)


def test_weights_that_came_later_are_another_run(model: Path, photos: Path, tmp_path: Path) -> None:
    files = {"backbone": str(tmp_path / "vgg.pth"), "heads": str(tmp_path / "heads.pth")}
    asked = config(model, photos, metrics=["LPIPS (vgg)", "PSNR"], weights={"lpips": {"vgg": files}}, inversions=["ddim"])
    done = run(asked, tmp_path / "run", quiet)
    assert done.summary["notes"][1:] == [f"no weights: {tmp_path / 'vgg.pth'} (LPIPS (vgg))"]
    assert all(row["LPIPS (vgg)"] is None and row["PSNR"] > 0 for row in done.summary["tables"][0]["rows"])
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**content, "missing": {}}))
    with pytest.raises(InputError, match="other values of missing"):
        run(asked, tmp_path / "run", quiet)


def test_a_killed_run_goes_on_without_a_lost_or_doubled_result(model: Path, tmp_path: Path, command: Command) -> None:
    """kill -9 in the middle of edits, then the same command; the results are those of a run that nobody disturbed."""
    arguments = [
        "bench",
        "edits",
        "--config",
        "tabletop_edits",
        f"model={model}",
        "inversions=[ddim,edit_friendly]",
        "device=cpu",
    ]
    arguments += [
        "data.count=2",
        "data.tasks=[shape]",
        "controls=[none,masactrl,prompt_to_prompt]",
        "num_inference_steps=4",
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    asked = [sys.executable, "-m", "easyinv_edit", *arguments, "-o", str(killed)]
    with subprocess.Popen(asked, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL) as process:
        results, deadline = killed / "results.jsonl", time.monotonic() + 120
        while not (results.exists() and results.read_bytes().count(b"\n") >= 4) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 4 <= len(rows_of(killed)) < 12
    for place in (killed, whole):
        code, _, err = command(*arguments, "-q", "-o", str(place))
        assert code == 0, err
    again, undisturbed = without_times(rows_of(killed)), without_times(rows_of(whole))
    assert len(undisturbed) == 12
    assert [(row["variant"], row["item"]) for row in again] == [(row["variant"], row["item"]) for row in undisturbed]
    for mine, theirs in zip(again, undisturbed, strict=True):
        numbers = [key for key, value in theirs.items() if isinstance(value, float)]
        assert {key: mine[key] for key in numbers} == pytest.approx({key: theirs[key] for key in numbers}, abs=1e-6)
        assert {k: v for k, v in mine.items() if k not in numbers} == {k: v for k, v in theirs.items() if k not in numbers}


# --- what fails ---------------------------------------------------------------------------------------------------------


def test_an_unreadable_picture_is_a_row_with_an_error(model: Path, photos: Path, tmp_path: Path, command: Command) -> None:
    photos = Path(shutil.copytree(photos, tmp_path / "photos"))
    whole = (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(whole[: len(whole) // 2])
    place, file = tmp_path / "run", tmp_path / "b.yaml"
    file.write_text(config(model, photos).to_yaml())
    code, out, err = command("bench", "inversion", "--config", str(file), "-o", str(place))
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("error: 3 of 15 results failed, the first 1.png, autoencoder alone: ")
    assert last.endswith("results.jsonl holds them all, and the same command tries them again")
    failed = [row for row in rows_of(place) if "error" in row]
    assert [(row["item"], row["variant"]) for row in failed] == [
        ("1.png", v) for v in ("autoencoder alone", "ddim", "edit_friendly")
    ]
    assert all("1.png: cannot be read as a picture" in row["error"] and "PSNR" not in row for row in failed)
    content = json.loads((place / "summary.json").read_text())
    assert [row["n"] for row in content["tables"][0]["rows"]] == [4, 4, 4]
    assert content["notes"][-1] == "3 of 15 results are errors; results.jsonl holds each with its reason"
    assert "3 of 15 results are errors" in out
    (photos / "1.png").write_bytes(whole)
    assert command("bench", "inversion", "--config", str(file), "-o", str(place), "-q")[0] == 0
    healed = rows_of(place)
    assert len(healed) == 15
    assert not any("error" in row for row in healed)


def test_one_bad_item_does_not_take_its_batch_along(
    model: Path, photos: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A latent that is not finite stops a whole batch; its other pictures are then measured alone."""
    prepare = InversionBench.prepare

    def broken(self: InversionBench, part: Any, variant: Any) -> Any:
        if variant.inversion == "ddim" and any(item.name == "2.png" for item in part):
            raise NonFiniteError("ddim: the latent of level 2 is not finite")
        return prepare(self, part, variant)

    monkeypatch.setattr(InversionBench, "prepare", broken)
    done = run(config(model, photos), tmp_path / "run", quiet)
    assert [(row["item"], row["variant"], row["error"]) for row in done.failed] == [
        ("2.png", "ddim", "ddim: the latent of level 2 is not finite")
    ]
    good = {(row["item"], row["variant"]): row for row in rows_of(finished)}
    for row in rows_of(tmp_path / "run"):
        if "error" not in row:
            assert row["PSNR"] == pytest.approx(good[row["item"], row["variant"]]["PSNR"], abs=0.01)


def test_a_control_that_fails_leaves_the_others_of_its_item(model: Path, tmp_path: Path) -> None:
    """The word of a blend that is in no prompt: known only when the item is edited."""
    blend = {"name": "prompt_to_prompt", "label": "blend", "blend_source": "elephant"}
    data = {"set": "tabletop_edits", "count": 1, "tasks": ["shape", "size"]}
    changes: dict[str, Any] = {"kind": "edits", "controls": ["none", blend, "masactrl"], "data": data, "metrics": ["inside"]}
    done = run(config(model, tmp_path, **changes, batch=1, inversions=["ddim"]), tmp_path / "run", quiet)
    assert [(row["variant"], row["group"]) for row in done.failed] == [("ddim + blend", "shape"), ("ddim + blend", "size")]
    assert "the word 'elephant' is not in its prompt" in done.failed[0]["error"]
    assert [row["n"] for row in done.summary["tables"][0]["rows"]] == [2, 0, 2]


# --- the folder ---------------------------------------------------------------------------------------------------------


def test_config_yaml_is_the_file_and_what_was_decided_otherwise(
    model: Path, photos: Path, tmp_path: Path, command: Command
) -> None:
    file, place = tmp_path / "b.yaml", tmp_path / "run"
    file.write_text("# Mine\n" + config(model, photos).to_yaml())
    code, _, err = command(
        "bench", "inversion", "--config", str(file), "inversions=ddim", "data.count=1", "-o", str(place), "-q"
    )
    assert code == 0, err
    text = (place / "config.yaml").read_text()
    assert text.startswith(file.read_text())
    assert text.endswith("# decided otherwise on the command line:\n# inversions=ddim\n# data.count=1\n")
    asked = json.loads((place / "run.json").read_text())
    assert (asked["inversions"], asked["data"]["count"]) == ([{"name": "ddim"}], 1)


def test_the_environment_says_where_and_when(finished: Path) -> None:
    facts = json.loads((finished / "environment.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__
    assert (facts["device"], facts["dtypes"], facts["threads"]) == ("cpu", ["float32"], torch.get_num_threads())
    assert facts["started"] <= facts["finished"]
    assert facts["results"] == 15


def test_every_picture_a_row_names_is_there(finished: Path) -> None:
    named = {path for row in rows_of(finished) for path in row["pictures"].values()}
    assert named == {f"pictures/{path.name}" for path in (finished / "pictures").iterdir()}


def test_a_set_that_is_not_whole_is_told(model: Path, tmp_path: Path) -> None:
    for split in ("val2017", "test2017"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (40, 40), "teal").save(tmp_path / split / f"{len(split):012d}.jpg")
    told: list[str] = []
    asked = config(model, tmp_path, data={"set": "coco", "path": str(tmp_path), "count": 9}, inversions=["ddim"], pictures=0)
    done = run(asked, tmp_path / "run", told.append)
    assert "2 near-square pictures among 2 in val2017, test2017, 9 were asked for" in done.summary["notes"][-1]
    assert {row["group"] for row in rows_of(tmp_path / "run")} == {"val2017", "test2017"}


# --- small parts --------------------------------------------------------------------------------------------------------


def test_a_ledger_holds_each_result_once_and_tries_errors_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, {"a": 1}, ("item",))
    ledger.add([{"item": "x", "v": 1}, {"item": "y", "error": "no"}, {"item": "x", "v": 2}])
    ledger.add([{"item": "x", "v": 3}])
    assert [(row["item"], row.get("v")) for row in ledger.rows] == [("x", 1), ("y", None)]
    assert ledger.holds(item="y")
    again = Ledger(tmp_path, {"a": 1}, ("item",))
    assert again.rows == [{"item": "x", "v": 1}]
    assert not again.holds(item="y")


def test_file_names_of_labels_are_plain_and_differ() -> None:
    names = file_names(["masactrl, words", "masactrl words", "../a/b", "???"])
    assert len(set(names.values())) == 4
    assert all(name == slug(name) for name in names.values())


def test_masks_follow_their_picture_to_the_models_size() -> None:
    from easyinv_edit.evaluation.datasets import EditItem

    wide = torch.zeros(32, 64)
    wide[:, :32] = 1
    item = EditItem("a", Image.new("RGB", (64, 32)), target_prompt="b", region=lambda: wide)
    cropped, stretched = fitted_mask(item, (16, 16), "crop"), fitted_mask(item, (16, 16), "stretch")
    assert cropped is not None
    assert stretched is not None
    assert (cropped[0, 0] == stretched[0, 0]).all(), "half of the middle square, and half of the whole"
    assert cropped[0, 0, :, :8].all()
    assert not cropped[0, 0, :, 8:].any()
    same = fitted_mask(item, (32, 64), "crop")
    assert same is not None
    assert torch.equal(same[0, 0], wide)
