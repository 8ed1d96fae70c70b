"""The report of a tabletop model: complete at the least number of scenes, readable, refused for other models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from easyinv_edit.errors import InputError, ModelError
from easyinv_edit.evaluation import tabletop
from easyinv_edit.evaluation.ground_truth import TASKS
from easyinv_edit.evaluation.tabletop import GUIDANCE, HELD_OUT, SAMPLED_BACK, SAMPLES, WORLDS, _distance, evaluate
from easyinv_edit.evaluation.tabletop_tables import text
from easyinv_edit.evaluation.truth_edits import BASELINE, METHODS
from easyinv_edit.pipeline import embedded_folder
from easyinv_edit.tabletop import judge
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import random_scene


@pytest.fixture(autouse=True)
def few_sample_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabletop, "SAMPLE_STEPS", 2)


def quiet(_line: str) -> None:
    pass


def test_a_model_without_a_judge_is_refused(untrained_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no judge\.safetensors"):
        evaluate(str(untrained_folder), tmp_path, 1, 6, quiet)


def test_one_scene_is_enough_for_every_table_and_picture(untrained_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(untrained_folder, tmp_path / "model")
    torch.manual_seed(0)
    judge.save(judge.Judge(), model / "judge.safetensors")
    report = evaluate(str(model), tmp_path / "report", 1, 6, quiet, sets=2, samples=3)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert len(report["sets"]) == 2
    for given in report["sets"]:
        assert [row["method"] for row in given["reconstructions"]] == list(SAMPLED_BACK)
        assert [len(rows) for rows in given["edits"].values()] == [2 + len(METHODS)] * len(TASKS)
        assert len(given["samples"]) == len(WORLDS) * (1 + len(GUIDANCE))
    assert report["sets"][0]["autoencoder"] != report["sets"][1]["autoencoder"]
    worlds = ("single-solids", "wider-world")
    samples = {f"{world}-{kind}" for world in worlds for kind in ("rendered", "guidance-3", "guidance-5")}
    for name in ("set-1", "set-2"):
        drawn = {path.stem for path in (tmp_path / "report" / name).glob("*.png")}
        assert drawn == {*samples, *(f"edit-{task.name}" for task in TASKS)}
        assert all(Image.open(tmp_path / "report" / name / f"{each}.png").size == (3 * 64, 64) for each in samples)
    rows = [line for line in text(report).splitlines() if line.startswith("|") and not line.startswith("|---")]
    assert len(rows) == 4 + 2 + len(given["samples"]) + len(SAMPLED_BACK) + len(TASKS) * (2 + len(METHODS))
    assert all("±" in row for row in rows if "fixed_point" in row)
    assert report["one edit"]["evaluations"] == 6 + 2 * 6 + 2 * 5, "EasyInv; the target's rows; from step 1 the source's"
    assert "; one edit " in text(report)


def test_the_distance_from_renders_does_not_depend_on_the_scale_of_a_judges_features() -> None:
    torch.manual_seed(0)
    reader, pictures = judge.Judge().eval(), torch.rand(12, 3, 64, 64)
    near, far = (_distance(reader, each, pictures[6:]) for each in (pictures[:6], pictures[:6] / 2))
    reader.body[-2].weight.data *= 50
    reader.body[-2].bias.data *= 50
    assert _distance(reader, pictures[:6], pictures[6:]) == pytest.approx(near, rel=1e-3, abs=1e-6)
    assert far > abs(near)


def test_another_models_judge_reads_the_pictures(untrained_folder: Path, tmp_path: Path) -> None:
    """The embedded one by its name; and prompt-only edits have no gain over themselves."""
    given = evaluate(str(untrained_folder), tmp_path, 1, 6, quiet, judge_of="embedded")["sets"][0]
    scenes = [random_scene(HELD_OUT + 1_000_000 + i) for i in range(SAMPLES)]
    read = judge.accuracy(judge.load(embedded_folder() / judge.FILE), render(scenes, 64)[0], scenes)
    assert {**given["samples"]["single solids, rendered"], **read} == given["samples"]["single solids, rendered"]
    assert sum(read.values()) / len(read) > 0.5, "which an untrained judge does not read"
    plain = [row for rows in given["edits"].values() for row in rows if row["method"] == BASELINE]
    assert len(plain) == len(TASKS)
    assert all(row["gain"] == row["better"] == 0 for row in plain)


def test_a_report_cut_short_is_gone_on_with(untrained_folder: Path, tmp_path: Path) -> None:
    """What is there is not measured again: only parts that are missing are told, and a changed one stays."""
    told: list[str] = []

    def measure(steps: int = 6) -> Any:
        told.clear()
        return evaluate(str(untrained_folder), tmp_path, 1, steps, told.append, samples=2, judge_of="embedded")

    whole = measure()
    assert told[:2] == ["one edit", "set 1: autoencoder"]
    ledger = tmp_path / "results.jsonl"
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    kept = [row for row in rows if row["name"] not in ("turn", "wider world, guidance 3")]
    kept[0]["figures"]["seconds"] = -1.0
    cut_short = '{"set": 2, "part": "auto'
    ledger.write_text("\n".join([*map(json.dumps, kept), cut_short]))
    again = measure()
    assert told == ["set 1: samples: wider world, guidance 3", "set 1: edits: turn"]
    assert again["one edit"]["seconds"] == -1.0
    given = again["sets"][0]
    assert list(given) == ["autoencoder", "samples", "reconstructions", "edits"]
    assert list(given["edits"]) == [task.name for task in TASKS]
    assert (given["edits"], given["samples"]) == (whole["sets"][0]["edits"], whole["sets"][0]["samples"])
    measure()
    assert told == []
    with pytest.raises(InputError, match=r"holds another run .*other values of steps"):
        measure(steps=7)
