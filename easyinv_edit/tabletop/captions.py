"""Captions of tabletop scenes: "a large tilted red and white striped ball on a mint background".

A caption may leave any attribute unnamed, so that a prompt can ask for a cube and say nothing of its texture: what is
left unsaid is what an editing method has to carry over from the source.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable

from easyinv_edit.tabletop.scene import WORDS, Scene

NAMED_SHARE: dict[str, float] = {
    "size": 0.65,
    "pose": 0.60,
    "colour": 0.75,
    "second": 0.50,
    "texture": 0.60,
    "shape": 0.92,
    "background": 0.70,
}
"""How often a training caption names each attribute."""
EMPTY_SHARE = 0.10
"""How often a training caption is empty: the unconditional half of classifier-free guidance."""
FILLERS = ("a", "and", "object", "on", "background")


def caption(scene: Scene, unnamed: Collection[str] = ()) -> str:
    """The caption of `scene`, leaving out the attributes in `unnamed` (names from `scene.WORDS`).

    A plain object has no second colour to name; an unnamed colour takes the second colour with it.
    """
    if wrong := set(unnamed) - set(WORDS):
        raise ValueError(f"caption: unknown attribute {sorted(wrong)}; choose from {', '.join(WORDS)}")
    said = {word for word in WORDS if word not in unnamed}
    words = ["a", *(getattr(scene, field) for field in ("size", "pose", "colour") if field in said)]
    if scene.texture != "plain" and {"colour", "second"} <= said:
        words += ["and", scene.second]
    if "texture" in said:
        words.append(scene.texture)
    words.append(scene.shape if "shape" in said else "object")
    if "background" in said:
        words += ["on", "a", scene.background, "background"]
    return " ".join(words)


def training_caption(scene: Scene, rng: random.Random) -> str:
    """A caption with attributes dropped at random: see `NAMED_SHARE` and `EMPTY_SHARE`."""
    if rng.random() < EMPTY_SHARE:
        return ""
    return caption(scene, [field for field, share in NAMED_SHARE.items() if rng.random() >= share])


def vocabulary() -> list[str]:
    """Every word a caption can hold, each once, in a fixed order."""
    words: Iterable[str] = (*FILLERS, *(w for table in WORDS.values() for w in table))
    return list(dict.fromkeys(words))
