"""What every registered controller promises, whichever it is."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from attention_control import CONTROLLERS, Route, controlled
from tests.attention_control.reference import (
    distance,
    evaluate,
    make_scene,
    official_rows,
    sources_of,
    targets_of,
)

EVERY = pytest.mark.parametrize("controller", CONTROLLERS.values(), ids=CONTROLLERS.keys())


def test_the_registry_is_not_empty() -> None:
    assert {"none", "masactrl"} <= CONTROLLERS.keys()


@EVERY
def test_is_a_frozen_dataclass(controller: type[Any]) -> None:
    assert is_dataclass(controller)
    made = controller()
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
    undocumented = [field.name for field in fields(controller) if f"{field.name}:" not in (controller.__doc__ or "")]
    assert undocumented == []


@EVERY
def test_equal_settings_are_equal_controllers(controller: type[Any]) -> None:
    assert controller() == controller()
    assert hash(controller()) == hash(controller())


@EVERY
def test_routes_are_a_tuple_of_routes_and_the_same_each_time(controller: type[Any]) -> None:
    made = controller()
    routes = made.routes()
    assert isinstance(routes, tuple)
    assert all(isinstance(route, Route) for route in routes)
    assert made.routes() == routes


@EVERY
@pytest.mark.parametrize("steps", [20, 50])
def test_runs_on_a_unet_leaves_the_source_alone_and_takes_itself_off(
    unet: UNet2DConditionModel, controller: type[Any], steps: int
) -> None:
    scene, streams = make_scene(), official_rows()
    before, plain = dict(unet.attn_processors), evaluate(unet, scene, streams)
    with controlled(unet, controller(), num_steps=steps, latent_size=scene.size) as session:
        for step in (0, steps // 2, steps - 1):
            with session.step(step, streams):
                out = evaluate(unet, scene, streams)
            assert distance(sources_of(out), plain) <= 1e-12
            assert (distance(targets_of(out), plain) > 1e-6) is session.reads_source(step), "inert, or acts out of its steps"
    after = unet.attn_processors
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
