"""A tabletop scene: one or two solids on a plain ground, described by words a caption can use.

A scene decides its picture completely, so `replace(scene, shape="cube")` is the ground truth of the edit
"make it a cube". This module knows nothing of pixels or networks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from dataclasses import replace as replace  # re-exported: the ground-truth edit
from typing import Any

from torch import Tensor

from easyinv_edit.tabletop import geometry

Colour = tuple[float, float, float]

SHAPES = ("ball", "cube", "cone", "cylinder", "ring", "star")
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES: dict[str, float] = {"small": 0.48, "medium": 0.62, "large": 0.76}
"""Scale of the unit solid in a picture whose half side is 1."""
POSES: dict[str, float] = {"upright": 0.0, "tilted": -0.61}
"""Roll in the picture plane, radians."""
COLOURS: dict[str, Colour] = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.95, 0.50, 0.08),
    "yellow": (0.95, 0.85, 0.12),
    "green": (0.13, 0.60, 0.20),
    "cyan": (0.10, 0.70, 0.78),
    "blue": (0.14, 0.25, 0.85),
    "purple": (0.50, 0.16, 0.68),
    "pink": (0.96, 0.52, 0.72),
}
SECOND_COLOURS: dict[str, Colour] = {**COLOURS, "white": (0.95, 0.95, 0.95), "black": (0.06, 0.06, 0.06)}
BACKGROUNDS: dict[str, Colour] = {
    "white": (1.0, 1.0, 1.0),
    "grey": (0.62, 0.62, 0.62),
    "beige": (0.92, 0.84, 0.68),
    "mint": (0.58, 0.80, 0.58),
    "sky": (0.54, 0.69, 0.91),
    "dark": (0.13, 0.13, 0.14),
}
LOOKALIKES = frozenset(
    frozenset(pair)
    for pair in (
        ("red", "orange"),
        ("cyan", "green"),
        ("cyan", "blue"),
        ("purple", "blue"),
        ("pink", "red"),
        ("orange", "yellow"),
    )
)
"""Pairs a 16 x 16 latent cannot keep apart; never used together on one object."""

WHITE_SHARE = 0.40
"""Share of pure white backgrounds: flat regions are the hard case of the EasyInv paper."""
TEXTURE_WEIGHTS = (1, 2, 2, 2)
YAWS = (0.30, 0.40)
"""Least and greatest turn about the vertical axis: no word says it, so what an edit must guess of it has to be little."""

PLACES: dict[str, float] = {"left": -0.36, "middle": 0.0, "right": 0.36}
"""Horizontal place of the middle of a single solid's outline, in half picture sides: exactly there, as no word says more."""
BESIDE = 0.49
"""How far from the middle each of two solids stands."""


@dataclass(frozen=True, kw_only=True)
class Solid:
    """One solid.

    `shape`, `texture`, `colour`, `second` (second texture colour, unused when plain), `size`, `pose` and `place` are words from
    this module's tables; `yaw` is the turn about the vertical axis in radians, `offset` where the middle of its body really
    stands, in half picture sides. Raises ValueError on an unknown word.
    """

    shape: str = "ball"
    texture: str = "plain"
    colour: str = "red"
    second: str = "white"
    size: str = "medium"
    pose: str = "upright"
    place: str = "middle"
    yaw: float = 0.3
    offset: float = 0.0

    def __post_init__(self) -> None:
        for field, allowed in {**WORDS, "place": tuple(PLACES)}.items():
            value = getattr(self, field, None)
            if value is not None and value not in allowed:
                raise ValueError(f"{type(self).__name__}: {field} is {value!r}; choose one of {', '.join(allowed)}")

    @property
    def rotation(self) -> Tensor:
        """(3, 3) object -> camera."""
        return geometry.rotation(self.shape, POSES[self.pose], self.yaw)


@dataclass(frozen=True, kw_only=True)
class Scene(Solid):
    """A solid on a ground, maybe with another one beside it.

    `background` is a word, `light` the horizontal slope of the light, `beside` the second solid, on the right of the first.
    """

    background: str = "white"
    light: float = 0.3
    beside: Solid | None = None

    @property
    def solids(self) -> tuple[Solid, ...]:
        """One or two solids, from left to right."""
        return (self,) if self.beside is None else (self, self.beside)


WORDS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "second": tuple(SECOND_COLOURS),
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "pose": tuple(POSES),
}
"""Every attribute of a solid or of the ground that a caption can name, with its words; for the place see `PLACES`."""


def standing(scene: Scene, at: float, beside_at: float | None = None) -> Scene:
    """The scene with its first solid's outline in the middle of a horizontal place, and the second one's of another (None: left
    where it is). It is the outline, not the body, so that the border does not cut a tilted cone."""
    beside = scene.beside
    if beside is not None and beside_at is not None:
        beside = replace(beside, offset=beside_at - _lean(beside))
    return replace(scene, offset=at - _lean(scene), beside=beside)


def middle(solid: Solid) -> float:
    """The horizontal middle of a solid's outline, in half picture sides."""
    return solid.offset + _lean(solid)


def _lean(solid: Solid) -> float:
    """How far right of the body's centre the middle of the outline is."""
    across = solid.rotation[0]
    left, right = (geometry.support(solid.shape, side * across) for side in (-1, 1))
    return SIZES[solid.size] * (right - left) / 2


def second_colours(colour: str) -> list[str]:
    """The second colours that stay distinguishable beside `colour`."""
    return [c for c in SECOND_COLOURS if c != colour and frozenset((c, colour)) not in LOOKALIKES]


def random_scene(seed: int) -> Scene:
    """The scene of a seed, one solid in the middle: the same on every machine and Python version (string-free
    `random.Random`)."""
    return standing(_alone(seed, YAWS), PLACES["middle"])


def early_scene(seed: int) -> Scene:
    """What version 1 of the embedded model, no longer shipped, was trained on: its solid turns more, and it is the middle of
    its body, not of its outline, that stands in the middle."""
    return _alone(seed, (-0.6, 0.6))


def _alone(seed: int, yaws: tuple[float, float]) -> Scene:
    rng = random.Random(seed)
    colour = rng.choice(list(COLOURS))
    white = rng.random() < WHITE_SHARE
    return Scene(
        shape=rng.choice(SHAPES),
        texture=rng.choices(TEXTURES, weights=TEXTURE_WEIGHTS)[0],
        colour=colour,
        second=rng.choice(second_colours(colour)),
        background="white" if white else rng.choice([b for b in BACKGROUNDS if b != "white"]),
        size=rng.choice(list(SIZES)),
        pose=rng.choice(list(POSES)),
        yaw=rng.uniform(*yaws),
        offset=rng.uniform(-0.06, 0.06),  # kept by early_scene alone; drawn here, as the light is drawn after it
        light=rng.uniform(-0.5, 0.5),
    )


PAIR_SHARE = 0.45
"""Share of scenes with two solids in the wider world."""
PLACE_WEIGHTS = {"small": (1, 2, 1), "medium": (1, 3, 1), "large": (0, 1, 0)}
"""How often a single solid of each size stands at each of `PLACES`: a large one only fits in the middle."""


def random_table(seed: int) -> Scene:
    """The scene of a seed in the wider world: one solid at any of `PLACES`, or two small ones side by side."""
    rng = random.Random(seed)
    first = _random_solid(rng)
    white = rng.random() < WHITE_SHARE
    background = "white" if white else rng.choice([b for b in BACKGROUNDS if b != "white"])
    ground: dict[str, Any] = {"background": background, "light": rng.uniform(-0.5, 0.5)}
    if rng.random() < PAIR_SHARE:
        beside = Solid(**{**_random_solid(rng), "size": "small", "place": "right"})
        scene = Scene(**{**first, **ground, "size": "small", "place": "left"}, beside=beside)
        return standing(scene, -BESIDE, BESIDE)
    place = rng.choices(list(PLACES), weights=PLACE_WEIGHTS[first["size"]])[0]
    return standing(Scene(**first, **ground, place=place), PLACES[place])


def _random_solid(rng: random.Random) -> dict[str, Any]:
    """Words and turn of a solid."""
    colour = rng.choice(list(COLOURS))
    return {
        "shape": rng.choice(SHAPES),
        "texture": rng.choices(TEXTURES, weights=TEXTURE_WEIGHTS)[0],
        "colour": colour,
        "second": rng.choice(second_colours(colour)),
        "size": rng.choice(list(SIZES)),
        "pose": rng.choice(list(POSES)),
        "yaw": rng.uniform(*YAWS),
    }
