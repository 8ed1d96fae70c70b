"""ObjectAdd: a bias on a word's logits inside a box, against softmax written out, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from attention_control import Compose, ControlError, ObjectAdd, PromptToPrompt, Run, StreamRow, Words, controlled
from attention_control.object_add import BoxBias, BoxPaste, box_mask
from attention_control.streams import layout
from tests.attention_control.cross_reference import CLEAR, EXACT, SOURCE, Bias, Maps, evaluate_with_words, evaluate_written
from tests.attention_control.reference import (
    STEPS,
    WORDS,
    distance,
    evaluate,
    make_scene,
    official_rows,
    same_bits,
    single_source_rows,
    sources_of,
    unguided_rows,
)

Box = tuple[float, float, float, float]

CASES: list[tuple[tuple[int, int], Box]] = [
    ((16, 16), (0.0, 0.5, 0.5, 1.0)),
    ((16, 32), (0.25, 0.0, 0.75, 0.5)),
    ((32, 16), (0.5, 0.25, 1.0, 1.0)),
]
"""Latents, and boxes [left, top, right, bottom] on places' edges at every site, down to an eighth of the latent."""
TARGET = StreamRow("target", 0, "conditional")
LEFT: Box = (0.0, 0.0, 0.5, 1.0)


def _inside(box: Box, size: tuple[int, int]) -> Tensor:
    """Which places (h, w) have their centre in the box."""
    height, width = size
    rows = [
        [box[0] < (x + 0.5) / width < box[2] and box[1] < (y + 0.5) / height < box[3] for x in range(width)]
        for y in range(height)
    ]
    return torch.tensor(rows)


def raised(tokens: Sequence[int], box: Box, strength: float = 5.0) -> Bias:
    """The word's logits are that much higher in the box and as much lower elsewhere."""

    def bias(row: StreamRow, size: tuple[int, int]) -> Tensor:
        added = torch.zeros(size[0] * size[1], 7, dtype=torch.float64)
        for place, inside in enumerate(_inside(box, size).flatten().tolist()):
            for token in tokens:
                added[place, token] = strength if inside else -strength
        return added

    return bias


# --- equal to the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "size", "box"),
    [(official_rows, *CASES[0]), (official_rows, *CASES[1]), (single_source_rows, *CASES[2]), (unguided_rows, *CASES[0])],
)
def test_equals_softmax_with_the_bias_added(unet: UNet2DConditionModel, rows: Any, size: tuple[int, int], box: Box) -> None:
    scene, streams = make_scene(size=size), rows()
    expected = evaluate_written(unet, scene, streams, bias=raised([3], box)).outputs
    out = evaluate_with_words(unet, ObjectAdd("ball", box), scene, streams)
    assert distance(out, expected) <= EXACT
    assert distance({TARGET: out[TARGET]}, evaluate(unet, scene, streams)) > CLEAR


@pytest.mark.parametrize("strength", [0.5, 20.0, 100.0])
def test_the_strength_is_what_is_added(unet: UNet2DConditionModel, strength: float) -> None:
    scene, streams = make_scene(), unguided_rows()
    expected = evaluate_written(unet, scene, streams, bias=raised([3], LEFT, strength)).outputs
    assert distance(evaluate_with_words(unet, ObjectAdd("ball", LEFT, strength=strength), scene, streams), expected) <= EXACT


def test_every_token_of_the_word_is_raised(unet: UNet2DConditionModel) -> None:
    scene, streams, words = make_scene(), official_rows(), (WORDS[1], WORDS[0])
    expected = evaluate_written(unet, scene, streams, bias=raised([2, 3, 4], LEFT)).outputs
    out = evaluate_with_words(unet, ObjectAdd("red cube", LEFT), scene, streams, words=words)
    assert distance(out, expected) <= EXACT


def test_the_word_is_raised_where_it_stands_in_each_target(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(targets=2), single_source_rows(2)
    words = (WORDS[0], WORDS[1], Words(("ball", "and", "cube"), ((1, 2), (3,), (4,)), 7))
    biases = [raised([3], LEFT), raised([1, 2], LEFT)]
    expected = evaluate_written(unet, scene, streams, bias=lambda row, size: biases[row.index](row, size)).outputs
    assert distance(evaluate_with_words(unet, ObjectAdd("ball", LEFT), scene, streams, words=words), expected) <= EXACT


@pytest.mark.parametrize("rows", [official_rows, single_source_rows, unguided_rows])
def test_three_targets_equal_softmax_with_the_bias_of_each(unet: UNet2DConditionModel, rows: Any) -> None:
    """Oblong; the word stands elsewhere in every prompt, and is of several tokens in one."""
    size, box = CASES[1]
    scene, streams = make_scene(targets=3, size=size), rows(3)
    words = (WORDS[0], WORDS[1], Words(("ball", "and", "cube"), ((1, 2), (3,), (4,)), 7), Words(("ball",), ((1,),), 7))
    biases = [raised(tokens, box) for tokens in ([3], [1, 2], [1])]
    expected = evaluate_written(unet, scene, streams, bias=lambda row, size: biases[row.index](row, size)).outputs
    out, plain = evaluate_with_words(unet, ObjectAdd("ball", box), scene, streams, words=words), evaluate(unet, scene, streams)
    assert distance(out, expected) <= EXACT
    targets = [StreamRow("target", i, "conditional") for i in range(3)]
    assert all(distance({row: out[row]}, plain) > CLEAR for row in targets)


def test_with_word_control_the_bias_comes_before_the_softmax_and_the_sources_map_after_it(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()

    def red_follows(row: StreamRow, maps: Maps) -> Tensor:
        made = maps[row].clone()
        for target, source in ((0, 0), (1, 1), (2, 2), (4, 5), (5, 6), (6, 6)):
            made[:, :, target] = maps[SOURCE][:, :, source]
        return made

    expected = evaluate_written(unet, scene, streams, bias=raised([3], LEFT), edit=red_follows).outputs
    both = [PromptToPrompt(self_steps=0), ObjectAdd("ball", LEFT)]
    for controllers in (both, both[::-1]):
        out = evaluate_with_words(unet, Compose(tuple(controllers)), scene, streams)
        assert distance(out, expected) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strength", [5.0, 100.0])
def test_half_precision_is_finite_and_near_double(unet: UNet2DConditionModel, dtype: torch.dtype, strength: float) -> None:
    scene, streams, controller = make_scene(), official_rows(), ObjectAdd("ball", LEFT, strength=strength)
    exact = evaluate_with_words(unet, controller, scene, streams)
    out = evaluate_with_words(unet.to(dtype), controller, scene.to(dtype), streams)
    assert all(output.dtype == dtype and output.isfinite().all() for output in out.values())
    assert distance(out, exact) < (5e-3 if dtype == torch.float16 else 3e-2)


# --- what must hold -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [official_rows, single_source_rows, unguided_rows])
def test_all_but_conditional_targets_are_bitwise_plain(unet: UNet2DConditionModel, rows: Any) -> None:
    scene, streams = make_scene(), rows()
    plain = evaluate(unet, scene, streams)
    out = evaluate_with_words(unet, ObjectAdd("ball", LEFT), scene, streams)
    left_alone = {row: output for row, output in out.items() if row != TARGET}
    assert same_bits(left_alone, {row: output for row, output in plain.items() if row != TARGET})
    assert sources_of(left_alone)


@pytest.mark.parametrize(("step", "biased"), [(0, True), (19, True), (20, False), (49, False)])
def test_the_bias_acts_until_its_stop(unet: UNet2DConditionModel, step: int, biased: bool) -> None:
    scene, streams = make_scene(), official_rows()
    out = evaluate_with_words(unet, ObjectAdd("ball", LEFT), scene, streams, step)
    assert same_bits(out, evaluate(unet, scene, streams)) is not biased


@pytest.mark.parametrize("settings", [{"strength": 0}, {"bias_stop": 0}], ids=str)
def test_without_bias_the_unet_is_bitwise_plain(unet: UNet2DConditionModel, settings: dict[str, Any]) -> None:
    scene, streams = make_scene(), official_rows()
    out = evaluate_with_words(unet, ObjectAdd("ball", LEFT, **settings), scene, streams, step=0)
    assert same_bits(out, evaluate(unet, scene, streams))


def test_the_program_holds_the_bias_and_the_paste() -> None:
    run = Run(STEPS, (16, 16), words=(WORDS[1], WORDS[0], WORDS[2]))
    program = ObjectAdd("Cube", LEFT, strength=3, bias_stop=7, mask_start=0.5, mask_threshold=0.25).program(run)
    assert program.cross == (BoxBias(((3, 4), (3, 4)), (7, 7), LEFT, 3, 7),)
    assert program.blends == (BoxPaste(((3, 4), (3, 4)), LEFT, 0.25, 25),)
    assert program.wants_maps
    assert program.routes == program.features == ()


def test_the_source_is_read_at_every_step(unet: UNet2DConditionModel) -> None:
    with controlled(unet, ObjectAdd("ball", LEFT), num_steps=STEPS, latent_size=(16, 16), words=WORDS[:2]) as session:
        assert all(session.reads_source(step) for step in range(STEPS))
        assert not any(session.reads_both_halves(step) for step in range(STEPS))


def test_an_empty_source_prompt_will_do(unet: UNet2DConditionModel) -> None:
    scene, streams, empty = make_scene(), official_rows(), Words((), (), 7)
    with_prompt = evaluate_with_words(unet, ObjectAdd("ball", LEFT), scene, streams)
    assert same_bits(evaluate_with_words(unet, ObjectAdd("ball", LEFT), scene, streams, words=(empty, WORDS[1])), with_prompt)


def test_after_a_step_the_source_is_back_outside_the_box(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), layout([("source", 0, "conditional"), ("target", 0, "conditional")])
    with controlled(unet, ObjectAdd("ball", LEFT), num_steps=STEPS, latent_size=(16, 16), words=WORDS[:2]) as session:
        with session.step(0, streams):
            evaluate(unet, scene, streams)
        out = session.after(0, scene.latents[:1], scene.latents[1:])
    assert torch.equal(out[:, :, :, :8], scene.latents[1:, :, :, :8])
    assert torch.equal(out[:, :, :, 8:], scene.latents[:1, :, :, 8:])


# --- the box --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "box"), CASES)
@pytest.mark.parametrize("divided", [1, 2, 4, 8])
def test_the_mask_of_a_box_holds_the_places_in_it(size: tuple[int, int], box: Box, divided: int) -> None:
    grid = size[0] // divided, size[1] // divided
    assert torch.equal(box_mask(box, grid), _inside(box, grid).float())
    assert box_mask(box, grid).shape == grid


def test_the_mask_of_the_whole_picture_is_full() -> None:
    assert torch.equal(box_mask((0, 0, 1, 1), (13, 17)), torch.ones(13, 17))


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((0.0, 0.0, 0.01, 0.01), (0, 0)),
        ((0.99, 0.99, 1.0, 1.0), (7, 7)),
        ((0.51, 0.01, 0.52, 0.02), (0, 4)),
        ((0.3, 0.8, 0.31, 0.81), (6, 2)),
    ],
)
def test_a_box_smaller_than_a_place_holds_that_place(box: Box, place: tuple[int, int]) -> None:
    assert box_mask(box, (8, 8)).nonzero().tolist() == [list(place)]


SHARES = [i / 20 for i in range(21)]


@pytest.mark.parametrize("width", [3, 16])
def test_the_mirrored_box_has_the_mirrored_mask(width: int) -> None:
    """Where an edge runs through a place, left and right, top and bottom, must be treated alike."""
    wrong = []
    for left, right in ((a, b) for a in SHARES for b in SHARES if (b - a) * width > 1):
        mask = box_mask((left, left, right, right), (width, width))
        mirrored = box_mask((1 - right, 1 - right, 1 - left, 1 - left), (width, width))
        edges = {round(abs(edge * width % 1 - 0.5), 6) for edge in (left, right)}
        if 0 not in edges and not torch.equal(mirrored, mask.flip(0, 1)):
            wrong.append((left, right))
    assert wrong == []


# --- settings and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box",
    [
        (0.5, 0.0, 0.5, 1.0),
        (0.6, 0.0, 0.5, 1.0),
        (0.0, 0.7, 1.0, 0.7),
        (0.0, 0.8, 1.0, 0.7),
        (-0.1, 0.0, 1.0, 1.0),
        (0.0, 0.0, 1.1, 1.0),
        (0.0, 0.0, float("nan"), 1.0),
        (0.0, 0.0, 1.0),
        (0.0, 0.0, 1.0, 1.0, 1.0),
        (10, 20, 30, 40),
        "left",
        None,
    ],
    ids=str,
)
def test_bad_boxes_are_refused(box: Any) -> None:
    with pytest.raises(ValueError, match="box"):
        ObjectAdd(word="ball", box=box)


def test_a_box_upside_down_is_told_what_a_box_is() -> None:
    with pytest.raises(ValueError, match=r"\[left, top, right, bottom\], shares of width and height"):
        ObjectAdd("ball", (0.0, 0.8, 1.0, 0.7))


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": -1},
        {"strength": 101},
        {"strength": float("nan")},
        {"bias_stop": -1},
        {"mask_start": 1.5},
        {"mask_threshold": 2},
        {"unknown": 1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(settings))):
        ObjectAdd("ball", LEFT, **settings)


@pytest.mark.parametrize("words", [(), WORDS[:1]], ids=["none", "the source's alone"])
def test_without_the_targets_words_it_is_refused(words: Sequence[Words]) -> None:
    with pytest.raises(ControlError, match="object_add points at a word of the target prompt"):
        ObjectAdd("ball", LEFT).program(Run(STEPS, (16, 16), words=words))


def test_a_word_that_is_not_in_every_target_is_refused_with_those_that_are() -> None:
    ObjectAdd("ball", LEFT).program(Run(STEPS, (16, 16), words=WORDS[:2]))
    with pytest.raises(ControlError, match="'ball' is not in its prompt; its words are 'a', 'blue', 'cube'"):
        ObjectAdd("ball", LEFT).program(Run(STEPS, (16, 16), words=WORDS[:3]))
