"""The renderer: deterministic, and its pictures have the geometry the scene says."""

from __future__ import annotations

import math

import pytest
import torch

from easyinv_edit.tabletop.render import GROUND, render
from easyinv_edit.tabletop.scene import SHAPES, SIZES, Scene, random_scene, replace

BALL = Scene("ball", "plain", "red", yaw=0.0, offset=0.0, light=0.0)


def area(scene: Scene) -> float:
    return render([scene], 64)[1].mean().item()


def test_pictures_and_masks_have_the_promised_form() -> None:
    pictures, masks = render([random_scene(0), random_scene(1)], 48)
    assert pictures.shape == (2, 3, 48, 48)
    assert masks.shape == (2, 1, 48, 48)
    assert pictures.dtype == masks.dtype == torch.float32
    assert 0 <= min(pictures.min(), masks.min()) <= max(pictures.max(), masks.max()) <= 1


def test_the_same_scene_is_the_same_picture() -> None:
    scenes = [random_scene(seed) for seed in range(3)]
    assert torch.equal(render(scenes, 32)[0], render(scenes, 32)[0])


def test_a_picture_does_not_depend_on_its_batch() -> None:
    scenes = [random_scene(seed) for seed in range(6)]
    together = render(scenes, 32)[0]
    alone = torch.cat([render([scene], 32)[0] for scene in scenes])
    assert (together - alone).abs().max() < 1e-4


def test_a_ball_covers_its_disc() -> None:
    radius = 0.92 * SIZES["medium"]
    assert area(BALL) == pytest.approx(math.pi * radius**2 / 4, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_larger_size_covers_more_and_stands_on_the_same_ground(shape: str) -> None:
    scenes = [replace(BALL, shape=shape, size=size) for size in SIZES]
    _, masks = render(scenes, 64)
    areas = masks.mean((1, 2, 3)).tolist()
    assert areas == sorted(areas)
    assert areas[0] < 0.75 * areas[2]
    lowest = [max(torch.nonzero(mask[0].amax(-1) > 0.5)).item() for mask in masks]
    ground = (1 - GROUND) / 2 * 64
    assert all(abs(row + 1 - ground) <= 2 for row in lowest)


def test_paint_does_not_change_the_shape() -> None:
    painted = replace(BALL, texture="checked", colour="blue", second="yellow", background="dark")
    assert torch.equal(render([BALL], 64)[1], render([painted], 64)[1])


def test_a_tilted_cube_looks_different() -> None:
    cube = replace(BALL, shape="cube")
    a, b = render([cube, replace(cube, pose="tilted")], 64)[0]
    assert (a - b).abs().mean() > 0.01


def test_a_white_background_is_white_away_from_the_object() -> None:
    picture, mask = render([replace(BALL, size="small")], 64)
    assert picture[0, :, :10].min() > 0.999
    assert mask[0, :, :10].max() == 0


@pytest.mark.parametrize("texture", ["striped", "dotted", "checked"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_texture_shows_both_colours_on_every_shape(shape: str, texture: str) -> None:
    scene = replace(BALL, shape=shape, texture=texture, colour="red", second="blue", yaw=0.3)
    picture, mask = render([scene], 64)
    inside = picture[0][:, mask[0, 0] > 0.99]
    redder = (inside[0] > inside[2]).float().mean().item()
    assert 0.05 < redder < 0.95
