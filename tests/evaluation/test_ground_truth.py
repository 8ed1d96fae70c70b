"""Cases change one word; every method is scored on the same truth."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from easyinv_edit.evaluation.ground_truth import METHODS, TASKS, Task, make_case, make_cases, run_task
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.tabletop.judge import Judge
from easyinv_edit.tabletop.scene import random_scene, replace

SCENES = [random_scene(seed) for seed in range(200)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_case_changes_one_attribute_and_one_word(task: Task) -> None:
    cases = make_cases(task, SCENES, 50)
    assert len(cases) == 50
    for case in cases:
        a, b = asdict(case.source), asdict(case.truth)
        assert [field for field in a if a[field] != b[field]] == [task.field]
        words = zip(case.source_prompt.split(), case.prompt.split(), strict=True)
        assert [(x, y) for x, y in words if x != y] == [(a[task.field], b[task.field])]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_plain_objects_have_nothing_to_carry_over(task: Task) -> None:
    assert make_case(task, replace(SCENES[0], texture="plain")) is None


def test_every_method_and_both_bounds_are_scored(untrained: EditPipeline) -> None:
    torch.manual_seed(0)
    cases = make_cases(TASKS[0], SCENES, 2)
    outcomes, grid = run_task(untrained, Judge().eval(), cases, inversion="ddim", num_inference_steps=2)
    assert [o.method for o in outcomes] == ["source unedited", "autoencoder of the truth", *METHODS]
    assert grid.size == (2 * 64, (2 + len(METHODS)) * 64)
    assert all(0 <= o.target <= 1 and 0 <= o.kept <= 1 and o.psnr > 0 for o in outcomes)
