"""Prompt-to-Prompt against the paper's equations, written out here and in `cross_reference.py`, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from attention_control import ControlError, PromptToPrompt, Run, StreamRow, Streams, Words, controlled
from attention_control.blends import LocalBlend
from attention_control.prompt_to_prompt import token_map
from attention_control.streams import layout
from tests.attention_control.cross_reference import (
    CLEAR,
    EXACT,
    SOURCE,
    Edit,
    Maps,
    evaluate_with_words,
    evaluate_written,
)
from tests.attention_control.reference import (
    STEPS,
    WORDS,
    Outputs,
    Scene,
    distance,
    evaluate,
    make_scene,
    official_rows,
    same_bits,
    single_source_rows,
    sources_of,
    targets_of,
    unguided_rows,
)

MODES: tuple[Literal["replace", "refine"], ...] = ("replace", "refine")
SIZES = [(16, 16), (16, 24)]
LAYOUTS = pytest.mark.parametrize("rows", [official_rows, single_source_rows, unguided_rows])
NOTHING = Words((), (), 7)
TARGET = StreamRow("target", 0, "conditional")

Table = Sequence[Mapping[int, float] | None]
"""Per target token: the source tokens whose maps it gets with their weights, or None where it keeps its own."""

IDENTITY: Table = [{j: 1} for j in range(7)]
TWO_TO_ONE: Table = [{0: 1}, {1: 1}, {2: 1}, {3: 1, 4: 1}, {5: 1}, {6: 1}, {6: 1}]
"""a red cu-be END PAD -> a red ball END PAD PAD; there is no third pad in the source: the last one stands in."""
ONE_TO_TWO: Table = [{0: 1}, {1: 1}, {2: 1}, {3: 0.5}, {3: 0.5}, {4: 1}, {5: 1}]
"""a red ball END PAD PAD -> a red cu-be END PAD"""
NEW_NOUN: Table = [{0: 1}, {1: 1}, {2: 1}, None, {5: 1}, {6: 1}, {6: 1}]
NEW_COLOUR: Table = [{0: 1}, {1: 1}, None, {3: 1}, {4: 1}, {5: 1}, {6: 1}]

TABLES: dict[str, list[Table]] = {
    "replace": [TWO_TO_ONE, IDENTITY, TWO_TO_ONE],
    "refine": [NEW_NOUN, NEW_COLOUR, NEW_NOUN],
}
"""From the first of `WORDS` to the three others, by hand."""


def by_the_paper(
    tables: Sequence[Table],
    step: int = 0,
    cross_steps: int = 40,
    word_steps: Mapping[int, int] | None = None,
    factors: Mapping[int, float] | None = None,
) -> Edit:
    """Section 3.2 of the paper token by token: while a token follows, its column is the source's, times its factor."""
    word_steps, factors = word_steps or {}, factors or {}

    def edit(row: StreamRow, maps: Maps) -> Tensor:
        source, own = maps[SOURCE], maps[row]
        columns = []
        for token, taken in enumerate(tables[row.index]):
            column = own[:, :, token]
            if step < word_steps.get(token, cross_steps):
                if taken is not None:
                    column = sum((w * source[:, :, i] for i, w in taken.items()), start=torch.zeros_like(column))
                column = column * factors.get(token, 1)
            columns.append(column)
        return torch.stack(columns, -1)

    return edit


# --- whose map a token gets ---------------------------------------------------------------------------------------------


def _matrix(table: Table) -> Tensor:
    matrix = torch.zeros(7, 7)
    for target, taken in enumerate(table):
        for source, weight in (taken or {}).items():
            matrix[source, target] = weight
    return matrix


EVERY_WORD = [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("source", "target", "pairs", "table"),
    [
        (WORDS[0], WORDS[0], EVERY_WORD, IDENTITY),
        (WORDS[0], WORDS[1], EVERY_WORD, TWO_TO_ONE),
        (WORDS[1], WORDS[0], EVERY_WORD, ONE_TO_TWO),
        (WORDS[0], WORDS[1], [(0, 0), (1, 1)], NEW_NOUN),
        (WORDS[0], WORDS[2], [(0, 0), (2, 2)], NEW_COLOUR),
        (WORDS[0], NOTHING, [], [{0: 1}, {5: 1}, {6: 1}, {6: 1}, {6: 1}, {6: 1}, {6: 1}]),
        (NOTHING, WORDS[0], [], [{0: 1}, None, None, None, None, {1: 1}, {2: 1}]),
    ],
    ids=["same", "two to one", "one to two", "new noun", "new colour", "to nothing", "from nothing"],
)
def test_tokens_get_the_maps_of_their_partners(source: Words, target: Words, pairs: Any, table: Table) -> None:
    matrix, follows = token_map(source, target, pairs)
    assert torch.equal(matrix, _matrix(table))
    assert follows.tolist() == [taken is not None for taken in table]


def test_a_word_of_two_tokens_gives_each_of_three_a_third_of_both() -> None:
    three = Words(("cylinders",), ((1, 2, 3),), 6)
    matrix, follows = token_map(Words(("cones",), ((1, 2),), 6), three, [(0, 0)])
    assert torch.allclose(matrix[1:3, 1:4], torch.full((2, 3), 1 / 3, dtype=torch.float64))
    assert matrix.sum().item() == pytest.approx(1 + 2 + 2), "the start mark, both tokens, the end mark and one pad"
    assert follows.all()


def test_words_cut_off_at_the_encoders_limit_are_nobodys_partners() -> None:
    short = Words(("a", "ball"), ((1,), ()), 3)
    long = Words(("a", "cube"), ((1,), ()), 3)
    matrix, follows = token_map(short, long, [(0, 0), (1, 1)])
    assert torch.equal(matrix, torch.eye(3))
    assert follows.all()
    matrix, follows = token_map(short, Words(("a", "cube"), ((1,), (2,)), 4), [(0, 0), (1, 1)])
    assert follows.tolist() == [True, True, False, True]
    assert matrix[2, 3] == 1


def _followed(source: Words, target: Words, mode: Literal["replace", "refine"]) -> dict[int, list[int]]:
    """Target token -> the source tokens it follows, by the program of a run."""
    run = Run(STEPS, (16, 16), words=(source, target))
    (edit,) = PromptToPrompt(mode=mode).program(run).cross
    matrix: Tensor = edit.targets[0].matrix  # type: ignore[attr-defined]
    return {j: matrix[:, j].nonzero().flatten().tolist() for j in range(target.length) if matrix[:, j].any()}


def _prompt(text: str, length: int = 12) -> Words:
    """One token a word."""
    words = tuple(text.split())
    return Words(words, tuple((1 + i,) for i in range(len(words))), length)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("a red cube", "a red cube", {1: [1], 2: [2], 3: [3]}),
        ("a cube", "a large red cube", {1: [1], 4: [2]}),
        ("a large red cube", "a cube", {1: [1], 2: [4]}),
        ("a Cube, red", "A cube red", {1: [1], 2: [2], 3: [3]}),
        ("a cube and a ball", "a cube and a red ball", {1: [1], 2: [2], 3: [3], 4: [4], 6: [5]}),
        ("a b c d", "x a y c z d", {2: [1], 4: [3], 6: [4]}),
        ("one two", "three four", {}),
    ],
)
def test_refine_keeps_the_longest_common_run_of_words(source: str, target: str, expected: dict[int, list[int]]) -> None:
    found = _followed(_prompt(source), _prompt(target), "refine")
    words = len(target.split())
    assert {j: tokens for j, tokens in found.items() if 0 < j <= words} == expected
    assert found[0] == [0]
    assert found[words + 1] == [len(source.split()) + 1], "the end mark follows the end mark"


@pytest.mark.parametrize("target", ["a red ball", "one two three"])
def test_replace_pairs_every_word_with_its_predecessor(target: str) -> None:
    found = _followed(_prompt("a red cube"), _prompt(target), "replace")
    assert found == {j: [j] for j in range(12)}


def test_a_full_stop_at_the_end_does_not_matter_to_replace() -> None:
    plain = Words(("a", "cube"), ((1,), (2,)), 7)
    stopped = Words(("a", "ball", "."), ((1,), (2,), (3,)), 7)
    found = _followed(plain, stopped, "replace")
    assert (found[1], found[2]) == ([1], [2])


# --- equal to the reference ---------------------------------------------------------------------------------------------


def test_the_reference_without_changes_is_plain_attention(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    assert distance(evaluate_written(unet, scene, streams).outputs, evaluate(unet, scene, streams)) <= EXACT


@LAYOUTS
@pytest.mark.parametrize(("size", "targets"), [((16, 16), 1), ((16, 24), 3), ((24, 16), 1), ((16, 16), 3)])
def test_equals_the_paper(unet: UNet2DConditionModel, size: tuple[int, int], targets: int, rows: Any) -> None:
    scene, streams = make_scene(targets, size), rows(targets)
    plain = evaluate(unet, scene, streams)
    for mode in MODES:
        expected = evaluate_written(unet, scene, streams, edit=by_the_paper(TABLES[mode]), follow=256).outputs
        out = evaluate_with_words(unet, PromptToPrompt(mode=mode), scene, streams)
        assert distance(out, expected) <= EXACT
        changed = [StreamRow("target", i, "conditional") for i in range(targets)]
        assert min(distance({row: out[row]}, plain) for row in changed) > CLEAR


@pytest.mark.parametrize("size", SIZES)
def test_cross_attention_alone_equals_the_paper(unet: UNet2DConditionModel, size: tuple[int, int]) -> None:
    scene, streams = make_scene(3, size), official_rows(3)
    for mode in MODES:
        expected = evaluate_written(unet, scene, streams, edit=by_the_paper(TABLES[mode])).outputs
        out = evaluate_with_words(unet, PromptToPrompt(mode=mode, self_steps=0), scene, streams)
        assert distance(out, expected) <= EXACT


@pytest.mark.parametrize(("sites", "follow"), [("tokens<=256", 256), ("tokens<=96", 96), ("0-", 10**6)])
@pytest.mark.parametrize("size", SIZES)
def test_self_attention_alone_is_the_sources_map_on_the_targets_values(
    unet: UNet2DConditionModel, size: tuple[int, int], sites: str, follow: int
) -> None:
    scene, streams = make_scene(1, size), official_rows()
    expected = evaluate_written(unet, scene, streams, follow=follow).outputs
    out = evaluate_with_words(unet, PromptToPrompt(cross_steps=0, sites=sites), scene, streams)
    assert distance(out, expected) <= EXACT
    assert distance(out, evaluate(unet, scene, streams)) > CLEAR


def test_one_token_spread_over_two_equals_the_paper(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    expected = evaluate_written(unet, scene, streams, edit=by_the_paper([ONE_TO_TWO]), follow=256).outputs
    out = evaluate_with_words(unet, PromptToPrompt(mode="replace"), scene, streams, words=(WORDS[1], WORDS[0]))
    assert distance(out, expected) <= EXACT


SHUFFLED = layout(
    [
        ("target", 0, "conditional"),
        ("source", 0, "unconditional"),
        ("target", 0, "unconditional"),
        ("source", 0, "conditional"),
    ]
)


def test_the_order_of_rows_does_not_matter(unet: UNet2DConditionModel) -> None:
    scene, controller = make_scene(), PromptToPrompt(mode="replace", reweight={"ball": 2})
    ordered = evaluate_with_words(unet, controller, scene, official_rows())
    assert distance(evaluate_with_words(unet, controller, scene, SHUFFLED), ordered) <= EXACT


# --- when -----------------------------------------------------------------------------------------------------------------

STAGED = PromptToPrompt(mode="replace", cross_steps=10, word_steps={"red": 4, "ball": 20}, self_steps=7)


@pytest.mark.parametrize("step", [0, 3, 4, 6, 7, 9, 10, 19])
def test_words_and_self_attention_each_follow_until_their_own_step(unet: UNet2DConditionModel, step: int) -> None:
    scene, streams = make_scene(), official_rows()
    edit = by_the_paper([TWO_TO_ONE], step, cross_steps=10, word_steps={2: 4, 3: 20})
    expected = evaluate_written(unet, scene, streams, edit=edit, follow=256 if step < 7 else 0).outputs
    out = evaluate_with_words(unet, STAGED, scene, streams, step)
    assert distance(out, expected) <= EXACT
    assert distance(targets_of(out), evaluate(unet, scene, streams)) > CLEAR


@pytest.mark.parametrize("step", [20, 49])
def test_after_the_last_word_the_unet_is_bitwise_plain(unet: UNet2DConditionModel, step: int) -> None:
    scene, streams = make_scene(), official_rows()
    assert same_bits(evaluate_with_words(unet, STAGED, scene, streams, step), evaluate(unet, scene, streams))


@pytest.mark.parametrize(
    ("settings", "cross", "own"),
    [
        ({}, 40, 20),
        ({"cross_steps": 0.25, "self_steps": 0.5}, 13, 25),
        ({"cross_steps": 3, "self_steps": 1}, 3, 1),
        ({"cross_steps": 1.0, "self_steps": 0}, 50, 0),
        ({"cross_steps": 0, "self_steps": 5}, 0, 5),
        ({"cross_steps": 0, "self_steps": 0}, 0, 0),
        ({"cross_steps": 5, "self_steps": 2, "word_steps": {"ball": 9}}, 9, 2),
    ],
    ids=str,
)
def test_the_windows_are_those_of_the_settings(
    unet: UNet2DConditionModel, settings: dict[str, Any], cross: int, own: int
) -> None:
    made = PromptToPrompt(**settings)
    program = made.program(Run(STEPS, (16, 16), words=WORDS[:2]))
    assert [s for s in range(STEPS) if any(e.active(s) for e in program.cross)] == list(range(cross))
    assert [s for s in range(STEPS) if any(r.active(s, STEPS) for r in program.routes)] == list(range(own))
    with controlled(unet, made, num_steps=STEPS, latent_size=(16, 16), words=WORDS[:2]) as session:
        assert [s for s in range(STEPS) if session.reads_source(s)] == list(range(max(cross, own)))
        assert not any(session.reads_both_halves(s) for s in range(STEPS))


# --- reweight -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [2.0, 0.5, 0.0, -1.0])
def test_reweight_equals_the_paper(unet: UNet2DConditionModel, mode: Literal["replace", "refine"], factor: float) -> None:
    scene, streams = make_scene(), official_rows()
    edit = by_the_paper(TABLES[mode][:1], factors={3: factor})
    expected = evaluate_written(unet, scene, streams, edit=edit, follow=256).outputs
    out = evaluate_with_words(unet, PromptToPrompt(mode=mode, reweight={"ball": factor}), scene, streams)
    assert distance(out, expected) <= EXACT
    assert distance(out, evaluate_with_words(unet, PromptToPrompt(mode=mode), scene, streams)) > CLEAR


def test_reweight_holds_for_every_target_and_ends_with_its_word(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(3, (16, 24)), single_source_rows(3)
    controller = PromptToPrompt(reweight={"a": 4.0}, word_steps={"a": 5}, self_steps=0)
    for step in (4, 5):
        edit = by_the_paper(TABLES["refine"], step, word_steps={1: 5}, factors={1: 4.0})
        expected = evaluate_written(unet, scene, streams, edit=edit).outputs
        assert distance(evaluate_with_words(unet, controller, scene, streams, step), expected) <= EXACT


@pytest.mark.parametrize("mode", MODES)
def test_factor_one_is_bitwise_no_reweighting(unet: UNet2DConditionModel, mode: Literal["replace", "refine"]) -> None:
    scene, streams = make_scene(), official_rows()
    without = evaluate_with_words(unet, PromptToPrompt(mode=mode), scene, streams)
    assert same_bits(evaluate_with_words(unet, PromptToPrompt(mode=mode, reweight={"ball": 1}), scene, streams), without)


@pytest.mark.parametrize(("factor", "heard"), [(0, False), (1, True)])
def test_factor_zero_removes_the_word(unet: UNet2DConditionModel, factor: float, heard: bool) -> None:
    """In replace mode every column is the source's, so that only values say what the target's word is."""
    scene, streams = make_scene(), unguided_rows()
    other = Scene(scene.latents, scene.text.clone(), scene.empty)
    other.text[1, 3] += 1
    controller = PromptToPrompt(mode="replace", cross_steps=1.0, reweight={"ball": factor})
    one, two = (evaluate_with_words(unet, controller, s, streams) for s in (scene, other))
    assert same_bits(one, two) is not heard


# --- what must hold of any word control ---------------------------------------------------------------------------------

EVERY_MODE = pytest.mark.parametrize(
    "settings", [{"mode": "replace"}, {"mode": "refine"}, {"mode": "refine", "reweight": {"red": 3}}], ids=str
)


def _others(outputs: Outputs) -> Outputs:
    """All rows but the conditional targets."""
    return {row: out for row, out in outputs.items() if row.role == "source" or row.half == "unconditional"}


@LAYOUTS
@EVERY_MODE
def test_all_but_conditional_targets_are_left_alone_bitwise_where_self_attention_is(
    unet: UNet2DConditionModel, settings: dict[str, Any], rows: Any
) -> None:
    scene, streams = make_scene(), rows()
    plain = evaluate(unet, scene, streams)
    out = evaluate_with_words(unet, PromptToPrompt(**settings, self_steps=10), scene, streams, step=10)
    assert same_bits(_others(out), _others(plain))
    assert distance({TARGET: out[TARGET]}, plain) > CLEAR
    routed = evaluate_with_words(unet, PromptToPrompt(**settings, self_steps=10), scene, streams, step=9)
    assert distance(_others(routed), plain) <= 1e-12


@LAYOUTS
@pytest.mark.parametrize("mode", MODES)
def test_a_target_that_starts_as_its_source_with_its_prompt_stays_its_source(
    unet: UNet2DConditionModel, mode: Literal["replace", "refine"], rows: Any
) -> None:
    scene = make_scene()
    twin = Scene(scene.latents[[0, 0]], scene.text[[0, 0]], scene.empty)
    out = evaluate_with_words(unet, PromptToPrompt(mode=mode), twin, rows(), words=(WORDS[0], WORDS[0]))
    source = {row.half: o for row, o in sources_of(out).items()}
    compared = [(o - source[row.half]).abs().max() for row, o in targets_of(out).items() if row.half in source]
    assert compared
    assert max(compared) <= 1e-12


def test_targets_of_one_batch_do_not_see_each_other(unet: UNet2DConditionModel) -> None:
    scene, controller = make_scene(targets=3), PromptToPrompt(reweight={"a": 2})
    together = evaluate_with_words(unet, controller, scene, official_rows(3))
    for target in range(3):
        words = (WORDS[0], WORDS[1 + target])
        alone = evaluate_with_words(unet, controller, scene.only(target), official_rows(), words=words)
        row = StreamRow("target", target, "conditional")
        assert (together[row] - alone[TARGET]).abs().max() <= EXACT


ALONE = layout([("target", 0, "conditional")])


@pytest.mark.parametrize("step", [0, 30], ids=["with self-attention", "cross-attention alone"])
def test_a_batch_without_its_source_is_refused(unet: UNet2DConditionModel, step: int) -> None:
    with pytest.raises(ControlError, match="no source row"):
        evaluate_with_words(unet, PromptToPrompt(), make_scene(), ALONE, step)


def test_no_source_is_needed_where_nothing_follows(unet: UNet2DConditionModel) -> None:
    scene = make_scene()
    assert same_bits(evaluate_with_words(unet, PromptToPrompt(), scene, ALONE, 40), evaluate(unet, scene, ALONE))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_is_finite_and_near_double(unet: UNet2DConditionModel, dtype: torch.dtype, near: float) -> None:
    scene, streams, controller = make_scene(), official_rows(), PromptToPrompt(mode="replace", reweight={"ball": 2})
    exact = evaluate_with_words(unet, controller, scene, streams)
    out = evaluate_with_words(unet.to(dtype), controller, scene.to(dtype), streams)
    assert all(output.dtype == dtype and output.isfinite().all() for output in out.values())
    assert distance(out, exact) < near


# --- settings and errors ------------------------------------------------------------------------------------------------


def _program(words: Sequence[Words], **settings: Any) -> Any:
    return PromptToPrompt(**settings).program(Run(STEPS, (16, 16), words=words))


@pytest.mark.parametrize("words", [(), (NOTHING, WORDS[1])], ids=["no words", "empty prompt"])
def test_no_source_prompt_is_refused(words: Sequence[Words]) -> None:
    with pytest.raises(ControlError, match=r"prompt_to_prompt needs a source prompt.*invert the image with one"):
        _program(words)


def test_replace_refuses_prompts_of_different_length_and_says_how_long_they_are() -> None:
    longer = Words(("a", "red", "shiny", "ball"), ((1,), (2,), (3,), (4,)), 7)
    with pytest.raises(ControlError, match=r"source prompt has 3 and the target 4: 'a red shiny ball'.*refine"):
        _program((WORDS[0], longer), mode="replace")
    _program((WORDS[0], longer), mode="refine")


@pytest.mark.parametrize(
    "settings",
    [{"reweight": {"cat": 2}}, {"word_steps": {"cat": 0.5}}, {"blend_target": "cat"}, {"blend_source": "cat"}],
    ids=str,
)
def test_a_word_that_is_not_in_its_prompt_is_refused_with_those_that_are(settings: dict[str, Any]) -> None:
    expected = "'a', 'red', 'cube'" if "blend_source" in settings else "'a', 'red', 'ball'"
    with pytest.raises(ControlError, match=rf"'cat' is not in its prompt; its words are {expected}"):
        _program(WORDS[:2], **settings)


def test_a_word_must_be_in_every_target() -> None:
    _program((WORDS[0], WORDS[1], WORDS[3]), reweight={"red": 2})
    with pytest.raises(ControlError, match="'red' is not in its prompt; its words are 'a', 'blue', 'cube'"):
        _program(WORDS[:3], reweight={"red": 2})


@pytest.mark.parametrize(
    ("settings", "blend"),
    [
        ({"blend_source": "cube"}, LocalBlend((3, 4), ((), ()), 0.3, 10)),
        ({"blend_target": "Red"}, LocalBlend((), ((2,), (2,)), 0.3, 10)),
        (
            {"blend_source": "red cube", "blend_target": "red", "blend_threshold": 0.6, "blend_start": 3},
            LocalBlend((2, 3, 4), ((2,), (2,)), 0.6, 3),
        ),
    ],
    ids=str,
)
def test_blend_words_become_a_local_blend(settings: dict[str, Any], blend: LocalBlend) -> None:
    program = _program((WORDS[0], WORDS[1], WORDS[3]), **settings)
    assert program.blends == (blend,)
    assert program.wants_maps


def test_without_blend_words_nothing_is_blended() -> None:
    program = _program(WORDS[:2])
    assert program.blends == ()
    assert not program.wants_maps


def test_with_blend_words_the_source_is_read_at_every_step(unet: UNet2DConditionModel) -> None:
    made = PromptToPrompt(blend_source="cube", cross_steps=1, self_steps=0)
    with controlled(unet, made, num_steps=STEPS, latent_size=(16, 16), words=WORDS[:2]) as session:
        assert all(session.reads_source(step) for step in range(STEPS))


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "swap"},
        {"cross_steps": -1},
        {"cross_steps": 1.5},
        {"word_steps": {"ball": -0.1}},
        {"reweight": {"ball": 101}},
        {"reweight": {"ball": float("nan")}},
        {"self_steps": "4"},
        {"sites": "everywhere"},
        {"blend_threshold": 1.1},
        {"blend_start": float("nan")},
        {"unknown": 1},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(settings))):
        PromptToPrompt(**settings)


@pytest.mark.parametrize("streams", [official_rows(), unguided_rows()], ids=["guided", "unguided"])
def test_a_second_run_of_the_same_controller_equals_the_first_bitwise(unet: UNet2DConditionModel, streams: Streams) -> None:
    scene, controller = make_scene(), PromptToPrompt(blend_source="cube")
    first = evaluate_with_words(unet, controller, scene, streams)
    assert same_bits(evaluate_with_words(unet, controller, scene, streams), first)
