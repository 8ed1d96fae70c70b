"""Cases change one word; every method is scored on the same truth."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from easyinv_edit.evaluation.ground_truth import METHODS, TASKS, Outcome, Task, make_case, make_cases, run_task
from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.tabletop.judge import Judge
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import WORDS, Scene, random_scene, replace

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


@pytest.mark.parametrize("shape", ["ball", "ring"])
def test_round_things_are_not_turned(shape: str) -> None:
    turn = next(task for task in TASKS if task.field == "pose")
    scene = replace(SCENES[0], texture="striped", shape=shape)
    assert make_case(turn, scene) is None
    assert make_case(turn, replace(scene, shape="cube")) is not None


CASES = make_cases(TASKS[0], SCENES, 2)


def scored(pipe: EditPipeline, **options: object) -> tuple[dict[str, Outcome], tuple[int, int]]:
    torch.manual_seed(0)
    outcomes, grid = run_task(pipe, Judge().eval(), CASES, num_inference_steps=2, **{"inversion": "ddim", **options})
    return {outcome.method: outcome for outcome in outcomes}, grid.size


def test_every_method_and_both_bounds_are_scored(untrained: EditPipeline) -> None:
    outcomes, grid_size = scored(untrained)
    assert list(outcomes) == ["source unedited", "autoencoder of the truth", *METHODS]
    assert grid_size == (2 * 64, (2 + len(METHODS)) * 64)
    assert all(0 <= o.target <= 1 and 0 <= o.kept <= 1 and o.psnr > 0 for o in outcomes.values())
    assert (outcomes["inverted, plain"].gain, outcomes["inverted, plain"].spread) == (0.0, 0.0)


class _Reader:
    """A judge that reads fixed scenes, whatever it is shown."""

    def __init__(self, scenes: list[Scene]) -> None:
        self.scenes = scenes

    def read(self, _pictures: Tensor) -> list[dict[str, str]]:
        return [{field: getattr(scene, field) for field in WORDS} for scene in self.scenes]


@pytest.mark.parametrize(
    ("read", "target", "kept"),
    [
        ([case.truth for case in CASES], 1.0, 1.0),
        ([case.source for case in CASES], 0.0, 1.0),
        ([CASES[0].source, replace(CASES[1].truth, texture="plain")], 0.5, 5 / 6),
    ],
    ids=["the truth", "the source", "half, and one texture lost"],
)
def test_words_are_counted_against_the_true_edit(
    untrained: EditPipeline, read: list[Scene], target: float, kept: float
) -> None:
    reader: Any = _Reader(read)
    outcomes, _ = run_task(untrained, reader, CASES, inversion="ddim", num_inference_steps=2)
    assert all((o.target, o.kept) == (target, pytest.approx(kept)) for o in outcomes)


@pytest.mark.filterwarnings("ignore:fixed_point:easyinv_edit.errors.EasyInvWarning")
def test_the_bounds_are_those_of_the_pictures_alone(untrained: EditPipeline) -> None:
    """Neither the inversion nor the guidance of the edits enters them; the lower one is plain arithmetic on renders."""
    outcomes, other = scored(untrained)[0], scored(untrained, inversion="fixed_point", guidance_scale=1.0)[0]
    for bound in ("source unedited", "autoencoder of the truth"):
        assert dataclasses.replace(outcomes[bound], gain=0, spread=0) == dataclasses.replace(other[bound], gain=0, spread=0)
    assert outcomes["inverted, plain"].psnr != other["inverted, plain"].psnr
    sources, truths = (render([scene(case) for case in CASES], 64) for scene in (lambda c: c.source, lambda c: c.truth))
    whole = [psnr(a, b) for a, b in zip(sources[0], truths[0], strict=True)]
    inside = [psnr(a, b, m) for a, b, m in zip(sources[0], *truths, strict=True)]
    assert outcomes["source unedited"].psnr == pytest.approx(sum(whole) / 2)
    assert outcomes["source unedited"].object_psnr == pytest.approx(sum(inside) / 2)
