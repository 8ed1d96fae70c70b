"""Structure (Free-Prompt-Editing): the source's softmax map times the target's own values, against the map written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from attention_control import StreamRow, Streams, Structure
from tests.attention_control.explicit import CASES, CLEAR, EXACT, ROWS, Rule, Seen, at, evaluate_by
from tests.attention_control.reference import (
    STEPS,
    distance,
    evaluate,
    evaluate_controlled,
    make_scene,
    official_rows,
    same_bits,
    single_source_rows,
    sources_of,
    targets_of,
    unguided_rows,
)

DEFAULT_SITES = range(2, 13)


def _source_map(seen: Seen, row: StreamRow) -> Tensor:
    source = seen.mate(row)
    query, key = seen.query[source], seen.key[source]
    return torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1)


def replaced(seen: Seen, row: StreamRow) -> Tensor:
    """Section 4 of the paper: the target's map is the source's, its values stay."""
    return _source_map(seen, row) @ seen.value[row]


def replaced_in_the_conditional_half(seen: Seen, row: StreamRow) -> Tensor:
    """As in the authors' code."""
    return replaced(seen, row) if row.half == "conditional" else seen.plain(row)


@CASES
@pytest.mark.parametrize(
    ("halves", "rule", "rows"),
    [
        ("conditional", replaced_in_the_conditional_half, official_rows),
        ("conditional", replaced_in_the_conditional_half, single_source_rows),
        ("conditional", replaced_in_the_conditional_half, unguided_rows),
        ("both", replaced, official_rows),
        ("both", replaced, single_source_rows),
    ],
)
def test_targets_are_the_sources_map_times_own_values(
    unet: UNet2DConditionModel,
    rows: Callable[[int], Streams],
    targets: int,
    size: tuple[int, int],
    halves: Any,
    rule: Rule,
) -> None:
    scene, streams = make_scene(targets, size), rows(targets)
    expected = evaluate_by(unet, scene, streams, at(DEFAULT_SITES, rule))
    assert distance(targets_of(expected), evaluate(unet, scene, streams)) > CLEAR
    assert distance(evaluate_controlled(unet, Structure(halves=halves), scene, streams), expected) <= EXACT


def test_by_default_the_unconditional_half_and_the_source_are_plain(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(2), official_rows(2)
    plain, out = evaluate(unet, scene, streams), evaluate_controlled(unet, Structure(), scene, streams)
    for row in out:
        controlled_here = row.role == "target" and row.half == "conditional"
        assert (distance({row: out[row]}, plain) > CLEAR) is controlled_here
    assert distance(sources_of(out), plain) <= 1e-12


def test_both_halves_are_told_apart_from_the_conditional_one(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    both = evaluate_controlled(unet, Structure(halves="both"), scene, streams)
    conditional = evaluate_controlled(unet, Structure(), scene, streams)
    assert distance(targets_of(both), conditional) > CLEAR


@pytest.mark.parametrize(
    ("sites", "chosen"),
    [("tokens<=64", range(2, 13)), ("0-", range(16)), ("mid_block,15", (6, 15)), ("up_blocks.1", (7, 8, 9))],
)
def test_only_the_chosen_sites_follow(unet: UNet2DConditionModel, sites: str, chosen: Any) -> None:
    scene, streams = make_scene(), official_rows()
    expected = evaluate_by(unet, scene, streams, at(chosen, replaced))
    out = evaluate_controlled(unet, Structure(sites=sites, halves="both"), scene, streams)
    assert distance(targets_of(expected), evaluate(unet, scene, streams)) > CLEAR
    assert distance(out, expected) <= EXACT


@pytest.mark.parametrize("step", [0, 20, 39])
def test_the_window_is_the_first_four_fifths(unet: UNet2DConditionModel, step: int) -> None:
    scene, streams = make_scene(size=(16, 24)), official_rows()
    expected = evaluate_by(unet, scene, streams, at(DEFAULT_SITES, replaced_in_the_conditional_half))
    assert distance(evaluate_controlled(unet, Structure(), scene, streams, step), expected) <= EXACT


@pytest.mark.parametrize("step", [40, STEPS - 1])
@ROWS
def test_later_steps_are_bitwise_plain(unet: UNet2DConditionModel, rows: Callable[[int], Streams], step: int) -> None:
    scene, streams = make_scene(), rows(1)
    assert same_bits(evaluate_controlled(unet, Structure(), scene, streams, step), evaluate(unet, scene, streams))


def test_steps_before_the_start_are_bitwise_plain(unet: UNet2DConditionModel) -> None:
    scene, streams, controller = make_scene(), official_rows(), Structure(start_step=5)
    plain = evaluate(unet, scene, streams)
    assert same_bits(evaluate_controlled(unet, controller, scene, streams, 4), plain)
    assert distance(targets_of(evaluate_controlled(unet, controller, scene, streams, 5)), plain) > CLEAR


def test_a_second_use_of_the_same_controller_equals_the_first(unet: UNet2DConditionModel) -> None:
    scene, streams, controller = make_scene(3, (16, 24)), official_rows(3), Structure()
    first = evaluate_controlled(unet, controller, scene, streams)
    assert distance(targets_of(first), evaluate(unet, scene, streams)) > CLEAR
    assert same_bits(evaluate_controlled(unet, controller, scene, streams), first)


@pytest.mark.parametrize("halves", ["unconditional", "", None])
def test_an_unknown_half_is_refused(halves: Any) -> None:
    with pytest.raises(ValueError, match="halves"):
        Structure(halves=halves)
