"""Edits of the wider world, whose solids stand at places of their own or in pairs: each is what some controller is for.

Every case comes from a scene of `random_table`; the rendered truth is the scene with the change, as in `ground_truth`.
"""

from __future__ import annotations

import dataclasses

from easyinv_edit.evaluation.ground_truth import Task, colour_apart
from easyinv_edit.tabletop.judge import OF_SOLIDS
from easyinv_edit.tabletop.scene import PLACES, SHAPES, TEXTURES, Scene, middle, random_table, replace, standing

Pair = tuple[Scene, Scene] | None
LOOK = ("texture", "colour", "second")
BESIDE = tuple(f"beside {field}" for field in OF_SOLIDS)


def _two(scene: Scene) -> bool:
    """Whether two textured solids of different shapes stand there, so that words tell them apart."""
    beside = scene.beside
    return beside is not None and scene.shape != beside.shape and "plain" not in (scene.texture, beside.texture)


def _reshaped(scene: Scene) -> Pair:
    """The solid on the left gets a shape that is not there yet: the first from half way round the table on."""
    if not _two(scene):
        return None
    start = SHAPES.index(scene.shape) + len(SHAPES) // 2
    there = {solid.shape for solid in scene.solids}
    free = (SHAPES[(start + i) % len(SHAPES)] for i in range(len(SHAPES)))
    return scene, standing(replace(scene, shape=next(shape for shape in free if shape not in there)), middle(scene))


def _recoloured(scene: Scene) -> Pair:
    """The solid on the left gets a colour clearly apart from its old one and its second one."""
    return (scene, replace(scene, colour=colour_apart(scene))) if _two(scene) else None


def _joined(scene: Scene) -> Pair:
    """The second solid comes to stand beside the first."""
    return (replace(scene, beside=None), scene) if _two(scene) else None


def _repainted(scene: Scene) -> Pair:
    """A solid alone gets another texture in another colour, and keeps its layout."""
    if scene.beside or scene.texture == "plain":
        return None
    patterns = [texture for texture in TEXTURES if texture != "plain"]
    texture = patterns[(patterns.index(scene.texture) + 1) % len(patterns)]
    return scene, replace(scene, texture=texture, colour=colour_apart(scene))


def _moved(scene: Scene) -> Pair:
    """A solid at one side goes to the other."""
    if scene.beside or scene.texture == "plain" or scene.place == "middle":
        return None
    other = "left" if scene.place == "right" else "right"
    return scene, standing(replace(scene, place=other), PLACES[other])


def _dressed(truth: Scene) -> Scene:
    """Another solid with the true result's look, upright in the middle."""
    shape = SHAPES[(SHAPES.index(truth.shape) + 1) % len(SHAPES)]
    return standing(replace(truth, shape=shape, pose="upright", size="medium", place="middle"), PLACES["middle"])


_TASKS = (
    Task("swap shape", "shape", (), (*LOOK, "pose", *BESIDE), change=_reshaped),
    Task("swap colour", "colour", (), ("shape", "texture", "second", "pose", *BESIDE), change=_recoloured),
    Task("one of two", "shape", LOOK, (*LOOK, *BESIDE), change=_reshaped),
    Task("add", "beside shape", LOOK, (*LOOK, "shape", "pose"), change=_joined, beside_unnamed=(), edited=(None, 1)),
    Task(
        "repaint", "texture", ("size", "pose"), ("shape", "size", "pose", "second", "place"), change=_repainted, style=_dressed
    ),
    Task("move", "place", LOOK, (*LOOK, "shape", "size", "pose"), change=_moved),
)

COMPANY: dict[str, Task] = {task.name: dataclasses.replace(task, scenes=random_table) for task in _TASKS}
"""By name. "swap shape" and "swap colour" name everything and change a word, for Prompt-to-Prompt; "one of two" leaves both
looks unsaid, so that one solid is to change and the other to stay, for masks; "add" puts a described solid beside one whose
look is unsaid, for ObjectAdd; "repaint" keeps an unsaid size and pose under another look, for controllers of layout; "move"
changes the word of the place."""
