"""Render tabletop scenes: batched sphere tracing in torch, float32, deterministic.

Orthographic camera looking slightly down, ground line at y = -0.62, soft elliptical contact shadow, Lambert shading with
a small highlight. The picture plane is [-1, 1]^2, y up; lengths below are in half picture sides unless "unit" is said,
which means the solid before `SIZES` scales it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from easyinv_edit.tabletop.geometry import SOLIDS, support
from easyinv_edit.tabletop.scene import BACKGROUNDS, COLOURS, SECOND_COLOURS, SHAPES, SIZES, TEXTURES, Scene, Solid

GROUND = -0.62
MARCH_STEPS = 40
HIT = 2e-3
SEEN = 0.08
"""Least difference of a colour channel from the bare ground that counts as a solid."""
CHUNK = 8
"""Scenes traced at once: few enough that their rays stay in a processor's cache."""


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
    [0, 1] and the coverage (B, 1, size, size) in [0, 1] of all that stands there, float32 on the CPU. About 6 ms a solid and
    core at 64 pixels and supersample 2.
    """
    pictures, covered = render_apart(scenes, size, supersample, device)
    return pictures, covered.sum(1, keepdim=True)


def render_apart(scenes: Sequence[Scene], size: int, supersample: int = 2, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """As `render`, but the coverage (B, 2, size, size) is each solid's own: the second is empty where there is one only."""
    parts = [_render_chunk(scenes[i : i + CHUNK], size, supersample, device) for i in range(0, len(scenes), CHUNK)]
    pictures, masks = zip(*parts, strict=True)
    return torch.cat(pictures), torch.cat(masks)


def silhouettes(pictures: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Where pictures (B, 3, size, size) in [0, 1] show something else than the bare grounds of `scenes`: bool (B, size, size).

    The ground has the scene's background and its solids' shadows, which size and place decide, not shape. A pixel must differ
    by `SEEN`; beside bare ground it counts where it is nearer to its neighbours than to the ground. To be compared with where
    the coverage that `render` gives of what should stand there is above a half.
    """
    size, pool = pictures.shape[-1], torch.nn.functional.max_pool2d
    ground = _ground(scenes, _rays(size, "cpu")).reshape(len(scenes), size, size, 3).permute(0, 3, 1, 2)
    difference = (pictures - ground).abs().amax(1)
    inside = -pool(-difference, 3, 1, 1) > SEEN
    nearer = difference > pool(difference, 3, 1, 1) / 2
    return (difference > SEEN) & (inside | nearer)


def _render_chunk(scenes: Sequence[Scene], size: int, supersample: int, device: str) -> tuple[Tensor, Tensor]:
    side = size * supersample
    flat = _rays(side, device)
    picture = _ground(scenes, flat)
    hits = torch.zeros(2, len(scenes), side * side, dtype=torch.bool, device=device)
    for place in range(2):
        rows, colour, hit = _trace(scenes, place, flat)
        hits[place, rows] = hit & ~hits.any(0)[rows]
        picture[rows] = torch.where(hits[place, rows][..., None], colour, picture[rows])
    pool = torch.nn.functional.avg_pool2d
    picture = picture.reshape(len(scenes), side, side, 3).permute(0, 3, 1, 2).contiguous()
    covered = hits.float().reshape(2, len(scenes), side, side).transpose(0, 1)
    return pool(picture, supersample).clamp(0, 1).cpu(), pool(covered, supersample).cpu()


def _rays(side: int, device: str) -> Tensor:
    """Where the parallel rays of a picture start in camera coordinates: (1, side * side, 3)."""
    axis = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    return torch.stack([x, y, torch.full_like(x, 2.0)], -1).reshape(1, -1, 3)


def _ground(scenes: Sequence[Scene], flat: Tensor) -> Tensor:
    """The grounds with the solids' shadows on them: (scenes, rays, 3)."""
    picture = torch.tensor([BACKGROUNDS[s.background] for s in scenes], device=flat.device)[:, None]
    picture = picture.repeat(1, flat.shape[1], 1)
    for place in range(2):
        rows, solids = _standing(scenes, place)
        if rows:
            picture[rows] *= 1 - _shadow(solids, flat)[..., None]
    return picture


def _standing(scenes: Sequence[Scene], place: int) -> tuple[list[int], list[Solid]]:
    """The first or the second solids, and the rows of the scenes that have one."""
    rows = [i for i, scene in enumerate(scenes) if place < len(scene.solids)]
    return rows, [scenes[i].solids[place] for i in rows]


def _trace(scenes: Sequence[Scene], place: int, flat: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """The first or the second solids: rows of the scenes that have one, colours (n, rays, 3) and hits (n, rays).

    flat: (1, rays, 3), where the parallel rays start in camera coordinates.
    """
    rows, solids = _standing(scenes, place)
    if not rows:
        return rows, flat.new_zeros(0, flat.shape[1], 3), flat.new_zeros(0, flat.shape[1], dtype=torch.bool)
    rotation = torch.stack([s.rotation for s in solids]).to(flat.device)  # (n, 3, 3)
    scale = torch.tensor([SIZES[s.size] for s in solids], device=flat.device)
    reach = torch.tensor([support(s.shape, -s.rotation[1]) for s in solids], device=flat.device) * scale
    x = torch.tensor([s.offset for s in solids], device=flat.device)
    centre = torch.stack([x, GROUND + reach, torch.zeros_like(x)], -1)[:, None]
    # Camera rays, parallel to z, in unit-solid coordinates: camera -> object is the transposed rotation.
    start = ((flat - centre) / scale[:, None, None]) @ rotation
    points, hit = _march(solids, start, -rotation[:, 2][:, None])
    light = torch.tensor([[scenes[i].light, 0.85, 0.75] for i in rows], device=flat.device)
    return rows, _shade(solids, points, _normals(solids, points), rotation, light), hit


def _distance(solids: Sequence[Solid], p: Tensor) -> Tensor:
    return _select([s.shape for s in solids], SHAPES, lambda word, q: SOLIDS[word](q), p)


def _march(solids: Sequence[Solid], start: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    depth = torch.zeros(start.shape[:-1], device=start.device)
    for _ in range(MARCH_STEPS):
        depth = depth + _distance(solids, start + depth[..., None] * direction)
    points = start + depth[..., None] * direction
    return points, _distance(solids, points) < HIT


def _normals(solids: Sequence[Solid], points: Tensor) -> Tensor:
    """Outward unit normals by central differences, unit-solid coordinates."""
    step = 1e-3
    offsets = torch.eye(3, device=points.device) * step
    gradient = [_distance(solids, points + o) - _distance(solids, points - o) for o in offsets]
    return torch.nn.functional.normalize(torch.stack(gradient, -1), dim=-1)


def _shade(solids: Sequence[Solid], points: Tensor, normal: Tensor, rotation: Tensor, light: Tensor) -> Tensor:
    device = points.device
    first = torch.tensor([COLOURS[s.colour] for s in solids], device=device)[:, None]
    second = torch.tensor([SECOND_COLOURS[s.second] for s in solids], device=device)[:, None]
    other = _select([s.texture for s in solids], TEXTURES, _texture, points).bool()
    albedo = torch.where(other[..., None], second, first)
    light = torch.nn.functional.normalize(light, dim=-1)
    facing = normal @ rotation.transpose(1, 2)  # to camera coordinates
    lambert = (facing * light[:, None]).sum(-1).clamp(min=0)
    half = torch.nn.functional.normalize(light + torch.tensor([0.0, 0.0, 1.0], device=device), dim=-1)
    gloss = (facing * half[:, None]).sum(-1).clamp(min=0) ** 24
    return albedo * (0.46 + 0.58 * lambert[..., None]) + 0.16 * gloss[..., None]


def _shadow(solids: Sequence[Solid], flat: Tensor) -> Tensor:
    """Share of the ground's light that each solid takes: (n, rays)."""
    scale = torch.tensor([SIZES[s.size] for s in solids], device=flat.device)[:, None]
    x = torch.tensor([s.offset for s in solids], device=flat.device)[:, None]
    across, along = (flat[..., 0] - x) / (0.95 * scale), (flat[..., 1] - (GROUND + 0.04)) / (0.30 * scale)
    return 0.55 * torch.exp(-1.6 * (across**2 + along**2))
