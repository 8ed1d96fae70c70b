"""Edits of the wider world: each changes what it says and nothing else, in the picture and in the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest
import torch

from easyinv_edit.evaluation.company import COMPANY
from easyinv_edit.evaluation.datasets import TabletopEdit, tabletop_edits
from easyinv_edit.evaluation.ground_truth import Case, make_case
from easyinv_edit.images import to_tensor
from easyinv_edit.tabletop.judge import READ, shown
from easyinv_edit.tabletop.scene import middle, random_table

SEED, COUNT, SIZE = 31_000_000, 6, 48
CHANGED: Mapping[str, set[str]] = {
    "swap shape": {"shape", "offset"},
    "swap colour": {"colour"},
    "one of two": {"shape", "offset"},
    "add": {"beside"},
    "repaint": {"texture", "colour"},
    "move": {"place", "offset"},
}
"""Of the scene's fields; another shape has another middle of its body."""


def cases(name: str) -> list[Case]:
    return [item.case for item in tabletop_edits(COMPANY[name], SEED, COUNT, SIZE)]


@pytest.mark.parametrize("name", COMPANY)
def test_an_edit_changes_its_own_attribute_alone(name: str) -> None:
    for case in cases(name):
        before, after = asdict(case.source), asdict(case.truth)
        assert {field for field in before if before[field] != after[field]} <= CHANGED[name]
        assert shown(case.source).get(case.task.field) != shown(case.truth)[case.task.field]


@pytest.mark.parametrize("name", COMPANY)
def test_prompts_say_the_change_and_leave_the_same_unsaid(name: str) -> None:
    for case in cases(name):
        assert case.source_prompt != case.prompt
        assert shown(case.truth)[case.task.field] in case.prompt.split()
        assert case.words[1] in case.prompt.split()
        if "colour" in case.task.unnamed:
            assert case.source.colour not in case.source_prompt.split()


@pytest.mark.parametrize("name", COMPANY)
def test_what_is_judged_can_be_read(name: str) -> None:
    task = COMPANY[name]
    assert {task.field, *task.kept} <= set(READ)
    assert task.field not in task.kept


@pytest.mark.parametrize("name", ["swap shape", "one of two"])
def test_another_shape_stands_where_the_old_one_stood(name: str) -> None:
    for case in cases(name):
        assert middle(case.truth) == pytest.approx(middle(case.source), abs=1e-6)
        assert case.truth.shape not in {solid.shape for solid in case.source.solids}


def test_a_moved_solid_goes_to_the_other_side() -> None:
    for case in cases("move"):
        assert {case.source.place, case.truth.place} == {"left", "right"}


@pytest.mark.parametrize("name", COMPANY)
def test_outside_its_mask_a_true_edit_changes_nothing(name: str) -> None:
    for item in tabletop_edits(COMPANY[name], SEED, 2, SIZE):
        assert item.mask is not None
        assert item.truth is not None
        differ = (to_tensor(item.picture) - to_tensor(item.truth)).abs().amax((0, 1)) > 1 / 255
        assert not differ[item.mask == 0].any()


def test_the_solid_that_stays_is_outside_of_the_masks() -> None:
    item: TabletopEdit = tabletop_edits(COMPANY["one of two"], SEED, 1, SIZE)[0]
    assert item.masks is not None
    before, after = item.masks
    assert before.sum() > 0
    assert max(before[:, SIZE // 2 + 1 :].max(), after[:, SIZE // 2 + 1 :].max()) == 0


def test_what_is_added_has_a_box_and_was_nowhere_before() -> None:
    for item in tabletop_edits(COMPANY["add"], SEED, COUNT, SIZE):
        assert item.masks is not None
        assert item.box is not None
        before, after = item.masks
        left, top, right, bottom = (round(v * SIZE) for v in item.box)
        assert before.max() == 0
        assert after[top:bottom, left:right].sum() == pytest.approx(after.sum().item())
        assert left >= SIZE / 2 - 1
        assert item.words == (item.case.truth.solids[1].shape,) * 2


def test_a_new_look_comes_with_a_picture_of_it() -> None:
    for item in tabletop_edits(COMPANY["repaint"], SEED, COUNT, SIZE):
        style, truth = item.case.style, item.case.truth
        assert style is not None
        assert (style.texture, style.colour, style.second) == (truth.texture, truth.colour, truth.second)
        assert style.shape != truth.shape
        assert item.style is not None
        assert item.style.size == (SIZE, SIZE)
        assert item.style_prompt.split()[-1] == "background"
    assert tabletop_edits(COMPANY["move"], SEED, 1, SIZE)[0].style is None


@pytest.mark.parametrize("name", COMPANY)
def test_a_scene_that_cannot_show_it_gives_none(name: str) -> None:
    made: list[Any] = [make_case(COMPANY[name], random_table(SEED + i)) for i in range(40)]
    assert None in made
    assert any(made)


def test_a_task_has_many_cases() -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(SEED, SEED + 10**6, (200,), generator=generator).tolist()
    found = {name: sum(make_case(task, random_table(seed)) is not None for seed in seeds) for name, task in COMPANY.items()}
    assert min(found.values()) >= 30
