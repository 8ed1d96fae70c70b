"""Plug-and-Play against maps written out and a feature injected by the test's own hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from torch import Tensor

from attention_control import ControlError, PlugAndPlay, Session, StreamRow, Streams, controlled
from tests.attention_control.explicit import CASES, CLEAR, EXACT, ROWS, Seen, at, attention, evaluate_by, hooks
from tests.attention_control.reference import (
    STEPS,
    Outputs,
    Scene,
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

FEATURE = "up_blocks.1.resnets.1.conv2"
BOTH, FEATURE_ONLY, NEITHER = (0, 24), (25, 39), (40, STEPS - 1)


def injected_map(seen: Seen, row: StreamRow) -> Tensor:
    """Section 4.1 of the paper: the source's self-attention affinities on the target's values."""
    source = seen.mate(row)
    return attention(seen.query[source], seen.key[source], seen.value[row])


@contextmanager
def injected_feature(unet: UNet2DConditionModel, streams: Streams, path: str = FEATURE) -> Iterator[None]:
    """The source's feature in place of every target's of the same half (of the only half there is)."""
    sources = [(row.half, i) for i, row in enumerate(streams.rows) if row.role == "source"]

    def inject(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        new = output.clone()
        for i, row in enumerate(streams.rows):
            if row.role == "target":
                new[i] = output[dict(sources).get(row.half, sources[0][1])]
        return new

    handle = unet.get_submodule(path).register_forward_hook(inject)
    try:
        yield
    finally:
        handle.remove()


def expected_of(unet: UNet2DConditionModel, scene: Scene, streams: Streams, sites: Any = range(8, 16)) -> Outputs:
    """Plug-and-Play in a step in which both act."""
    with injected_feature(unet, streams):
        return evaluate_by(unet, scene, streams, at(sites, injected_map))


@CASES
@ROWS
def test_maps_and_feature_are_the_sources(
    unet: UNet2DConditionModel, rows: Callable[[int], Streams], targets: int, size: tuple[int, int]
) -> None:
    scene, streams = make_scene(targets, size), rows(targets)
    expected = expected_of(unet, scene, streams)
    plain = evaluate(unet, scene, streams)
    assert all(distance({row: output}, plain) > CLEAR for row, output in targets_of(expected).items())
    assert distance(evaluate_controlled(unet, PlugAndPlay(), scene, streams), expected) <= EXACT


@pytest.mark.parametrize("step", BOTH)
def test_both_act_in_the_first_half(unet: UNet2DConditionModel, step: int) -> None:
    scene, streams = make_scene(), official_rows()
    expected = expected_of(unet, scene, streams)
    assert distance(evaluate_controlled(unet, PlugAndPlay(), scene, streams, step), expected) <= EXACT


@pytest.mark.parametrize("step", FEATURE_ONLY)
def test_then_the_feature_alone_until_four_fifths(unet: UNet2DConditionModel, step: int) -> None:
    scene, streams = make_scene(3, (16, 24)), official_rows(3)
    with injected_feature(unet, streams):
        expected = evaluate(unet, scene, streams)
    assert distance(targets_of(expected), evaluate(unet, scene, streams)) > CLEAR
    assert distance(expected, expected_of(unet, scene, streams)) > CLEAR
    assert distance(evaluate_controlled(unet, PlugAndPlay(), scene, streams, step), expected) <= EXACT


@pytest.mark.parametrize("step", NEITHER)
@ROWS
def test_then_nothing_bitwise(unet: UNet2DConditionModel, rows: Callable[[int], Streams], step: int) -> None:
    scene, streams = make_scene(), rows(1)
    assert same_bits(evaluate_controlled(unet, PlugAndPlay(), scene, streams, step), evaluate(unet, scene, streams))


def test_maps_without_the_feature_where_it_stops_earlier(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    expected = evaluate_by(unet, scene, streams, at(range(8, 16), injected_map))
    assert distance(expected, expected_of(unet, scene, streams)) > CLEAR
    out = evaluate_controlled(unet, PlugAndPlay(feature_stop_step=0.1), scene, streams, 5)
    assert distance(out, expected) <= EXACT


@ROWS
def test_an_empty_feature_is_none(unet: UNet2DConditionModel, rows: Callable[[int], Streams]) -> None:
    scene, streams, controller = make_scene(), rows(1), PlugAndPlay(feature="")
    expected = evaluate_by(unet, scene, streams, at(range(8, 16), injected_map))
    assert distance(evaluate_controlled(unet, controller, scene, streams), expected) <= EXACT
    assert same_bits(evaluate_controlled(unet, controller, scene, streams, 25), evaluate(unet, scene, streams))
    with controlled(unet, controller, num_steps=STEPS, latent_size=scene.size) as session:
        assert hooks(unet) == 0
        assert not session.reads_source(25)


def test_other_sites_and_another_module(unet: UNet2DConditionModel) -> None:
    scene, streams, path = make_scene(size=(16, 24)), official_rows(), "up_blocks.2.resnets.0"
    with injected_feature(unet, streams, path):
        expected = evaluate_by(unet, scene, streams, at((3, 15), injected_map))
    out = evaluate_controlled(unet, PlugAndPlay(sites="3,15", feature=path), scene, streams)
    assert distance(targets_of(expected), expected_of(unet, scene, streams)) > CLEAR
    assert distance(out, expected) <= EXACT


def test_the_source_is_left_alone(unet: UNet2DConditionModel) -> None:
    scene = make_scene(2)
    for streams in (official_rows(2), single_source_rows(2), unguided_rows(2)):
        out = evaluate_controlled(unet, PlugAndPlay(), scene, streams)
        assert distance(sources_of(out), evaluate(unet, scene, streams)) <= 1e-12


def test_the_source_is_read_until_the_later_of_both_stops(unet: UNet2DConditionModel) -> None:
    for controller, last in ((PlugAndPlay(), 40), (PlugAndPlay(feature_stop_step=0.2), 25), (PlugAndPlay(feature=""), 25)):
        with controlled(unet, controller, num_steps=STEPS, latent_size=(16, 16)) as session:
            assert [step for step in range(STEPS) if session.reads_source(step)] == list(range(last))


def test_the_feature_waits_for_a_step(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    plain = evaluate(unet, scene, streams)
    with controlled(unet, PlugAndPlay(), num_steps=STEPS, latent_size=scene.size):
        assert same_bits(evaluate(unet, scene, streams), plain)


class _Interruption(RuntimeError):
    pass


def _interrupted(session: Session, unet: UNet2DConditionModel, scene: Scene, streams: Streams) -> None:
    with session.step(0, streams):
        evaluate(unet, scene, streams)
    raise _Interruption


def test_the_hook_is_removed_whatever_happens(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    before, plain = dict(unet.attn_processors), evaluate(unet, scene, streams)
    with controlled(unet, PlugAndPlay(), num_steps=STEPS, latent_size=scene.size):
        assert hooks(unet) == 1
    with pytest.raises(_Interruption), controlled(unet, PlugAndPlay(), num_steps=STEPS, latent_size=scene.size) as session:
        _interrupted(session, unet, scene, streams)
    assert hooks(unet) == 0
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    assert same_bits(evaluate(unet, scene, streams), plain)


@pytest.mark.parametrize("path", ["up_blocks.1.resnets.9.conv2", "no.such.module", "up_blocks.1.resnets.1.conv7"])
def test_an_unknown_module_is_refused_and_nothing_stays_behind(unet: UNet2DConditionModel, path: str) -> None:
    before = dict(unet.attn_processors)
    with (
        pytest.raises(ControlError, match=f"no module '{path}'"),
        controlled(unet, PlugAndPlay(feature=path), num_steps=STEPS, latent_size=(16, 16)),
    ):
        pytest.fail("attached all the same")
    assert hooks(unet) == 0
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("path", ["up_blocks.1.attentions.1", "down_blocks.1"])
def test_a_module_whose_output_is_no_tensor_is_copied_or_refused_in_words(unet: UNet2DConditionModel, path: str) -> None:
    scene, streams = make_scene(), official_rows()
    with suppress(ControlError):
        out = evaluate_controlled(unet, PlugAndPlay(feature=path), scene, streams)
        assert distance(targets_of(out), evaluate(unet, scene, streams)) > CLEAR


def test_a_second_use_of_the_same_controller_equals_the_first(unet: UNet2DConditionModel) -> None:
    scene, streams, controller = make_scene(3, (16, 24)), official_rows(3), PlugAndPlay()
    first = evaluate_controlled(unet, controller, scene, streams)
    assert distance(targets_of(first), evaluate(unet, scene, streams)) > CLEAR
    assert same_bits(evaluate_controlled(unet, controller, scene, streams), first)
