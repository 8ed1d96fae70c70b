"""How kept source features are stored: their room is known before the source is evaluated, and a result tells of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from attention_control import ReferenceCache
from easyinv_edit.errors import InputError, RecipeError
from easyinv_edit.feature_storage import Auto, Exact, Room, chosen_features, recorded
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.recipe import EditRecipe, parse
from easyinv_edit.trajectory import Trajectory
from tests.helpers import Command, relative_error

T = 4
PROMPTS = ["a ball", "a cone"]
MASA = {"name": "masactrl", "start_step": 1}
COMPOSED = {"name": "compose", "controllers": [{"name": "structure", "stop_step": 2}, {**MASA, "start_step": 3}]}


@pytest.fixture
def made(untrained: EditPipeline, picture: Image.Image) -> Trajectory:
    return untrained.invert(picture, "a red ball", "ddim", num_inference_steps=T)


def edited(pipe: EditPipeline, made: Trajectory, features: Any, **options: Any) -> Any:
    settings = {"control": MASA, "guidance_scale": 3.0, "output_type": "latent", "batch_size": 1, **options}
    return pipe.edit(made, PROMPTS, source_features=features, **settings)


# --- how much ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", [MASA, "structure", "style_aligned", COMPOSED])
@pytest.mark.parametrize(("prompt", "size", "dtype"), [("", (32, 64), None), ("a red ball", 64, torch.bfloat16)])
def test_the_budget_is_the_very_number_of_bytes_that_are_kept(
    untrained: EditPipeline, picture: Image.Image, control: Any, prompt: str, size: Any, dtype: torch.dtype | None
) -> None:
    """One half of the source or two, oblong and square, whichever sites and steps are read."""
    made = untrained.invert(picture, prompt, "ddim", num_inference_steps=T, size=size)
    cache = ReferenceCache(dtype=dtype)
    edited(untrained, made, cache, control=control)
    edited(untrained, made, ReferenceCache(dtype=dtype, max_bytes=cache.bytes), control=control)
    with pytest.raises(InputError, match=f"take {cache.bytes:,} bytes in .* than the {cache.bytes - 1:,} bytes allowed"):
        edited(untrained, made, ReferenceCache(dtype=dtype, max_bytes=cache.bytes - 1), control=control)


def test_too_much_is_refused_before_anything_is_evaluated(
    untrained: EditPipeline, made: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(*_arguments: Any) -> None:
        raise AssertionError("the network was evaluated for features that cannot be kept")

    monkeypatch.setattr(untrained.backbone, "predict", evaluated)
    for given in (ReferenceCache(max_bytes=1000), {"name": "exact", "max_bytes": 1000}):
        with pytest.raises(InputError, match="more than the 1,000 bytes allowed"):
            edited(untrained, made, given)


@pytest.mark.parametrize(
    ("dtype", "budget", "says"),
    [
        (torch.float32, 2000, "4,000 bytes in float32, more than the 2,000 bytes allowed; 2,000 in float16 fit; or use"),
        (torch.float32, 1999, "2,000 in float16 are too many as well, 9 of the 10 controlled steps fit; allow more"),
        (torch.float16, 1999, "2,000 bytes in float16, more than the 1,999 bytes allowed; 9 of the 10 controlled steps fit;"),
        (torch.float32, 1, "0 of the 10 controlled steps fit; allow more, control fewer steps or sites"),
    ],
)
def test_a_refusal_says_what_would_fit(dtype: torch.dtype, budget: int, says: str) -> None:
    refusal = Room(values=100, steps=10, dtype=dtype).refusal(budget)
    assert refusal is not None
    assert says in refusal
    assert refusal.endswith("source_features 'live', which keeps none" if budget == 2000 else "source_features 'live'")


@pytest.mark.parametrize("budget", [None, 4000, 4001])
def test_what_fits_is_not_refused(budget: int | None) -> None:
    assert Room(values=100, steps=10, dtype=torch.float32).refusal(budget) is None


def test_auto_keeps_what_fits_and_does_without_the_rest(untrained: EditPipeline, made: Trajectory) -> None:
    live = edited(untrained, made, "live")
    small, large = (edited(untrained, made, {"name": "auto", "max_bytes": most}) for most in (1000, 10_000_000))
    assert torch.equal(small.images, live.images)
    assert small.cost["edit"].evaluations == live.cost["edit"].evaluations > large.cost["edit"].evaluations
    assert small.features is None
    assert 1000 < large.features["bytes"] <= 10_000_000


# --- what a result tells -----------------------------------------------------------------------------------------------


def test_a_result_tells_what_was_kept(untrained: EditPipeline, made: Trajectory) -> None:
    facts = {
        name: edited(untrained, made, given).summary()
        for name, given in {
            "live": "live",
            "exact": "exact",
            "half": {"name": "exact", "dtype": "float16", "device": "cpu", "max_bytes": 10_000_000},
            "cache": ReferenceCache(dtype=torch.float16, max_bytes=20_000_000),
        }.items()
    }
    kept = {name: fact["source_features"] for name, fact in facts.items()}
    size = kept["exact"]["bytes"]
    assert kept["live"] is None
    assert kept["exact"] == {"bytes": size, "dtype": "float32", "device": "cpu", "max_bytes": None}
    assert kept["half"] == {"bytes": size // 2, "dtype": "float16", "device": "cpu", "max_bytes": 10_000_000}
    assert kept["cache"] == {"bytes": size // 2, "dtype": "float16", "device": "cpu", "max_bytes": 20_000_000}
    told = {name: fact["recipe"]["source_features"] for name, fact in facts.items()}
    assert (told["live"], told["exact"]) == ("live", "exact")
    assert told["half"] == {"name": "exact", "dtype": "float16", "device": "cpu", "max_bytes": 10_000_000}
    assert told["cache"] == {"name": "exact", "dtype": "float16", "max_bytes": 20_000_000}, "not plain exact"
    assert json.loads(json.dumps(facts)) == facts


def test_features_of_the_inversion_are_told_too(untrained: EditPipeline, picture: Image.Image) -> None:
    made = untrained.invert(picture, "", "ddim", num_inference_steps=T, keep_features=MASA)
    result = edited(untrained, made, "inversion")
    assert made.features is not None
    assert result.summary()["source_features"]["bytes"] == made.features.bytes > 0


def test_half_precision_makes_nearly_the_same_edit(untrained: EditPipeline, made: Trajectory) -> None:
    exact, half = (edited(untrained, made, given).images for given in ("exact", Exact(dtype="float16")))
    assert 0 < relative_error(half, exact) < 1e-2


# --- what may be asked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "source_features is of type NoneType; choose auto, live, exact, inversion, or give a ReferenceCache"),
        ({"name": "live", "dtype": "float16"}, "dtype: unknown setting of live; allowed: none"),
        ({"name": "inversion", "max_bytes": 5}, "max_bytes: unknown setting of inversion; allowed: none"),
        ({"name": "exact", "dtype": "int8"}, "dtype: should be 'float32', 'float16' or 'bfloat16' (got 'int8')"),
        ({"name": "exact", "max_bytes": 0}, "max_bytes: should be greater than or equal to 1 (got 0)"),
        ({"name": "exact", "max_bytes": True}, "max_bytes: should be a valid integer (got True)"),
        ({"name": "exact", "max_byte": 1}, "did you mean 'max_bytes'?"),
    ],
)
def test_what_is_no_way_of_keeping_features_is_refused(given: Any, says: str) -> None:
    with pytest.raises(InputError) as refusal:
        chosen_features(given)
    assert says in str(refusal.value)


@pytest.mark.parametrize("given", ["auto", "live", {"name": "auto", "max_bytes": 5}, {"name": "exact", "dtype": "bfloat16"}])
def test_a_choice_is_recorded_as_it_was_given(given: Any) -> None:
    assert recorded(chosen_features(given)) == given


def test_settings_become_the_caches() -> None:
    cache = Auto(dtype="bfloat16", device="cpu", max_bytes=7).cache()
    assert (cache.dtype, cache.device, cache.max_bytes) == (torch.bfloat16, torch.device("cpu"), 7)


def test_a_recipe_holds_the_settings() -> None:
    recipe = parse("source_features: {name: exact, dtype: float16, device: cpu, max_bytes: 100000000}")
    assert recipe.source_features == {"name": "exact", "dtype": "float16", "device": "cpu", "max_bytes": 100_000_000}
    assert parse(recipe.to_yaml()) == recipe
    assert parse("source_features: live").source_features == "live"
    assert parse("source_features: {max_bytes: 5}").source_features == {"name": "auto", "max_bytes": 5}
    assert EditRecipe().source_features == "auto"


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("source_features: exat", (), "r.yaml:1:1: source_features: should be 'auto', 'live', 'exact' or 'inversion'"),
        ("source_features: 3", (), "r.yaml:1:1: source_features: should be 'auto'"),
        ("source_features: {name: exat}", (), "r.yaml:1:19: source_features.name: 'exat' is unknown; choose auto"),
        ("source_features: {name: live, dtype: float16}", (), "r.yaml:1:31: source_features.dtype: unknown setting of live"),
        ("source_features: live", ("source_features.max_bytes=5",), "command line: 'source_features.max_bytes=5'"),
    ],
)
def test_mistakes_in_a_recipe_have_their_place(text: str, overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        parse(text, "r.yaml", overrides)
    assert len(refusal.value.problems) == 1
    assert refusal.value.problems[0].startswith(says)


def test_an_override_below_a_name_keeps_the_name() -> None:
    assert parse("source_features: exact", overrides=["source_features.dtype=float16"]).source_features == {
        "name": "exact",
        "dtype": "float16",
    }
    assert parse("control: structure", overrides=["control.stop_step=0.5"]).control == {"name": "structure", "stop_step": 0.5}
    assert parse("control: structure", overrides=["control.name=none"]).control == {"name": "none"}


def test_the_command_line_sets_them_and_result_json_holds_them(
    command: Command, picture: Image.Image, untrained_folder: Path, tmp_path: Path
) -> None:
    picture.save(tmp_path / "photo.png")
    given = ("edit", str(tmp_path / "photo.png"), "a cube", "-o", str(tmp_path / "out"), f"model={untrained_folder}")
    given = (*given, "inversion=ddim", "num_inference_steps=2", "source_features=exact")
    code, printed, errors = command(*given, "source_features.dtype=float16")
    assert (code, errors) == (0, "")
    facts = json.loads((tmp_path / "out" / "result.json").read_text())
    assert facts["source_features"]["dtype"] == "float16"
    assert facts["recipe"]["source_features"] == {"name": "exact", "dtype": "float16"}
    assert f"source features {facts['source_features']['bytes'] / 1e6:.1f} MB in float16" in printed
    code, _, errors = command(*given, "source_features.max_bytes=1000")
    assert (code, len(errors.splitlines())) == (2, 1)
    assert "more than the 1,000 bytes allowed" in errors
