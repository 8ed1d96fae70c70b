"""Render tabletop scenes: batched sphere tracing in torch, float32, deterministic.

Orthographic camera looking slightly down, ground line at y = -0.62, soft elliptical contact shadow, Lambert shading with
a small highlight. The picture plane is [-1, 1]^2, y up; lengths below are in half picture sides unless "unit" is said,
which means the solid before `SIZES` scales it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from easyinv_edit.tabletop.scene import BACKGROUNDS, COLOURS, POSES, SECOND_COLOURS, SHAPES, SIZES, TEXTURES, Scene

GROUND = -0.62
PITCH = {"ring": 0.12, "star": 0.12}
DEFAULT_PITCH = 0.38
MARCH_STEPS = 40
HIT = 2e-3
CHUNK = 64
"""Scenes traced at once: bounds memory at about 0.4 GB for 128-pixel pictures."""

STAR_OUTER, STAR_INNER, STAR_DEPTH = 0.98, 0.45, 0.26


def _ball(p: Tensor) -> Tensor:
    return p.norm(dim=-1) - 0.92


def _cube(p: Tensor) -> Tensor:
    q = p.abs() - 0.60
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0) - 0.06


def _cone(p: Tensor) -> Tensor:
    half, radius = 0.85, 0.82
    slope = 2 * half / math.hypot(2 * half, radius)  # cosine between the side's normal and the horizontal
    rise = radius / math.hypot(2 * half, radius)
    side = p[..., [0, 2]].norm(dim=-1) * slope + (p[..., 1] - half) * rise
    return torch.maximum(side, -half - p[..., 1])


def _cylinder(p: Tensor) -> Tensor:
    return torch.maximum(p[..., [0, 2]].norm(dim=-1) - 0.60, p[..., 1].abs() - 0.78)


def _ring(p: Tensor) -> Tensor:
    return torch.hypot(p[..., :2].norm(dim=-1) - 0.66, p[..., 2]) - 0.29


def _star(p: Tensor) -> Tensor:
    sector = 2 * math.pi / 5
    angle = torch.atan2(p[..., 0], p[..., 1])
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()  # 0 along a tip, sector / 2 in a notch
    radius = p[..., :2].norm(dim=-1)
    along, across = radius * folded.cos(), radius * folded.sin()
    notch = (STAR_INNER * math.cos(sector / 2), STAR_INNER * math.sin(sector / 2))
    edge = (notch[0] - STAR_OUTER, notch[1])
    length = math.hypot(*edge)
    flat = ((along - STAR_OUTER) * edge[1] - across * edge[0]) / length
    return torch.maximum(flat, p[..., 2].abs() - STAR_DEPTH)


SOLIDS: dict[str, Callable[[Tensor], Tensor]] = {
    "ball": _ball,
    "cube": _cube,
    "cone": _cone,
    "cylinder": _cylinder,
    "ring": _ring,
    "star": _star,
}
"""Signed distance (a lower bound of it) to each unit solid; points (..., 3) -> (...)."""


def _rotation(scene: Scene) -> Tensor:
    """(3, 3) object -> camera: turn about the vertical, then look down, then roll in the picture plane."""
    pitch, roll = PITCH.get(scene.shape, DEFAULT_PITCH), POSES[scene.pose]
    (cy, sy), (cp, sp), (cr, sr) = ((math.cos(a), math.sin(a)) for a in (scene.yaw, pitch, roll))
    turn = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    look = torch.tensor([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    tilt = torch.tensor([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return tilt @ look @ turn


def _support(shape: str, down: Tensor) -> float:
    """How far the unit solid reaches along the unit direction `down` (object coordinates)."""
    x, y, z = down.tolist()
    flat = math.hypot(x, z)
    if shape == "ball":
        return 0.92
    if shape == "cube":
        return 0.60 * (abs(x) + abs(y) + abs(z)) + 0.06
    if shape == "cone":
        return max(0.82 * flat - 0.85 * y, 0.85 * y)
    if shape == "cylinder":
        return 0.60 * flat + 0.78 * abs(y)
    if shape == "ring":
        return 0.66 * math.hypot(x, y) + 0.29
    angles = (2 * math.pi * k / 5 for k in range(5))
    return max(STAR_OUTER * (math.sin(a) * x + math.cos(a) * y) for a in angles) + STAR_DEPTH * abs(z)


def _texture(kind: str, p: Tensor) -> Tensor:
    """True where the second colour shows; `p` (..., 3) in unit-solid coordinates."""
    if kind == "striped":
        return torch.remainder(torch.floor(p[..., 1] / 0.5), 2) == 1
    if kind == "dotted":
        return (torch.remainder(p + 0.46, 0.92) - 0.46).norm(dim=-1) < 0.42
    if kind == "checked":
        return torch.remainder(torch.floor(p / 0.80).sum(-1), 2) == 1
    return torch.zeros(p.shape[:-1], dtype=torch.bool, device=p.device)


def _select(words: Sequence[str], of: Sequence[str], compute: Callable[[str, Tensor], Tensor], p: Tensor) -> Tensor:
    """Apply `compute(word, p[i])` to each scene's points according to its word; (scenes, rays, 3) -> (scenes, rays)."""
    result: Tensor | None = None
    for word in of:
        rows = [i for i, w in enumerate(words) if w == word]
        if rows:
            value = compute(word, p[rows])
            if result is None:
                result = value.new_zeros(p.shape[:-1])
            result[rows] = value
    assert result is not None
    return result


def render(scenes: Sequence[Scene], size: int = 128, supersample: int = 2, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Render scenes.

    size: side of the square pictures in pixels; supersample: rays per pixel side. Returns pictures (B, 3, size, size) in
    [0, 1] and the object's coverage (B, 1, size, size) in [0, 1], float32 on the CPU. About 6 ms a picture and core at 64
    pixels and supersample 2.
    """
    parts = [_render_chunk(scenes[i : i + CHUNK], size, supersample, device) for i in range(0, len(scenes), CHUNK)]
    pictures, masks = zip(*parts, strict=True)
    return torch.cat(pictures), torch.cat(masks)


def _render_chunk(scenes: Sequence[Scene], size: int, supersample: int, device: str) -> tuple[Tensor, Tensor]:
    side = size * supersample
    axis = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    rotation = torch.stack([_rotation(s) for s in scenes]).to(device)  # (B, 3, 3)
    scale = torch.tensor([SIZES[s.size] for s in scenes], device=device)
    reach = torch.tensor([_support(s.shape, -_rotation(s)[1]) for s in scenes], device=device) * scale
    centre_x = torch.tensor([s.offset for s in scenes], device=device)
    centre_y = GROUND + reach
    # Camera rays, parallel to z, in unit-solid coordinates: camera -> object is the transposed rotation.
    flat = torch.stack([x, y, torch.full_like(x, 2.0)], -1).reshape(1, -1, 3)
    centre = torch.stack([centre_x, centre_y, torch.zeros_like(centre_x)], -1)[:, None]
    start = ((flat - centre) / scale[:, None, None]) @ rotation
    direction = -rotation[:, 2][:, None]  # (B, 1, 3)
    points, hit = _march(scenes, start, direction)
    normal = _normals(scenes, points)
    colour = _shade(scenes, points, normal, rotation)
    ground = _ground(scenes, flat, centre_x, scale)
    picture = torch.where(hit[..., None], colour, ground)
    picture = picture.reshape(len(scenes), side, side, 3).permute(0, 3, 1, 2).contiguous()
    mask = hit.float().reshape(len(scenes), 1, side, side)
    pool = torch.nn.functional.avg_pool2d
    return pool(picture, supersample).clamp(0, 1).cpu(), pool(mask, supersample).cpu()


def _distance(scenes: Sequence[Scene], p: Tensor) -> Tensor:
    return _select([s.shape for s in scenes], SHAPES, lambda word, q: SOLIDS[word](q), p)


def _march(scenes: Sequence[Scene], start: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    depth = torch.zeros(start.shape[:-1], device=start.device)
    for _ in range(MARCH_STEPS):
        depth = depth + _distance(scenes, start + depth[..., None] * direction)
    points = start + depth[..., None] * direction
    return points, _distance(scenes, points) < HIT


def _normals(scenes: Sequence[Scene], points: Tensor) -> Tensor:
    """Outward unit normals by central differences, unit-solid coordinates."""
    step = 1e-3
    offsets = torch.eye(3, device=points.device) * step
    gradient = [_distance(scenes, points + o) - _distance(scenes, points - o) for o in offsets]
    return torch.nn.functional.normalize(torch.stack(gradient, -1), dim=-1)


def _shade(scenes: Sequence[Scene], points: Tensor, normal: Tensor, rotation: Tensor) -> Tensor:
    device = points.device
    first = torch.tensor([COLOURS[s.colour] for s in scenes], device=device)[:, None]
    second = torch.tensor([SECOND_COLOURS[s.second] for s in scenes], device=device)[:, None]
    other = _select([s.texture for s in scenes], TEXTURES, _texture, points).bool()
    albedo = torch.where(other[..., None], second, first)
    light = torch.nn.functional.normalize(torch.tensor([[s.light, 0.85, 0.75] for s in scenes], device=device), dim=-1)
    facing = normal @ rotation.transpose(1, 2)  # to camera coordinates
    lambert = (facing * light[:, None]).sum(-1).clamp(min=0)
    half = torch.nn.functional.normalize(light + torch.tensor([0.0, 0.0, 1.0], device=device), dim=-1)
    gloss = (facing * half[:, None]).sum(-1).clamp(min=0) ** 24
    return albedo * (0.46 + 0.58 * lambert[..., None]) + 0.16 * gloss[..., None]


def _ground(scenes: Sequence[Scene], flat: Tensor, centre_x: Tensor, scale: Tensor) -> Tensor:
    colour = torch.tensor([BACKGROUNDS[s.background] for s in scenes], device=flat.device)[:, None]
    across = (flat[..., 0] - centre_x[:, None]) / (0.95 * scale[:, None])
    along = (flat[..., 1] - (GROUND + 0.04)) / (0.30 * scale[:, None])
    shadow = 0.55 * torch.exp(-1.6 * (across**2 + along**2))
    return colour * (1 - shadow[..., None])
