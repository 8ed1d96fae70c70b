"""Words of the targets where no text stands in every prompt: one for each, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image

from attention_control import ControlError, MasaCtrl, PromptToPrompt, Run, Words, controlled
from attention_control.blends import LocalBlend
from attention_control.masks import WordMask
from easyinv_edit.choices import describe
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.recipe import parse
from easyinv_edit.trajectory import Trajectory
from tests.attention_control.explicit import CLEAR, EXACT
from tests.attention_control.reference import (
    STEPS,
    WORDS,
    Outputs,
    distance,
    evaluate,
    evaluate_controlled,
    make_scene,
    single_source_rows,
    targets_of,
)

BALL_AND_CUBE = (WORDS[0], WORDS[1], WORDS[2])
"""Of "a red cube", and of the targets "a red ball" and "a blue cube": no word but "a" stands in both."""
TEXTS = ("ball", "blue cube")
TOKENS = ((3,), (2, 3, 4))


def _run(words: Sequence[Words] = BALL_AND_CUBE, part: Sequence[int] | None = None) -> Run:
    return Run(STEPS, (16, 16), words=words, part=part)


def _mask(controller: MasaCtrl, run: Run) -> WordMask:
    mask = controller.program(run).routes[0].mask
    assert isinstance(mask, WordMask)
    return mask


@pytest.mark.parametrize("given", [TEXTS, list(TEXTS)], ids=["tuple", "list"])
def test_each_text_is_looked_for_in_its_own_prompt(given: Any) -> None:
    assert _mask(MasaCtrl(target_words=given), _run()) == WordMask((), TOKENS, 0.1)
    blends = PromptToPrompt(blend_target=given).program(_run()).blends
    assert blends == (LocalBlend((), TOKENS, 0.3, 10),)


def test_one_text_for_all_is_as_many_times_the_same() -> None:
    assert MasaCtrl(target_words="a").program(_run()) == MasaCtrl(target_words=["a", "a"]).program(_run())
    assert _mask(MasaCtrl(target_words=["ball", ""]), _run()).target_tokens == ((3,), ()), "an empty text has no mask"


@pytest.mark.parametrize(("part", "tokens"), [([1], TOKENS[1:]), ([0], TOKENS[:1]), ([1, 0], TOKENS[::-1]), (None, TOKENS)])
def test_a_batch_of_some_targets_takes_their_texts(part: Any, tokens: Any) -> None:
    assert _mask(MasaCtrl(target_words=TEXTS), _run(part=part)).target_tokens == tokens
    assert len(PromptToPrompt().program(_run(part=part)).cross[0].targets) == len(tokens)  # type: ignore[attr-defined]


def _outputs(unet: UNet2DConditionModel, controller: Any, scene: Any, targets: int, **options: Any) -> Outputs:
    """At the second of two steps, when there are maps."""
    streams = single_source_rows(targets)
    with controlled(unet, controller, num_steps=STEPS, latent_size=scene.size, **options) as session:
        for step in (10, 11):
            with session.step(step, streams):
                out = evaluate(unet, scene, streams)
    return out


def test_two_targets_under_a_list_are_each_alone_under_its_text(unet: UNet2DConditionModel) -> None:
    scene, settings = make_scene(targets=2), {"source_words": "red", "mask_threshold": 0.4}
    together = _outputs(unet, MasaCtrl(target_words=TEXTS, **settings), scene, 2, words=BALL_AND_CUBE)
    unmasked = targets_of(evaluate_controlled(unet, MasaCtrl(), scene, single_source_rows(2)))
    assert distance(unmasked, together) > CLEAR
    for index, text in enumerate(TEXTS):
        words = (WORDS[0], BALL_AND_CUBE[1 + index])
        alone = _outputs(unet, MasaCtrl(target_words=text, **settings), scene.only(index), 1, words=words)
        part = {"words": BALL_AND_CUBE, "part": [index]}
        split = _outputs(unet, MasaCtrl(target_words=TEXTS, **settings), scene.only(index), 1, **part)
        assert distance(alone, split) == 0
        here = {row: out for row, out in together.items() if row.role == "target" and row.index == index}
        theirs = {row: next(o for r, o in alone.items() if (r.role, r.half) == ("target", row.half)) for row in here}
        assert distance(here, theirs) <= EXACT


# --- through the pipeline, the recipe and its overrides -------------------------------------------------------------------

T = 4
CONTROLS = [
    {"name": "masactrl", "start_step": 1, "target_words": ["ball", "cone"], "mask_threshold": 0.5, "keep_background": True},
    {"name": "prompt_to_prompt", "blend_target": ["ball", "cone"], "blend_threshold": 0.9, "blend_start": 0},
]


@pytest.fixture
def made(untrained: EditPipeline, picture: Image.Image) -> Trajectory:
    return untrained.invert(picture, "a cube", "ddim", num_inference_steps=T)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control["name"])
def test_batches_do_not_change_whose_text_is_whose(untrained: EditPipeline, made: Trajectory, control: dict[str, Any]) -> None:
    prompts = ["a red ball", "a cone"]
    options: dict[str, Any] = {"guidance_scale": 3.0, "output_type": "latent"}
    together = untrained.edit(made, prompts, control=control, **options).images
    apart = untrained.edit(made, prompts, control=control, batch_size=1, **options).images
    assert (together - apart).abs().max() <= 1e-5 * together.abs().max()
    key = "target_words" if control["name"] == "masactrl" else "blend_target"
    swapped = untrained.edit(made, prompts[::-1], control={**control, key: control[key][::-1]}, **options).images
    assert (together - swapped.flip(0)).abs().max() <= 1e-5 * together.abs().max()
    with pytest.raises(ControlError, match="'cone' is not in its prompt; its words are 'a', 'red', 'ball'"):
        untrained.edit(made, prompts, control={**control, key: "cone"}, **options)


@pytest.mark.parametrize("batch_size", [None, 1])
def test_as_many_texts_as_prompts_whatever_the_batch(untrained: EditPipeline, made: Trajectory, batch_size: int | None) -> None:
    for control, key in zip(CONTROLS, ("target_words", "blend_target"), strict=True):
        with pytest.raises(ControlError, match=f"{key} holds 2 texts, but there are 3 target prompts; write one for each"):
            untrained.edit(made, ["a ball", "a cone", "a cube"], control=control, batch_size=batch_size)


def test_a_recipe_and_an_override_may_hold_a_list(tmp_path: Path) -> None:
    text = "prompts: [a ball, a cone]\ncontrol: {name: masactrl, target_words: [ball, cone]}"
    assert parse(text).control["target_words"] == ["ball", "cone"]
    overridden = parse(text, "r.yaml", ["control.target_words=[red ball,cone]"])
    assert overridden.control["target_words"] == ["red ball", "cone"]
    controller = MasaCtrl(**{key: value for key, value in overridden.control.items() if key != "name"})
    assert controller.target_words == ("red ball", "cone")
    assert MasaCtrl(**{k: v for k, v in describe(controller).items() if k != "name"}) == controller, "a recipe written and read"


@pytest.mark.parametrize("given", [7, True, None, {"a": 1}, [], ["", ""], ["ball", 3], [["ball"]]], ids=str)
def test_anything_but_texts_is_refused(given: Any) -> None:
    for controller, key in ((MasaCtrl, "target_words"), (PromptToPrompt, "blend_target")):
        with pytest.raises(ValueError, match="one text that stands in every target prompt, or a list with one text for each"):
            controller(**{key: given})
