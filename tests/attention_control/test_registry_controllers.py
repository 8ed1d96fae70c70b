"""What every registered controller promises, whichever it is."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from attention_control import CONTROLLERS, Route, Run, controlled
from attention_control.streams import layout
from tests.attention_control.reference import (
    WORDS,
    distance,
    evaluate,
    make_scene,
    targets_of,
)


def made_from(controller: type[Any]) -> Any:
    """With its defaults, and its own example for what has none."""
    return controller(**getattr(controller, "example", {}))


EVERY = pytest.mark.parametrize("controller", CONTROLLERS.values(), ids=CONTROLLERS.keys())


def test_the_registry_is_not_empty() -> None:
    assert {"none", "masactrl"} <= CONTROLLERS.keys()


@EVERY
def test_is_a_frozen_dataclass(controller: type[Any]) -> None:
    assert is_dataclass(controller)
    made = made_from(controller)
    with pytest.raises(FrozenInstanceError):
        setattr(made, next((field.name for field in fields(made)), "anything"), 1)


@pytest.mark.parametrize(("key", "controller"), CONTROLLERS.items(), ids=CONTROLLERS.keys())
def test_says_its_name_its_paper_and_its_cost(key: str, controller: type[Any]) -> None:
    assert controller.name == key
    assert controller.paper
    assert "cost:" in (controller.__doc__ or "").lower()


@EVERY
def test_name_and_paper_are_no_settings(controller: type[Any]) -> None:
    assert not {"name", "paper"} & {field.name for field in fields(controller)}


@EVERY
def test_documents_every_setting(controller: type[Any]) -> None:
    text = controller.__doc__ or ""
    undocumented = [field.name for field in fields(controller) if not re.search(rf"\b{field.name}\b", text)]
    assert undocumented == []


@EVERY
def test_equal_settings_are_equal_controllers(controller: type[Any]) -> None:
    assert made_from(controller) == made_from(controller)


@EVERY
def test_its_program_is_made_of_routes_and_the_same_each_time(controller: type[Any]) -> None:
    made, run = made_from(controller), Run(50, (16, 16), words=WORDS[:2])
    routes = made.program(run).routes
    assert all(isinstance(route, Route) for route in routes)
    assert made.program(run).routes == routes


@EVERY
@pytest.mark.parametrize("steps", [20, 50])
def test_runs_on_a_unet_leaves_the_source_alone_and_takes_itself_off(
    unet: UNet2DConditionModel, controller: type[Any], steps: int
) -> None:
    made = made_from(controller)
    sources = getattr(made, "sources", 1)
    rows = [("source", i, "conditional") for i in range(sources)] + [("target", 0, h) for h in ("unconditional", "conditional")]
    scene, streams = make_scene(), layout(rows)  # type: ignore[arg-type]
    before, plain = dict(unet.attn_processors), evaluate(unet, scene, streams)
    with controlled(unet, made, num_steps=steps, latent_size=scene.size, words=WORDS[:2]) as session:
        for step in (0, steps // 2, steps - 1):
            with session.step(step, streams):
                out = evaluate(unet, scene, streams)
            drawn = {row for row in out if row.role == "source" and not (sources == 2 and row.index == 0)}
            assert max(distance({row: out[row]}, plain) for row in drawn) <= 1e-12
            if distance(targets_of(out), plain) > 1e-6:
                assert session.reads_source(step) or made.name == "object_add", "acts without reading the source"
            elif made.name != "none":
                assert not session.program.routes or not any(r.active(step, steps) for r in session.program.routes), "inert"
    after = unet.attn_processors
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
