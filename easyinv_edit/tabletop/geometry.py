"""The solids' geometry: distances, how they are turned, and how far they reach. Lengths are those of the unit solid."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

PITCH = {"ring": 0.12, "star": 0.12}
DEFAULT_PITCH = 0.38
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


def rotation(shape: str, roll: float, yaw: float) -> Tensor:
    """(3, 3) object -> camera: turn about the vertical, then look down, then roll in the picture plane.

    Multiplied in float64, so that the float32 result, and with it where a scene's solids stand, is the same on every processor.
    """
    pitch = PITCH.get(shape, DEFAULT_PITCH)
    (cy, sy), (cp, sp), (cr, sr) = ((math.cos(a), math.sin(a)) for a in (yaw, pitch, roll))
    turns = [[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]
    looks = [[1, 0, 0], [0, cp, -sp], [0, sp, cp]]
    tilts = [[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]]
    tilt, look, turn = (torch.tensor(part, dtype=torch.float64) for part in (tilts, looks, turns))
    return (tilt @ look @ turn).float()


def support(shape: str, direction: Tensor) -> float:
    """How far the unit solid reaches along a unit direction in object coordinates."""
    x, y, z = direction.tolist()
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
