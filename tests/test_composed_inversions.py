"""Methods that refine others, as a user meets them: in YAML, in warnings, on files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from easyinv_edit.errors import EasyInvWarning, RecipeError
from easyinv_edit.inversion import EasyInv, NullText, Proximal, sampler_of
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.recipe import parse
from easyinv_edit.running import invert_recipe
from easyinv_edit.trajectory import Trajectory
from tests.helpers import Command


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    return caught.value.problems


def test_a_base_is_written_as_a_nested_mapping_and_read_back() -> None:
    recipe = parse("inversion: {name: null_text, base: {name: easyinv, eta: 0.7}}")
    assert NullText(**{k: v for k, v in recipe.inversion.items() if k != "name"}).base == EasyInv(eta=0.7)
    assert parse(recipe.to_yaml()) == recipe


def test_problems_of_a_base_are_reported_at_their_own_place_with_all_others() -> None:
    text = "inversion:\n  name: null_text\n  iterations: 0\n  base:\n    name: easyinv\n    eta: 3\n    etta: 2\n"
    found = problems(text)
    assert [line.split(": ")[:2] for line in found] == [
        ["r.yaml:3:3", "inversion.iterations"],
        ["r.yaml:6:5", "inversion.base.eta"],
        ["r.yaml:7:5", "inversion.base.etta"],
    ]
    assert "did you mean 'eta'" in found[2]


@pytest.mark.parametrize(
    ("text", "start", "says"),
    [
        ("inversion: {name: null_text, base: {name: edict}}", "1:30: inversion.base", "edict has a sampler of its own"),
        ("inversion: {name: null_text, base: {name: easyinf}}", "1:37: inversion.base.name", "did you mean 'easyinv'"),
        ("inversion: {name: null_text, base: 3}", "1:30: inversion.base", "should be an inversion method"),
        ("inversion: {name: proximal, base: {name: proximal}}", "1:29: inversion.base", "cannot refine itself"),
        (
            "inversion: {name: negative_prompt, base: {name: null_text}}",
            "1:36: inversion.base",
            "null_text decides the guidance itself",
        ),
        ("inversion: {name: ddim, base: {name: easyinv}}", "1:25: inversion.base", "unknown setting of ddim"),
        ("inversion: {name: bdia, gamma: 0.5}", "1:25: inversion.gamma", "greater than or equal to 0.9"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(text: str, start: str, says: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"r.yaml:{start}: ")
    assert says in problem


def test_a_recipe_inverts_with_its_base_and_its_seed(untrained: EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "a.png")
    text = f"image: {tmp_path}/a.png\nnum_inference_steps: 2\nseed: 3\ninversion: {{name: proximal, base: edit_friendly}}"
    first, second = (invert_recipe(parse(text), untrained) for _ in range(2))
    other = invert_recipe(parse(text, overrides=["seed=4"]), untrained)
    assert torch.equal(first.latents, second.latents)
    assert not torch.equal(first.latents, other.latents)
    assert first.settings["base"]["name"] == "edit_friendly"


def test_a_composed_inversion_is_the_same_from_its_file(untrained: EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    method = Proximal(base={"name": "null_text", "iterations": 1, "guidance_scale": 3, "base": "easyinv"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EasyInvWarning)
        made = untrained.invert(picture, "a cube", method, num_inference_steps=2)
    made.save(tmp_path / "a.safetensors")
    again = Trajectory.load(tmp_path / "a.safetensors")
    assert json.dumps(again.settings) == json.dumps(made.settings)
    assert sampler_of(again).source_guidance == 3
    edits = [untrained.edit(t, "a ball", guidance_scale=3.0, output_type="latent").images for t in (made, again)]
    assert torch.equal(*edits)


def test_an_edit_at_another_guidance_than_was_fitted_is_warned_of(untrained: EditPipeline, picture: Image.Image) -> None:
    method = {"name": "null_text", "iterations": 1, "guidance_scale": 3}
    made = untrained.invert(picture, "a cube", method, num_inference_steps=2)
    with pytest.warns(EasyInvWarning, match="fitted for guidance 3, but this edit uses 5"):
        untrained.edit(made, "a ball", control="none", guidance_scale=5.0, output_type="latent")
    untrained.edit(made, "a ball", control="none", guidance_scale=3.0, output_type="latent")


def test_negative_prompt_inversion_without_a_source_prompt_is_warned_of(untrained: EditPipeline, picture: Image.Image) -> None:
    with pytest.warns(EasyInvWarning, match="so this is ddim alone; give a source prompt"):
        untrained.invert(picture, "", "negative_prompt", num_inference_steps=1)
    untrained.invert(picture, "a cube", "negative_prompt", num_inference_steps=1)


@pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")
def test_one_call_and_two_stages_draw_the_same_noise(untrained: EditPipeline, picture: Image.Image) -> None:
    options = {"control": "none", "guidance_scale": 3.0, "noise_mix": 0.5, "output_type": "latent"}
    made = untrained.invert(picture, "", "edit_friendly", num_inference_steps=2, generator=torch.Generator().manual_seed(5))
    two = untrained.edit(made, "a ball", generator=torch.Generator().manual_seed(5), **options)  # type: ignore[arg-type]
    seeded = torch.Generator().manual_seed(5)
    one = untrained(picture, "a ball", inversion="edit_friendly", num_inference_steps=2, generator=seeded, **options)
    assert torch.equal(one.images, two.images)


def test_a_file_with_settings_of_no_method_is_refused_in_words(
    command: Command, untrained: EditPipeline, untrained_folder: Path, picture: Image.Image, tmp_path: Path
) -> None:
    from dataclasses import replace

    made = untrained.invert(picture, "", "ddim", num_inference_steps=1)
    replace(made, method="bdia", settings={"gamma": 7}).save(tmp_path / "a.safetensors")
    code, _, err = command("edit", str(tmp_path / "a.safetensors"), "a ball", f"model={untrained_folder}")
    assert code == 2
    assert "inversion method bdia: gamma: should be less than or equal to 1 (got 7)" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "start", "says"),
    [
        ("control: portrait", "1:1: control", "portrait reads a second picture; give it as style"),
        ("control: masactrl\nstyle: a.png", "2:1: style", "masactrl reads no second picture; leave it out"),
        ("style: a.png", "1:1: style", "masactrl reads no second picture"),
        ("control: {name: compose, controllers: [portrait]}", "1:1: control", "compose reads a second picture"),
        (
            "control: {name: compose, controllers: [{name: structure, sites: x}]}",
            "1:58: control.controllers.0.sites",
            "cannot read",
        ),
        ("control: {name: compose, controllers: [{name: masactl}]}", "1:41: control.controllers.0.name", "did you mean"),
        ("control: {name: masactrl, keep_background: true}", "1:1: control", "keep_background needs a mask"),
        ("control: {name: object_add, word: ball}", "1:1: control.box", "is missing; object_add needs it"),
    ],
)
def test_controllers_that_lack_something_are_refused_at_their_place(text: str, start: str, says: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(f"r.yaml:{start}: ")
    assert says in problem
