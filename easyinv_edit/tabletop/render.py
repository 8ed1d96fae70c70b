"""Render tabletop scenes: sphere tracing in torch, float32, deterministic.

Orthographic camera looking slightly down, ground line at y = -0.62, soft elliptical contact shadow, Lambert shading with
a small highlight. The picture plane is [-1, 1]^2, y up; lengths below are in half picture sides unless "unit" is said,
which means the solid before `SIZES` scales it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from easyinv_edit.tabletop.geometry import SOLIDS, support
from easyinv_edit.tabletop.scene import BACKGROUNDS, COLOURS, SECOND_COLOURS, SIZES, Scene, Solid

GROUND = -0.62
MARCH_STEPS = 40
HIT = 2e-3
SEEN = 0.08
"""Least difference of a colour channel from the bare ground that counts as a solid."""


def _texture(kind: str, p: Tensor) -> Tensor:
    """True where the second colour shows; `p` (..., 3) in unit-solid coordinates."""
    if kind == "striped":
        return torch.remainder(torch.floor(p[..., 1] / 0.5), 2) == 1
    if kind == "dotted":
        return (torch.remainder(p + 0.46, 0.92) - 0.46).norm(dim=-1) < 0.42
    if kind == "checked":
        return torch.remainder(torch.floor(p / 0.80).sum(-1), 2) == 1
    return torch.zeros(p.shape[:-1], dtype=torch.bool, device=p.device)


def render(scenes: Sequence[Scene], size: int = 128, supersample: int = 2, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Render scenes.

    size: side of the square pictures in pixels; supersample: rays per pixel side. Returns pictures (B, 3, size, size) in
    [0, 1] and the coverage (B, 1, size, size) in [0, 1] of all that stands there, float32 on the CPU. About 10 ms a solid and
    core at 64 pixels and supersample 2, 32 ms at 128.
    """
    pictures, covered = render_apart(scenes, size, supersample, device)
    return pictures, covered.sum(1, keepdim=True)


def render_apart(scenes: Sequence[Scene], size: int, supersample: int = 2, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """As `render`, but the coverage (B, 2, size, size) is each solid's own: the second is empty where there is one only."""
    flat = _rays(size * supersample, device)
    parts = [_render_one(scene, flat, supersample) for scene in scenes]
    pictures, masks = zip(*parts, strict=True)
    return torch.cat(pictures), torch.cat(masks)


def silhouettes(pictures: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Where pictures (B, 3, size, size) in [0, 1] show something else than the bare grounds of `scenes`: bool (B, size, size).

    The ground has the scene's background and its solids' shadows, which size and place decide, not shape. A pixel must differ
    by `SEEN`; beside bare ground it counts where it is nearer to its neighbours than to the ground. To be compared with where
    the coverage that `render` gives of what should stand there is above a half.
    """
    size, pool = pictures.shape[-1], torch.nn.functional.max_pool2d
    flat = _rays(size, "cpu")
    ground = torch.stack([_ground(scene, flat) for scene in scenes]).permute(0, 3, 1, 2)
    difference = (pictures - ground).abs().amax(1)
    inside = -pool(-difference, 3, 1, 1) > SEEN
    nearer = difference > pool(difference, 3, 1, 1) / 2
    return (difference > SEEN) & (inside | nearer)


def _render_one(scene: Scene, flat: Tensor, supersample: int) -> tuple[Tensor, Tensor]:
    picture = _ground(scene, flat)
    hits = torch.zeros(2, *flat.shape[:-1], dtype=torch.bool, device=flat.device)
    for place, solid in enumerate(scene.solids):
        box = _box(solid, len(flat))
        colour, hit = _trace(solid, scene.light, flat[box])
        hit &= ~hits.any(0)[box]
        hits[place][box] = hit
        picture[box] = torch.where(hit[..., None], colour, picture[box])
    pool = torch.nn.functional.avg_pool2d
    picture = picture.permute(2, 0, 1)[None].contiguous()
    return pool(picture, supersample).clamp(0, 1).cpu(), pool(hits[None].float(), supersample).cpu()


def _rays(side: int, device: str) -> Tensor:
    """Where the parallel rays of a picture start in camera coordinates: (side, side, 3)."""
    axis = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    return torch.stack([x, y, torch.full_like(x, 2.0)], -1)


def _ground(scene: Scene, flat: Tensor) -> Tensor:
    """The ground with the solids' shadows on it: (side, side, 3)."""
    light = torch.ones(flat.shape[:-1], device=flat.device)
    for solid in scene.solids:
        light = light * (1 - _shadow(solid, flat))
    return torch.tensor(BACKGROUNDS[scene.background], device=flat.device) * light[..., None]


def _centre(solid: Solid) -> tuple[float, float]:
    """Where the middle of the body is in the picture plane: its lowest point stands on the ground line."""
    return solid.offset, GROUND + SIZES[solid.size] * support(solid.shape, -solid.rotation[1])


def _box(solid: Solid, side: int) -> tuple[slice, slice]:
    """Rows and columns of the rays that can meet the solid."""
    scale, (x, y) = SIZES[solid.size], _centre(solid)
    across, up = solid.rotation[:2]
    left, right = (x + sign * scale * support(solid.shape, sign * across) for sign in (-1, 1))
    low, high = (y + sign * scale * support(solid.shape, sign * up) for sign in (-1, 1))
    first_row, last_row, first_column, last_column = ((edge + 1) / 2 * side for edge in (-high, -low, left, right))
    return _pixels(first_row, last_row, side), _pixels(first_column, last_column, side)


def _pixels(first: float, last: float, side: int) -> slice:
    """With one more on both sides, for the rays that `HIT` counts though they only graze."""
    return slice(max(0, math.floor(first) - 1), max(0, min(side, math.ceil(last) + 1)))


def _trace(solid: Solid, light: float, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Colours (h, w, 3) and hits (h, w) of the rays that start at `flat` (h, w, 3) in camera coordinates."""
    rotation = solid.rotation.to(flat.device)
    centre = torch.tensor([*_centre(solid), 0.0], device=flat.device)
    # Camera rays, parallel to z, in unit-solid coordinates: camera -> object is the transposed rotation.
    start, direction = ((flat - centre) / SIZES[solid.size]) @ rotation, -rotation[2]
    distance = SOLIDS[solid.shape]
    depth = torch.zeros(start.shape[:-1], device=start.device)
    for _ in range(MARCH_STEPS):
        depth = depth + distance(start + depth[..., None] * direction)
    points = start + depth[..., None] * direction
    hit = distance(points) < HIT
    colour = torch.zeros_like(points)
    colour[hit] = _shade(solid, points[hit], rotation, light)
    return colour, hit


def _normals(shape: str, points: Tensor) -> Tensor:
    """Outward unit normals by central differences, unit-solid coordinates."""
    step = 1e-3
    offsets, distance = torch.eye(3, device=points.device) * step, SOLIDS[shape]
    gradient = [distance(points + o) - distance(points - o) for o in offsets]
    return torch.nn.functional.normalize(torch.stack(gradient, -1), dim=-1)


def _shade(solid: Solid, points: Tensor, rotation: Tensor, light: float) -> Tensor:
    """The colours (n, 3) of a solid's points (n, 3)."""
    first = torch.tensor(COLOURS[solid.colour], device=points.device)
    second = torch.tensor(SECOND_COLOURS[solid.second], device=points.device)
    albedo = torch.where(_texture(solid.texture, points)[:, None], second, first)
    towards = torch.nn.functional.normalize(torch.tensor([light, 0.85, 0.75], device=points.device), dim=0)
    facing = _normals(solid.shape, points) @ rotation.T  # to camera coordinates
    half = torch.nn.functional.normalize(towards + torch.tensor([0.0, 0.0, 1.0], device=points.device), dim=0)
    lambert, gloss = (facing @ towards).clamp(min=0), (facing @ half).clamp(min=0) ** 24
    return albedo * (0.46 + 0.58 * lambert[:, None]) + 0.16 * gloss[:, None]


def _shadow(solid: Solid, flat: Tensor) -> Tensor:
    """Share of the ground's light that the solid takes: (side, side)."""
    scale = SIZES[solid.size]
    across, along = (flat[..., 0] - solid.offset) / (0.95 * scale), (flat[..., 1] - (GROUND + 0.04)) / (0.30 * scale)
    return 0.55 * torch.exp(-1.6 * (across**2 + along**2))
