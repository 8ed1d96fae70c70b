"""StyleAligned against equations 2 and 3 of the paper written out, the weight of the reference multiplying its keys' scores."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from attention_control import MasaCtrl, StreamRow, Streams, StyleAligned
from tests.attention_control.explicit import CASES, CLEAR, EXACT, ROWS, Rule, Seen, at, attention, evaluate_by
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
from tests.helpers import tiny_unet

SMALL = 1e-5
"""Added to a deviation, so that one token has one."""
ALL = range(16)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population deviation per head channel of (heads, tokens, channels), over the tokens."""
    mean = x.sum(1, keepdim=True) / x.shape[1]
    return mean, ((x - mean).square().sum(1, keepdim=True) / x.shape[1]).sqrt() + SMALL


def normalized_to(x: Tensor, like: Tensor) -> Tensor:
    """AdaIN(x, like), equation 3."""
    (mean, deviation), (their_mean, their_deviation) = _moments(x), _moments(like)
    return (x - mean) / deviation * their_deviation + their_mean


def shared(weight: float, adain: bool) -> Rule:
    """Equation 2: over the source's keys, each counting `weight` times, and the own ones."""

    def rule(seen: Seen, row: StreamRow) -> Tensor:
        source = seen.mate(row)
        query, key = seen.query[row], seen.key[row]
        if adain:
            query, key = normalized_to(query, seen.query[source]), normalized_to(key, seen.key[source])
        tokens = query.shape[1]
        weights = torch.cat([torch.full((tokens,), weight, dtype=torch.float64), torch.ones(tokens, dtype=torch.float64)])
        keys, values = torch.cat([seen.key[source], key], 1), torch.cat([seen.value[source], seen.value[row]], 1)
        return attention(query, keys, values, weights)

    return rule


@CASES
@pytest.mark.parametrize(
    ("rows", "adain"),
    [
        (official_rows, True),
        (single_source_rows, True),
        (unguided_rows, True),
        (official_rows, False),
        (unguided_rows, False),
    ],
)
def test_targets_look_at_the_source_beside_themselves(
    unet: UNet2DConditionModel, rows: Callable[[int], Streams], targets: int, size: tuple[int, int], adain: bool
) -> None:
    scene, streams = make_scene(targets, size), rows(targets)
    expected = evaluate_by(unet, scene, streams, at(ALL, shared(1, adain)))
    plain = evaluate(unet, scene, streams)
    assert all(distance({row: output}, plain) > CLEAR for row, output in targets_of(expected).items())
    assert distance(evaluate_controlled(unet, StyleAligned(adain=adain), scene, streams), expected) <= EXACT


@pytest.mark.parametrize(("weight", "adain"), [(0, True), (0.25, True), (2, False), (1000, True)])
def test_the_weight_multiplies_the_scores_of_the_sources_keys(unet: UNet2DConditionModel, weight: float, adain: bool) -> None:
    scene, streams = make_scene(2, (16, 24)), official_rows(2)
    expected = evaluate_by(unet, scene, streams, at(ALL, shared(weight, adain)))
    out = evaluate_controlled(unet, StyleAligned(reference_weight=weight, adain=adain), scene, streams)
    assert distance(out, expected) <= EXACT
    assert distance(targets_of(out), evaluate_by(unet, scene, streams, at(ALL, shared(1, adain)))) > CLEAR


def test_the_sources_statistics_make_a_difference(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    on, off = (evaluate_controlled(unet, StyleAligned(adain=adain), scene, streams) for adain in (True, False))
    assert distance(targets_of(on), off) > CLEAR


@ROWS
def test_no_weight_and_no_statistics_is_plain(unet: UNet2DConditionModel, rows: Callable[[int], Streams]) -> None:
    scene, streams = make_scene(3), rows(3)
    out = evaluate_controlled(unet, StyleAligned(reference_weight=0, adain=False), scene, streams)
    assert distance(out, evaluate(unet, scene, streams)) <= EXACT


def test_a_large_weight_comes_near_to_masactrl(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    masactrl = evaluate_controlled(unet, MasaCtrl(sites="0-"), scene, streams)
    apart = [
        distance(evaluate_controlled(unet, StyleAligned(reference_weight=w, adain=False), scene, streams), masactrl)
        for w in (1, 10, 100, 1000)
    ]
    assert all(later < earlier / 4 for earlier, later in pairwise(apart)), apart
    assert apart[-1] < 1e-3


@pytest.mark.parametrize("adain", [True, False])
def test_sites_of_a_single_token_are_finite_and_exact(unet: UNet2DConditionModel, adain: bool) -> None:
    scene, streams = make_scene(2, (8, 8)), official_rows(2)
    tokens: set[int] = set()

    def watched(seen: Seen, row: StreamRow) -> Tensor:
        tokens.add(seen.query[row].shape[1])
        return shared(1, adain)(seen, row)

    expected = evaluate_by(unet, scene, streams, at(ALL, watched))
    out = evaluate_controlled(unet, StyleAligned(adain=adain), scene, streams)
    assert 1 in tokens
    assert all(torch.isfinite(output).all() for output in out.values())
    assert distance(out, expected) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [0, 1000])
def test_half_precision_is_finite_at_a_single_token_and_near_double(dtype: torch.dtype, weight: float) -> None:
    scene, streams, controller = make_scene(size=(8, 8)), unguided_rows(), StyleAligned(reference_weight=weight)
    exact = evaluate_controlled(tiny_unet(), controller, scene, streams)
    out = evaluate_controlled(tiny_unet(dtype=dtype), controller, scene.to(dtype), streams)
    assert all(torch.isfinite(output).all() for output in out.values())
    assert distance(out, exact) < (1e-2 if dtype == torch.float16 else 6e-2)


@pytest.mark.parametrize("adain", [True, False])
def test_the_source_is_left_alone(unet: UNet2DConditionModel, adain: bool) -> None:
    scene, streams = make_scene(2), official_rows(2)
    out = evaluate_controlled(unet, StyleAligned(adain=adain), scene, streams)
    assert distance(sources_of(out), evaluate(unet, scene, streams)) <= 1e-12


def test_targets_of_one_batch_do_not_see_each_other(unet: UNet2DConditionModel) -> None:
    scene, controller = make_scene(3), StyleAligned()
    together = evaluate_controlled(unet, controller, scene, unguided_rows(3))
    for target in range(3):
        alone = evaluate_controlled(unet, controller, scene.only(target), unguided_rows(1))
        assert (together[unguided_rows(3).rows[1 + target]] - alone[unguided_rows(1).rows[1]]).abs().max() <= EXACT


@pytest.mark.parametrize(("step", "inside"), [(0, False), (4, False), (5, True), (19, True), (20, False), (49, False)])
def test_outside_of_the_window_is_bitwise_plain(unet: UNet2DConditionModel, step: int, inside: bool) -> None:
    scene, streams, controller = make_scene(), official_rows(), StyleAligned(start_step=5, stop_step=0.4)
    out = evaluate_controlled(unet, controller, scene, streams, step)
    if inside:
        assert distance(out, evaluate_by(unet, scene, streams, at(ALL, shared(1, True)))) <= EXACT
    else:
        assert same_bits(out, evaluate(unet, scene, streams))


@pytest.mark.parametrize(("sites", "chosen"), [("10-15", range(10, 16)), ("mid_block", (6,))])
def test_only_the_chosen_sites_share(unet: UNet2DConditionModel, sites: str, chosen: Any) -> None:
    scene, streams = make_scene(size=(16, 24)), official_rows()
    expected = evaluate_by(unet, scene, streams, at(chosen, shared(1, True)))
    assert distance(targets_of(expected), evaluate(unet, scene, streams)) > 1e-6
    assert distance(evaluate_controlled(unet, StyleAligned(sites=sites), scene, streams, STEPS - 1), expected) <= EXACT


def test_a_second_use_of_the_same_controller_equals_the_first(unet: UNet2DConditionModel) -> None:
    scene, streams, controller = make_scene(3, (16, 24)), official_rows(3), StyleAligned()
    first = evaluate_controlled(unet, controller, scene, streams)
    assert distance(targets_of(first), evaluate(unet, scene, streams)) > CLEAR
    assert same_bits(evaluate_controlled(unet, controller, scene, streams), first)


@pytest.mark.parametrize("weight", [-1, 1001, float("nan"), float("inf"), "2x"])
def test_a_weight_out_of_range_is_refused(weight: Any) -> None:
    with pytest.raises(ValueError, match="reference_weight"):
        StyleAligned(reference_weight=weight)
