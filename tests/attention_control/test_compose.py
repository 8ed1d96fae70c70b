"""Several controllers at once: each as if alone where only it acts, and together where they do not meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from attention_control import (
    Compose,
    ControlError,
    MasaCtrl,
    NoControl,
    PlugAndPlay,
    Portrait,
    PromptToPrompt,
    Streams,
    Structure,
    StyleAligned,
    controlled,
)
from tests.attention_control.explicit import CASES, CLEAR, EXACT, at, attention, evaluate_by, hooks, probabilities
from tests.attention_control.reference import (
    STEPS,
    WORDS,
    Outputs,
    Scene,
    distance,
    evaluate,
    evaluate_controlled,
    make_scene,
    official_rows,
    same_bits,
    split_heads,
    targets_of,
    unguided_rows,
)

MAPS = at(
    range(2, 13),
    lambda seen, row: (
        attention(seen.query[seen.mate(row)], seen.key[seen.mate(row)], seen.value[row])
        if row.half == "conditional"
        else seen.plain(row)
    ),
)
"""What `structure` does by its paper."""
VALUES = at(
    range(10, 16),
    lambda seen, row: attention(seen.query[row], seen.key[seen.mate(row)], seen.value[seen.mate(row)]),
)
"""What `masactrl` does by its paper."""
HALVES = Compose(controllers=({"name": "structure", "stop_step": 25}, {"name": "masactrl", "start_step": 25}))


# --- together -----------------------------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize("rows", [official_rows, unguided_rows], ids=["guided", "unguided"])
def test_in_windows_apart_each_acts_in_its_own(
    unet: UNet2DConditionModel, rows: Callable[[int], Streams], targets: int, size: tuple[int, int]
) -> None:
    scene, streams = make_scene(targets, size), rows(targets)
    structure, masactrl = (evaluate_by(unet, scene, streams, rule) for rule in (MAPS, VALUES))
    assert distance(targets_of(structure), masactrl) > CLEAR
    assert distance(evaluate_controlled(unet, HALVES, scene, streams, 24), structure) <= EXACT
    assert distance(evaluate_controlled(unet, HALVES, scene, streams, 25), masactrl) <= EXACT


@pytest.mark.parametrize("step", [0, 9, 10, 19, 20, 29, 30, STEPS - 1])
def test_every_step_equals_its_controller_alone(unet: UNet2DConditionModel, step: int) -> None:
    scene, streams = make_scene(), official_rows()
    parts: dict[range, Any] = {range(10): Structure(stop_step=10), range(20, 30): StyleAligned(start_step=20, stop_step=30)}
    out = evaluate_controlled(unet, Compose(controllers=tuple(parts.values())), scene, streams, step)
    alone = [evaluate_controlled(unet, part, scene, streams, step) for window, part in parts.items() if step in window]
    assert same_bits(out, alone[0] if alone else evaluate(unet, scene, streams))


def test_at_sites_apart_both_act_in_one_step(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(3, (16, 24)), official_rows(3)
    both = Compose(controllers=(Structure(sites="2-9"), MasaCtrl(sites="10-15")))
    expected = evaluate_by(unet, scene, streams, lambda seen, row: (MAPS if seen.site < 10 else VALUES)(seen, row))
    assert distance(evaluate_controlled(unet, both, scene, streams), expected) <= EXACT
    for rule in (MAPS, VALUES):
        assert distance(targets_of(expected), evaluate_by(unet, scene, streams, rule)) > CLEAR


def test_the_order_does_not_matter_where_nothing_meets(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    for step in (0, 25):
        turned = Compose(controllers=tuple(reversed(HALVES.controllers)))
        out = evaluate_controlled(unet, turned, scene, streams, step)
        assert same_bits(out, evaluate_controlled(unet, HALVES, scene, streams, step))


class RefinedMaps:
    """Cross-attention in which the words both prompts share have the source's maps: Prompt-to-Prompt's refinement of
    "a red cube" to "a red ball", conditional half only. Of WORDS: the new word is token 3, the end mark one earlier."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        maps = probabilities(attn, hidden_states, encoder_hidden_states).clone()
        places = {(row.role, row.half): i for i, row in enumerate(self.streams.rows)}
        source, target = maps[places["source", "conditional"]], maps[places["target", "conditional"]]
        for own, theirs in {0: 0, 1: 1, 2: 2, 4: 5, 5: 6, 6: 6}.items():
            target[..., own] = source[..., theirs]
        out = maps @ split_heads(attn.to_v(encoder_hidden_states), attn.heads)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("size", [(16, 16), (16, 24)], ids=["square", "oblong"])
@pytest.mark.parametrize("streams", [official_rows(), unguided_rows()], ids=["guided", "unguided"])
def test_routes_and_cross_attention_act_in_one_step(
    unet: UNet2DConditionModel, streams: Streams, size: tuple[int, int]
) -> None:
    scene = make_scene(1, size)
    words = PromptToPrompt(self_steps=0, cross_steps=40)

    def under(controller: Any, step: int) -> Outputs:
        with (
            controlled(unet, controller, num_steps=STEPS, latent_size=size, words=WORDS[:2]) as session,
            session.step(step, streams),
        ):
            return evaluate(unet, scene, streams)

    own = dict(unet.attn_processors)
    unet.set_attn_processor({n: RefinedMaps(streams) if ".attn2." in n else p for n, p in own.items()})
    only_words, expected = evaluate(unet, scene, streams), evaluate_by(unet, scene, streams, VALUES)
    unet.set_attn_processor(own)
    assert distance(targets_of(expected), only_words) > CLEAR
    assert distance(targets_of(expected), evaluate_by(unet, scene, streams, VALUES)) > CLEAR
    both = Compose(controllers=(words, MasaCtrl()))
    assert distance(under(both, 0), only_words) <= EXACT
    assert distance(under(both, 10), expected) <= EXACT
    assert distance(under(both, 40), evaluate_by(unet, scene, streams, VALUES)) <= EXACT


def test_features_are_copied_beside_routes(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    both = Compose(controllers=(PlugAndPlay(), MasaCtrl(start_step=25)))
    with controlled(unet, both, num_steps=STEPS, latent_size=scene.size):
        assert hooks(unet) == 1
    assert hooks(unet) == 0
    first, later = (evaluate_controlled(unet, both, scene, streams, step) for step in (24, 25))
    assert same_bits(first, evaluate_controlled(unet, PlugAndPlay(), scene, streams, 24))
    assert distance(targets_of(later), evaluate_by(unet, scene, streams, VALUES)) > CLEAR
    late = evaluate_controlled(unet, both, scene, streams, 40)
    assert distance(late, evaluate_by(unet, scene, streams, VALUES)) <= EXACT


def test_latents_are_blended_by_each(unet: UNet2DConditionModel) -> None:
    left, right = torch.zeros(16, 16), torch.zeros(16, 16)
    left[:, :8], right[:, 4:] = 1, 1
    parts = [
        MasaCtrl(sites=sites, source_mask=mask, target_mask=mask, keep_background=True)
        for sites, mask in (("10-12", left), ("13-15", right))
    ]
    z = torch.randn(3, 4, 16, 16)
    with controlled(unet, Compose(controllers=tuple(parts)), num_steps=STEPS, latent_size=(16, 16)) as session:
        out = session.after(0, z[:1], z[1:])
    assert torch.equal(out, torch.where(left * right > 0, z[1:], z[:1]))


def test_a_second_use_of_the_same_controller_equals_the_first(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(3, (16, 24)), official_rows(3)
    for step in (24, 25):
        first = evaluate_controlled(unet, HALVES, scene, streams, step)
        assert distance(targets_of(first), evaluate(unet, scene, streams)) > CLEAR
        assert same_bits(evaluate_controlled(unet, HALVES, scene, streams, step), first)


def test_the_source_is_read_wherever_one_reads_it(unet: UNet2DConditionModel) -> None:
    both = Compose(controllers=(Structure(stop_step=3), MasaCtrl(start_step=40, stop_step=45), NoControl()))
    with controlled(unet, both, num_steps=STEPS, latent_size=(16, 16)) as session:
        assert [step for step in range(STEPS) if session.reads_source(step)] == [0, 1, 2, 40, 41, 42, 43, 44]
        assert not session.reads_both_halves(0)
        assert session.reads_both_halves(40)


def test_the_neediest_says_how_many_sources(unet: UNet2DConditionModel) -> None:
    assert Compose(controllers=(MasaCtrl(),)).sources == 1
    assert Compose(controllers=(MasaCtrl(sites="0-9"), Portrait())).sources == 2
    assert Compose(controllers=("none", {"name": "compose", "controllers": ["portrait"]})).sources == 2


# --- overlaps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "site", "step"),
    [
        ((PlugAndPlay(), MasaCtrl()), "up_blocks.2.attentions.0", 4),
        ((Structure(stop_step=10), MasaCtrl(start_step=9, sites="12-15")), "up_blocks.2.attentions.2", 9),
        ((MasaCtrl(), MasaCtrl()), "up_blocks.2.attentions.0", 4),
        ((NoControl(), StyleAligned(start_step=0.5), Portrait(sites="6")), "mid_block.attentions.0", 25),
        ((MasaCtrl(stop_step=30), "structure"), "up_blocks.2.attentions.0", 4),
    ],
)
def test_two_that_meet_are_refused_with_site_and_step(
    unet: UNet2DConditionModel, parts: tuple[Any, ...], site: str, step: int
) -> None:
    before = dict(unet.attn_processors)
    where = f"{site.replace('.', '[.]')}[.].* at step {step};"
    with (
        pytest.raises(ControlError, match=f"two routes meet at {where}"),
        controlled(unet, Compose(controllers=parts), num_steps=STEPS, latent_size=(16, 16)),
    ):
        pytest.fail("attached all the same")
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    assert hooks(unet) == 0


def test_windows_that_touch_do_not_meet(unet: UNet2DConditionModel) -> None:
    scene: Scene = make_scene()
    for stop, start in ((25, 0.5), (0.5, 25), (0.49, 25)):
        both = Compose(controllers=(Structure(stop_step=stop), MasaCtrl(start_step=start)))
        out = evaluate_controlled(unet, both, scene, official_rows(), 24)
        assert distance(out, evaluate_by(unet, scene, official_rows(), MAPS)) <= EXACT


# --- building -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collect", [list, tuple])
def test_parts_are_names_mappings_or_controllers(collect: Callable[[Any], Any]) -> None:
    parts = ["structure", {"name": "masactrl", "start_step": 0.9, "sites": 15}, StyleAligned(sites="0")]
    made = Compose(controllers=collect(parts))
    assert made.controllers == (Structure(), MasaCtrl(start_step=0.9, sites="15"), StyleAligned(sites="0"))
    assert made == Compose(controllers=(Structure(), MasaCtrl(start_step=0.9, sites="15"), StyleAligned(sites="0")))


def test_one_may_stand_inside_another(unet: UNet2DConditionModel) -> None:
    inner = {"name": "compose", "controllers": [{"name": "structure", "stop_step": 25}, "none"]}
    nested = Compose(controllers=[inner, {"name": "masactrl", "start_step": 25}])  # type: ignore[arg-type]
    assert nested.controllers[0] == Compose(controllers=(Structure(stop_step=25), NoControl()))
    scene, streams = make_scene(), official_rows()
    for step in (24, 25):
        out = evaluate_controlled(unet, nested, scene, streams, step)
        assert same_bits(out, evaluate_controlled(unet, HALVES, scene, streams, step))


def test_one_part_alone_is_that_part(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    out = evaluate_controlled(unet, Compose(controllers=("masactrl",)), scene, streams)
    assert same_bits(out, evaluate_controlled(unet, MasaCtrl(), scene, streams))


@pytest.mark.parametrize("empty", [(), []])
def test_an_empty_list_is_refused(empty: Any) -> None:
    with pytest.raises(ValueError, match="at least one controller"):
        Compose(controllers=empty)
    with pytest.raises(ValueError, match="at least one controller"):
        Compose(controllers=("none", {"name": "compose", "controllers": empty}))


@pytest.mark.parametrize("part", ["masactl", {"name": "masactl"}, {"name": None}, {"strength": 0.5}, {"name": ["masactrl"]}])
def test_an_unknown_name_is_refused_with_those_there_are(part: str | Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"controller .* is unknown; choose none, masactrl, structure"):
        Compose(controllers=(part,))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "masactrl", "strength": 3}, r"strength[\s\S]*less than or equal to 1"),
        ({"name": "masactrl", "strenght": 0.5}, r"strenght[\s\S]*[Uu]nexpected"),
        ({"name": "structure", "halves": "left"}, r"halves[\s\S]*'conditional' or 'both'"),
        ({"name": "structure", "sites": "oops"}, r"cannot read 'oops'"),
        ({"name": "compose", "controllers": [{"name": "portrait", "switch_step": 1.5}]}, r"step 1\.5: write a whole number"),
        ({"name": "compose"}, r"controllers"),
        ({"name": "masactrl", "keep_background": True}, r"keep_background needs a mask"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_words(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Compose(controllers=("none", settings))


@pytest.mark.parametrize("part", [3, None, 0.5, object(), ["masactrl"]])
def test_what_is_no_controller_is_refused(part: Any) -> None:
    with pytest.raises(ValueError, match="should hold controllers"):
        Compose(controllers=(part,))


@pytest.mark.parametrize("controllers", ["masactrl", 3, None, {"name": "masactrl"}])
def test_what_is_no_list_is_refused(controllers: Any) -> None:
    with pytest.raises(ValueError, match="controllers"):
        Compose(controllers=controllers)
