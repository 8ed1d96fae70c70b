"""MasaCtrl against a reference that shares no code with it (see `reference.py`), in float64."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from attention_control import ControlError, MasaCtrl, Route, Run
from attention_control.sites import ALLOWED
from attention_control.streams import Streams, layout
from tests.attention_control.reference import (
    Scene,
    distance,
    evaluate,
    evaluate_controlled,
    evaluate_official,
    make_scene,
    official_rows,
    single_source_rows,
    sources_of,
    targets_of,
    unguided_rows,
)
from tests.helpers import tiny_unet

EXACT = 1e-10
"""Of outputs of order 1, in float64: rounding and nothing else."""
CLEAR = 1e-2
"""A difference no rounding makes: control moves these outputs by 2e-2 and more."""
SIZES = [(16, 16), (16, 24)]


# --- equal to the reference ---------------------------------------------------------------------------------------------


def test_the_reference_without_routing_is_plain_attention(unet: UNet2DConditionModel) -> None:
    scene, rows = make_scene(targets=0), unguided_rows(0)
    assert distance(evaluate_official(unet, scene, rows, halves=1), evaluate(unet, scene, rows)) <= EXACT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize(("rows", "halves"), [(official_rows, 2), (unguided_rows, 1)], ids=["paired source", "guidance off"])
def test_equals_the_authors_layout(
    unet: UNet2DConditionModel, rows: Any, halves: int, targets: int, size: tuple[int, int]
) -> None:
    scene, streams = make_scene(targets, size), rows(targets)
    official = evaluate_official(unet, scene, streams, halves=halves)
    assert distance(evaluate_controlled(unet, MasaCtrl(), scene, streams), official) <= EXACT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("targets", [1, 3])
def test_one_source_row_serves_both_halves_where_its_prompt_is_empty(
    unet: UNet2DConditionModel, targets: int, size: tuple[int, int]
) -> None:
    scene = make_scene(targets, size, empty_source=True)
    official = evaluate_official(unet, scene, official_rows(targets))
    out = evaluate_controlled(unet, MasaCtrl(), scene, single_source_rows(targets))
    assert len(out) == 1 + 2 * targets
    assert distance(out, official) <= EXACT


def test_one_source_row_is_something_else_where_its_prompt_is_not_empty(unet: UNet2DConditionModel) -> None:
    scene = make_scene()
    official = evaluate_official(unet, scene, official_rows())
    assert distance(evaluate_controlled(unet, MasaCtrl(), scene, single_source_rows()), official) > CLEAR


SHUFFLED = layout(
    [
        ("target", 0, "conditional"),
        ("source", 0, "unconditional"),
        ("target", 0, "unconditional"),
        ("source", 0, "conditional"),
    ]
)


def test_the_order_of_rows_does_not_matter(unet: UNet2DConditionModel) -> None:
    scene = make_scene()
    official = evaluate_official(unet, scene, official_rows())
    assert distance(evaluate_controlled(unet, MasaCtrl(), scene, SHUFFLED), official) <= EXACT


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("targets", [1, 3])
def test_strength_one_half_is_the_union_of_both_keys(unet: UNet2DConditionModel, targets: int, size: tuple[int, int]) -> None:
    scene, streams = make_scene(targets, size), official_rows(targets)
    union = evaluate_official(unet, scene, streams, union=True)
    assert distance(evaluate_controlled(unet, MasaCtrl(strength=0.5), scene, streams), union) <= EXACT


# --- what must hold of any mutual self-attention ------------------------------------------------------------------------

EVERY_LAYOUT = pytest.mark.parametrize(
    "streams",
    [official_rows(), single_source_rows(), unguided_rows(), SHUFFLED],
    ids=["paired", "single", "unguided", "shuffled"],
)


@EVERY_LAYOUT
@pytest.mark.parametrize("sites", ["10-15", "0-"])
def test_control_changes_the_target(unet: UNet2DConditionModel, streams: Streams, sites: str) -> None:
    scene = make_scene()
    plain = evaluate(unet, scene, streams)
    out = evaluate_controlled(unet, MasaCtrl(sites=sites), scene, streams)
    for row, controlled_output in targets_of(out).items():
        assert distance({row: controlled_output}, plain) > CLEAR


@EVERY_LAYOUT
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
def test_the_source_is_left_alone(unet: UNet2DConditionModel, streams: Streams, strength: float) -> None:
    scene = make_scene()
    plain = evaluate(unet, scene, streams)
    out = evaluate_controlled(unet, MasaCtrl(sites="0-", strength=strength), scene, streams)
    assert distance(sources_of(out), plain) <= 1e-12


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("rows", [official_rows, unguided_rows])
def test_a_target_that_starts_as_its_source_stays_its_source(unet: UNet2DConditionModel, rows: Any, strength: float) -> None:
    scene = make_scene()
    twin = Scene(scene.latents[[0, 0]], scene.text[[0, 0]], scene.empty)
    out = evaluate_controlled(unet, MasaCtrl(strength=strength), twin, rows())
    source = {row.half: out[row] for row in sources_of(out)}
    assert all((output - source[row.half]).abs().max() <= 1e-12 for row, output in targets_of(out).items())


@pytest.mark.parametrize("rows", [official_rows, single_source_rows, unguided_rows])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_targets_of_one_batch_do_not_see_each_other(unet: UNet2DConditionModel, rows: Any, strength: float) -> None:
    scene, controller = make_scene(targets=3), MasaCtrl(strength=strength)
    together = evaluate_controlled(unet, controller, scene, rows(3))
    for target in range(3):
        alone = targets_of(evaluate_controlled(unet, controller, scene.only(target), rows(1)))
        for row, output in alone.items():
            of_batch = next(out for other, out in together.items() if other == type(row)("target", target, row.half))
            assert (of_batch - output).abs().max() <= EXACT


# --- strength -----------------------------------------------------------------------------------------------------------


@EVERY_LAYOUT
def test_strength_zero_is_plain_attention(unet: UNet2DConditionModel, streams: Streams) -> None:
    scene = make_scene()
    out = evaluate_controlled(unet, MasaCtrl(strength=0), scene, streams)
    assert distance(out, evaluate(unet, scene, streams)) <= EXACT


def test_strength_one_is_the_limit_of_strengths_below_it(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    official = evaluate_official(unet, scene, streams)
    assert distance(evaluate_controlled(unet, MasaCtrl(strength=1), scene, streams), official) <= EXACT
    assert distance(evaluate_controlled(unet, MasaCtrl(strength=1 - 1e-12), scene, streams), official) <= 1e-9


def test_more_strength_is_nearer_to_masactrl_and_farther_from_plain(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    full, plain = evaluate_controlled(unet, MasaCtrl(), scene, streams), evaluate(unet, scene, streams)
    strengths = [0, 0.25, 0.5, 0.75, 0.9, 0.99, 1]
    outputs = [targets_of(evaluate_controlled(unet, MasaCtrl(strength=s), scene, streams)) for s in strengths]
    to_full, to_plain = ([distance(out, end) for out in outputs] for end in (full, plain))
    assert all(later < earlier for earlier, later in pairwise(to_full)), to_full
    assert all(later > earlier for earlier, later in pairwise(to_plain)), to_plain


# --- half precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "near"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("strength", [1.0, 0.99999, 0.5, 0.0])
def test_half_precision_is_finite_and_near_double(dtype: torch.dtype, near: float, strength: float) -> None:
    scene, streams, controller = make_scene(), official_rows(), MasaCtrl(strength=strength)
    exact = evaluate_controlled(tiny_unet(), controller, scene, streams)
    out = evaluate_controlled(tiny_unet(dtype=dtype), controller, scene.to(dtype), streams)
    assert all(output.dtype == dtype and output.isfinite().all() for output in out.values())
    assert distance(out, exact) < near


# --- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": -0.1},
        {"strength": 1.1},
        {"strength": float("nan")},
        {"start_step": -1},
        {"start_step": -0.5},
        {"start_step": 1.5},
        {"start_step": float("nan")},
        {"stop_step": -1},
        {"stop_step": 2.5},
        {"start_step": 4.0},
        {"start_step": "4"},
        {"start_step": True},
        {"sites": [10]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(settings))):
        MasaCtrl(**settings)


@pytest.mark.parametrize("sites", ["", "fifteen", "15-10", "10-15,oops"])
def test_unreadable_sites_are_refused_with_what_is_allowed(sites: str) -> None:
    with pytest.raises(ValueError, match="cannot read") as refusal:
        MasaCtrl(sites=sites)
    assert ALLOWED in str(refusal.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        MasaCtrl().strength = 0.5  # type: ignore[misc]


def test_the_defaults_are_the_authors_four_of_fifty_and_layers_ten_to_fifteen() -> None:
    (route,) = MasaCtrl().program(Run(50, (16, 16))).routes
    assert [step for step in range(50) if route.active(step, 50)] == list(range(4, 50))
    assert [step for step in range(20) if route.active(step, 20)] == list(range(2, 20))
    assert (route.query, route.key, route.value, route.sites, route.share) == ("own", "source", "source", "strong", 1.0)


def test_one_site_may_be_written_as_a_number() -> None:
    settings: dict[str, Any] = {"sites": 10}
    assert MasaCtrl(**settings) == MasaCtrl(sites="10")


def test_a_whole_number_of_steps_is_not_a_share() -> None:
    (route,) = MasaCtrl(start_step=4).program(Run(50, (16, 16))).routes
    assert [step for step in range(20) if route.active(step, 20)] == list(range(4, 20))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_route_refuses_a_share_that_is_no_weight(share: float) -> None:
    with pytest.raises(ControlError, match="between 0"):
        Route("own", "source", "source", "10", share=share)


@pytest.mark.parametrize("suppliers", [("source", "source", "source"), ("own", "own", "source"), ("source", "source", "own")])
def test_a_route_joins_only_keys_with_their_values(suppliers: tuple[Any, Any, Any]) -> None:
    Route(*suppliers, sites="10")
    with pytest.raises(ControlError, match="share below 1"):
        Route(*suppliers, sites="10", share=0.5)
