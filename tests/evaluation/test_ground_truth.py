"""Cases change one word; every method is scored on the same truth."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab
from torch import Tensor

from easyinv_edit.evaluation.ground_truth import (
    ALL_TASKS,
    APART,
    MOVE,
    TASKS,
    UNSAYABLE,
    Case,
    Task,
    make_case,
    make_cases,
)
from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.evaluation.truth_edits import METHODS, Outcome, run_task
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.tabletop.judge import Judge
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import (
    COLOURS,
    LOOKALIKES,
    PLACES,
    POSES,
    SHAPES,
    WORDS,
    Scene,
    middle,
    random_scene,
    replace,
    second_colours,
)

SCENES = [random_scene(seed) for seed in range(200)]


SAYABLE = [*ALL_TASKS.values(), APART]


@pytest.mark.parametrize("task", SAYABLE, ids=lambda task: task.name)
def test_a_case_changes_one_attribute_and_one_word(task: Task) -> None:
    cases = make_cases(task, SCENES, 50)
    assert len(cases) == 50
    for case in cases:
        a, b = asdict(case.source), asdict(case.truth)
        assert [field for field in a if a[field] != b[field] and field != "offset"] == [task.field]
        assert abs(middle(case.source) - middle(case.truth)) < 1e-6, "the outline stays where it is"
        words = zip(case.source_prompt.split(), case.prompt.split(), strict=True)
        assert [(x, y) for x, y in words if x != y] == [(a[task.field], b[task.field])]


@pytest.mark.parametrize("task", [*SAYABLE, *UNSAYABLE.values()], ids=lambda task: task.name)
def test_plain_objects_have_nothing_to_carry_over(task: Task) -> None:
    assert make_case(task, replace(SCENES[0], texture="plain")) is None


@pytest.mark.parametrize("shape", ["ball", "ring"])
def test_round_things_are_not_turned(shape: str) -> None:
    turn = next(task for task in TASKS if task.field == "pose")
    scene = replace(SCENES[0], texture="striped", shape=shape)
    assert make_case(turn, scene) is None
    assert make_case(turn, replace(scene, shape="cube")) is not None


# --- texture ------------------------------------------------------------------------------------------------------------


def test_a_texture_prompt_leaves_colours_size_and_pose_to_the_source() -> None:
    for case in make_cases(ALL_TASKS["texture"], SCENES, 50):
        for scene, prompt in ((case.source, case.source_prompt), (case.truth, case.prompt)):
            assert prompt == f"a {scene.texture} {scene.shape} on a {scene.background} background"


def test_every_pattern_becomes_another_one_and_none_plain() -> None:
    pairs = {(case.source.texture, case.truth.texture) for case in make_cases(ALL_TASKS["texture"], SCENES, 50)}
    assert len(pairs) == 3
    assert {old for old, _ in pairs} == {new for _, new in pairs} == {"striped", "dotted", "checked"}


# --- colour -------------------------------------------------------------------------------------------------------------


def alike(cases: Sequence[Case]) -> float:
    return sum({case.source.colour, case.truth.colour} in LOOKALIKES for case in cases) / len(cases)


def test_the_published_colour_edits_stay_a_fifth_look_alikes_and_the_others_are_none() -> None:
    scenes = [random_scene(24_000_000 + seed) for seed in range(500)]
    assert 0.15 < alike(make_cases(ALL_TASKS["colour"], scenes, 400)) < 0.25
    assert alike(make_cases(APART, scenes, 400)) == 0


def test_a_colour_apart_is_far_from_the_old_one_and_beside_any_second_colour() -> None:
    """The distance is CIE 1976's; look-alikes that are not used reach from 28 up."""
    lab = {name: rgb2lab(np.array(rgb)[None, None])[0, 0] for name, rgb in COLOURS.items()}
    chosen: Counter[str] = Counter()
    for colour in COLOURS:
        for second in second_colours(colour):
            case = make_case(APART, Scene(texture="dotted", colour=colour, second=second))
            assert case is not None
            new = case.truth.colour
            assert np.linalg.norm(lab[colour] - lab[new]) > 55, (colour, second, new)
            assert case.truth.second == second
            assert second in second_colours(new)
            chosen[new] += 1
    assert set(chosen) == set(COLOURS)
    assert max(chosen.values()) <= 3 * min(chosen.values())


# --- move ---------------------------------------------------------------------------------------------------------------

MOVED = make_cases(UNSAYABLE["move"], SCENES, 6)


def test_captions_have_no_word_for_a_move_and_no_default_asks_for_one() -> None:
    cases = make_cases(UNSAYABLE["move"], SCENES, 50)
    assert all(case.source_prompt == case.prompt for case in cases)
    assert not set(PLACES) & {word for case in cases for word in case.prompt.split()}
    assert not set(UNSAYABLE) & {*ALL_TASKS, *(task.name for task in TASKS)}
    assert [task.sayable for task in (*SAYABLE, *UNSAYABLE.values())] == [True] * len(SAYABLE) + [False]


def test_a_move_shifts_the_whole_picture_by_an_eighth_of_it_across_the_middle() -> None:
    shift = round(MOVE * 32)
    assert shift == 8
    assert {case.source.offset <= 0 for case in MOVED} == {True, False}
    before, after = (render(scenes, 64)[0] for scenes in ([c.source for c in MOVED], [c.truth for c in MOVED]))
    for case, old, new in zip(MOVED, before, after, strict=True):
        assert replace(case.truth, offset=case.source.offset) == case.source
        assert abs(case.truth.offset - case.source.offset) == pytest.approx(MOVE)
        assert case.source.offset * (case.truth.offset - case.source.offset) <= 0
        if case.truth.offset < case.source.offset:
            old, new = new, old
        assert torch.quantile((new[..., shift:] - old[..., :-shift]).abs(), 0.995) < 1e-3
        assert (new - old).abs().max() > 0.1


def test_the_border_cuts_off_a_fiftieth_of_a_moved_object_at_most() -> None:
    words = itertools.product(SHAPES, POSES, (-0.6, 0.2), (0.0, 0.06))
    sources = [
        Scene(shape=shape, texture="dotted", size="large", pose=pose, yaw=yaw, offset=offset)
        for shape, pose, yaw, offset in words
    ]
    truths = [case.truth for scene in sources if (case := make_case(UNSAYABLE["move"], scene)) is not None]
    before, after = (render(scenes, 64)[1] for scenes in (sources, truths))
    left = after.sum((1, 2, 3)) / before.sum((1, 2, 3))
    assert len(left) == len(sources)
    assert 0.98 < left.min() < 1
    assert left.median() == pytest.approx(1, abs=1e-3)


# --- the methods --------------------------------------------------------------------------------------------------------

CASES = make_cases(TASKS[0], SCENES, 2)


def scored(pipe: EditPipeline, **options: object) -> tuple[dict[str, Outcome], tuple[int, int]]:
    torch.manual_seed(0)
    outcomes, grid = run_task(pipe, Judge().eval(), CASES, num_inference_steps=2, **{"inversion": "ddim", **options})
    return {outcome.method: outcome for outcome in outcomes}, grid.size


def test_every_method_and_both_bounds_are_scored(untrained: EditPipeline) -> None:
    outcomes, grid_size = scored(untrained)
    assert list(outcomes) == ["source unedited", "autoencoder of the truth", *METHODS]
    assert grid_size == (2 * 64, (2 + len(METHODS)) * 64)
    assert all(0 <= share <= 1 for o in outcomes.values() for share in (o.target, o.better, o.silhouette, *o.kept.values()))
    assert all(o.psnr > 0 for o in outcomes.values())
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
        ([case.truth for case in CASES], 1.0, {"texture": 1, "colour": 1, "second": 1}),
        ([case.source for case in CASES], 0.0, {"texture": 1, "colour": 1, "second": 1}),
        ([CASES[0].source, replace(CASES[1].truth, texture="plain")], 0.5, {"texture": 0.5, "colour": 1, "second": 1}),
    ],
    ids=["the truth", "the source", "half, and one texture lost"],
)
def test_words_are_counted_against_the_true_edit(
    untrained: EditPipeline, read: list[Scene], target: float, kept: dict[str, float]
) -> None:
    reader: Any = _Reader(read)
    outcomes, _ = run_task(untrained, reader, CASES, inversion="ddim", num_inference_steps=2)
    assert all((o.target, o.kept) == (target, kept) for o in outcomes)


def _bare(outcome: Outcome) -> Outcome:
    """Without what is against the baseline."""
    return dataclasses.replace(outcome, gain=0, spread=0, better=0)


@pytest.mark.filterwarnings("ignore:fixed_point:easyinv_edit.errors.EasyInvWarning")
def test_the_bounds_are_those_of_the_pictures_alone(untrained: EditPipeline) -> None:
    """Neither the inversion nor the guidance of the edits enters them; the lower one is plain arithmetic on renders."""
    outcomes, other = scored(untrained)[0], scored(untrained, inversion="fixed_point", guidance_scale=1.0)[0]
    for bound in ("source unedited", "autoencoder of the truth"):
        assert _bare(outcomes[bound]) == _bare(other[bound])
    assert outcomes["inverted, plain"].psnr != other["inverted, plain"].psnr
    sources, truths = (render([scene(case) for case in CASES], 64) for scene in (lambda c: c.source, lambda c: c.truth))
    whole = [psnr(a, b) for a, b in zip(sources[0], truths[0], strict=True)]
    inside = [psnr(a, b, m) for a, b, m in zip(sources[0], *truths, strict=True)]
    assert outcomes["source unedited"].psnr == pytest.approx(sum(whole) / 2)
    assert outcomes["source unedited"].object_psnr == pytest.approx(sum(inside) / 2)


def test_no_word_can_be_read_of_a_move_but_everything_else_is_scored(untrained: EditPipeline) -> None:
    reader: Any = _Reader([case.truth for case in MOVED[:2]])
    outcomes, _ = run_task(untrained, reader, MOVED[:2], inversion="ddim", num_inference_steps=2)
    assert all(math.isnan(o.target) and set(o.kept.values()) == {1} and math.isfinite(o.object_psnr) for o in outcomes)
