"""Captions of tabletop scenes: "a large tilted red and white striped ball on a mint background", "a small cube on the left",
"a dotted ring and a blue cone on a white background".

A caption may leave any attribute unnamed, so that a prompt can ask for a cube and say nothing of its texture: what is
left unsaid is what an editing method has to carry over from the source.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from easyinv_edit.tabletop.scene import PLACES, WORDS, Scene, Solid

NAMED_SHARE: dict[str, float] = {
    "size": 0.80,
    "pose": 0.75,
    "colour": 0.80,
    "second": 0.65,
    "texture": 0.75,
    "shape": 0.95,
    "background": 0.80,
    "place": 0.85,
}
"""How often a training caption names each attribute."""
EMPTY_SHARE = 0.10
"""How often a training caption is empty: the unconditional half of classifier-free guidance."""
FILLERS = ("a", "and", "object", "on", "the", "background")


def caption(scene: Scene, unnamed: Collection[str] = (), beside_unnamed: Collection[str] | None = None) -> str:
    """The caption of `scene`, leaving out the attributes in `unnamed` (names of `NAMED_SHARE`).

    beside_unnamed: the same for the second solid, by default as for the first. A plain object has no second colour to name; an
    unnamed colour takes the second colour with it. Of two solids neither the size, which is always small, nor the place is
    named: the first one stands on the left. Nor is a place in the middle.
    """
    skipped = unnamed if beside_unnamed is None else beside_unnamed
    if wrong := {*unnamed, *skipped} - set(NAMED_SHARE):
        raise ValueError(f"caption: unknown attribute {sorted(wrong)}; choose from {', '.join(NAMED_SHARE)}")
    words = _solid(scene, {*unnamed, "size"} if scene.beside else unnamed)
    if scene.beside:
        words += ["and", *_solid(scene.beside, {*skipped, "size"})]
    elif scene.place != "middle" and "place" not in unnamed:
        words += ["on", "the", scene.place]
    if "background" not in unnamed:
        words += ["on", "a", scene.background, "background"]
    return " ".join(words)


def _solid(solid: Solid, unnamed: Collection[str]) -> list[str]:
    words = ["a", *(getattr(solid, field) for field in ("size", "pose", "colour") if field not in unnamed)]
    if solid.texture != "plain" and not {"colour", "second"} & set(unnamed):
        words += ["and", solid.second]
    if "texture" not in unnamed:
        words.append(solid.texture)
    return [*words, solid.shape if "shape" not in unnamed else "object"]


def training_caption(scene: Scene, rng: random.Random) -> str:
    """A caption with attributes dropped at random: see `NAMED_SHARE` and `EMPTY_SHARE`."""
    if rng.random() < EMPTY_SHARE:
        return ""
    return caption(scene, _dropped(rng), _dropped(rng))


def _dropped(rng: random.Random) -> list[str]:
    return [field for field, share in NAMED_SHARE.items() if rng.random() >= share]


def vocabulary() -> list[str]:
    """Every word that captions can hold, each once, in a fixed order."""
    said = (place for place in PLACES if place != "middle")
    return list(dict.fromkeys((*FILLERS, *(word for table in WORDS.values() for word in table), *said)))
