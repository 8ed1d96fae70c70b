"""A tabletop scene: one solid on a plain ground, described by words a caption can use.

A scene decides its picture completely, so `replace(scene, shape="cube")` is the ground truth of the edit
"make it a cube". This module knows nothing of pixels or networks.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from dataclasses import replace as replace  # re-exported: the ground-truth edit

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


@dataclass(frozen=True)
class Scene:
    """One solid on a ground.

    `shape`, `texture`, `colour`, `second` (second texture colour, unused when plain), `background`, `size` and `pose`
    are words from this module's tables; `yaw` is the turn about the vertical axis in radians, `offset` the horizontal
    place in half picture sides, `light` the horizontal slope of the light. Raises ValueError on an unknown word.
    """

    shape: str = "ball"
    texture: str = "plain"
    colour: str = "red"
    second: str = "white"
    background: str = "white"
    size: str = "medium"
    pose: str = "upright"
    yaw: float = 0.3
    offset: float = 0.0
    light: float = 0.3

    def __post_init__(self) -> None:
        for field, allowed in WORDS.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"Scene: {field} is {value!r}; choose one of {', '.join(allowed)}")


WORDS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "texture": TEXTURES,
    "colour": tuple(COLOURS),
    "second": tuple(SECOND_COLOURS),
    "background": tuple(BACKGROUNDS),
    "size": tuple(SIZES),
    "pose": tuple(POSES),
}
"""Every attribute a caption can name, with its words."""


def second_colours(colour: str) -> list[str]:
    """The second colours that stay distinguishable beside `colour`."""
    return [c for c in SECOND_COLOURS if c != colour and frozenset((c, colour)) not in LOOKALIKES]


def random_scene(seed: int) -> Scene:
    """The scene of a seed: the same on every machine and Python version (string-free `random.Random`)."""
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
        yaw=rng.uniform(-0.6, 0.6),
        offset=rng.uniform(-0.06, 0.06),
        light=rng.uniform(-0.5, 0.5),
    )
