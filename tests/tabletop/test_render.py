"""The renderer: deterministic, and its pictures have the geometry the scene says."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import product

import pytest
import torch

from easyinv_edit.tabletop import render as rendering
from easyinv_edit.tabletop.geometry import DEFAULT_PITCH, PITCH, rotation
from easyinv_edit.tabletop.render import GROUND, render, render_apart, silhouettes
from easyinv_edit.tabletop.scene import BESIDE, POSES, SHAPES, SIZES, Scene, Solid, random_scene, random_table, replace

BALL = Scene(shape="ball", texture="plain", colour="red", yaw=0.0, offset=0.0, light=0.0)


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
    assert all(torch.equal(a, b) for a, b in zip(render(scenes, 32), render(scenes, 32), strict=True))


def test_a_picture_does_not_depend_on_its_batch() -> None:
    scenes = [random_table(seed) for seed in range(5)]
    together = render(scenes, 16)
    alone = [torch.cat(parts) for parts in zip(*(render([scene], 16) for scene in scenes), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_a_rotation_is_that_of_exact_products_on_every_processor() -> None:
    for shape, roll, yaw in product(("cube", "ring"), POSES.values(), (0.0, 0.37, -0.59)):
        pitch = PITCH.get(shape, DEFAULT_PITCH)
        (cy, sy), (cp, sp), (cr, sr) = ((math.cos(a), math.sin(a)) for a in (yaw, pitch, roll))
        expected = [
            [cr * cy - sr * sp * sy, -sr * cp, cr * sy + sr * sp * cy],
            [sr * cy + cr * sp * sy, cr * cp, sr * sy - cr * sp * cy],
            [-cp * sy, sp, cp * cy],
        ]
        assert torch.equal(rotation(shape, roll, yaw), torch.tensor(expected, dtype=torch.float64).float())


def test_no_solid_reaches_beyond_the_rays_that_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [*map(random_scene, range(12)), *map(random_table, range(12))]
    scenes += [replace(BALL, shape=shape, pose=pose, size="large", yaw=0.6) for shape in SHAPES for pose in POSES]
    pictures, masks = render_apart(scenes, 64)
    monkeypatch.setattr(rendering, "_box", lambda _solid, _side: (slice(None), slice(None)))
    whole, whole_masks = render_apart(scenes, 64)
    assert torch.equal(masks, whole_masks)
    assert (pictures - whole).abs().max() < 1e-3


def test_a_solid_beyond_the_border_is_not_seen() -> None:
    picture, mask = render([replace(BALL, offset=3.0)], 32)
    assert mask.max() == 0
    assert picture.min() > 0.9


def test_two_solids_are_drawn_as_each_alone_and_do_not_cover_each_other() -> None:
    left, right = replace(BALL, size="small", offset=-BESIDE), Solid(shape="cube", colour="blue", size="small", offset=BESIDE)
    pair, covered = render_apart([replace(left, beside=right)], 64)
    alone = replace(left, **{field: getattr(right, field) for field in ("shape", "colour", "size", "offset", "yaw")})
    for side, scene in enumerate((left, alone)):
        picture, mask = render_apart([scene], 64)
        assert torch.equal(covered[:, side], mask[:, 0])
        assert mask[:, 1].max() == 0
        inside = (mask[:, :1] == 1).expand_as(pair)
        assert (pair[inside] - picture[inside]).abs().max() < 1e-6
    assert torch.equal(render([replace(left, beside=right)], 64)[1], covered.sum(1, keepdim=True))
    assert covered.sum(1).max() <= 1


def test_no_two_solids_of_the_wider_world_overlap() -> None:
    scenes = [scene for scene in map(random_table, range(40)) if scene.beside]
    for scene, own in zip(scenes, render_apart(scenes, 64)[1], strict=True):
        assert isinstance(scene.beside, Solid)
        alone = replace(scene, **asdict(scene.beside), beside=None)
        whole = render([alone], 64)[1][0, 0].sum()
        assert (whole - own[1].sum()).abs() < 0.01 * whole


def test_a_ball_covers_its_disc() -> None:
    radius = 0.92 * SIZES["medium"]
    assert area(BALL) == pytest.approx(math.pi * radius**2 / 4, rel=0.02)


FACING = {  # front faces in unit-solid lengths, seen without turn; the pitch changes them by a few per cent
    "cube": 1.32 * (1.32 * math.cos(0.38) + 1.32 * math.sin(0.38)),
    "cylinder": 1.2 * 1.56 * math.cos(0.38) + math.pi * 0.36 * math.sin(0.38),
    "ring": math.pi * (0.95**2 - 0.37**2),
    "star": 5 * 0.98 * 0.45 * math.sin(math.pi / 5),
}


@pytest.mark.parametrize("shape", FACING)
def test_a_solid_covers_about_its_outline(shape: str) -> None:
    assert area(replace(BALL, shape=shape)) == pytest.approx(FACING[shape] * SIZES["medium"] ** 2 / 4, rel=0.10)


def test_a_cone_covers_less_than_the_cylinder_around_it() -> None:
    assert 0.5 < area(replace(BALL, shape="cone")) / area(replace(BALL, shape="cylinder")) < 0.95


def test_supersampling_is_averaging() -> None:
    """The same rays: coverage at 32 pixels and supersample 2 is that at 64 pixels, pooled."""
    scenes = [random_scene(seed) for seed in range(3)]
    assert torch.equal(render(scenes, 32, 2)[1], torch.nn.functional.avg_pool2d(render(scenes, 64, 1)[1], 2))


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


def test_silhouettes_of_renders_are_their_coverage() -> None:
    """The bare ground shows nothing; a render shows its solids, up to those surfaces that look like the ground."""
    scenes = [random_table(seed) for seed in range(24)]
    pictures, masks = render(scenes, 64)
    found, inside = silhouettes(pictures, scenes), masks[:, 0] > 0.5
    overlap = (found & inside).sum((1, 2)) / (found | inside).sum((1, 2))
    assert overlap.mean() > 0.93
    empty = render([replace(scene, offset=5.0, beside=None) for scene in scenes], 64)[0]
    ground = [replace(scene, offset=5.0, beside=None) for scene in scenes]
    assert not silhouettes(empty, ground).any()
    assert silhouettes(pictures, ground).float().mean() > inside.float().mean()
