"""The report of a tabletop model: complete at the least number of scenes, readable, refused for other models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from easyinv_edit.errors import ModelError
from easyinv_edit.evaluation.ground_truth import METHODS, TASKS
from easyinv_edit.evaluation.tabletop import SAMPLED_BACK, evaluate, text
from easyinv_edit.tabletop import judge


def quiet(_line: str) -> None:
    pass


def test_a_model_without_a_judge_is_refused(untrained_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no judge\.safetensors"):
        evaluate(str(untrained_folder), tmp_path, 1, 8, quiet)


def test_one_scene_is_enough_for_every_table_and_picture(untrained_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(untrained_folder, tmp_path / "model")
    torch.manual_seed(0)
    judge.save(judge.Judge(), model / "judge.safetensors")
    report = evaluate(str(model), tmp_path / "report", 1, 8, quiet)
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert [row["method"] for row in report["reconstructions"]] == list(SAMPLED_BACK)
    assert len(report["edits"]) == len(TASKS) * (2 + len(METHODS))
    drawn = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert drawn == {"samples-g3", "samples-g5", *(f"edit-{task.name}" for task in TASKS)}
    rows = [line for line in text(report).splitlines() if line.startswith("|") and not line.startswith("|---")]
    assert len(rows) == 3 + len(report["samples"]) + len(SAMPLED_BACK) + len(report["edits"])
