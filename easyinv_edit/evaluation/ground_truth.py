"""Edits whose true result is known: the scene is changed in one word, rendered again, and compared with what the edit made.

Both prompts leave some words unnamed, so that only the source can supply them; that is what attention control is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from easyinv_edit.tabletop.captions import caption
from easyinv_edit.tabletop.judge import READ
from easyinv_edit.tabletop.scene import (
    BACKGROUNDS,
    COLOURS,
    POSES,
    SHAPES,
    TEXTURES,
    Scene,
    middle,
    random_scene,
    replace,
    second_colours,
    standing,
)

Change: TypeAlias = Callable[[Scene], tuple[Scene, Scene] | None]
"""Source and true result that a random scene gives; None where the edit cannot be shown on it."""


@dataclass(frozen=True)
class Task:
    """One kind of edit.

    field: what changes and a judge reads (of `judge.READ`; "offset" is read by none); unnamed: what both prompts leave unsaid,
    of a second solid too unless beside_unnamed says otherwise; kept: what, besides, a good edit keeps; apart: whether a new
    colour is never a look-alike of the old one; change: makes source and truth, by default another word for the field;
    scenes: makes the scene of a seed; edited: which solids are edited, by their place in source and truth (None: not there);
    style: makes, from the truth, another scene with the look that the edit asks for, for controllers that read two pictures.
    """

    name: str
    field: str
    unnamed: tuple[str, ...]
    kept: tuple[str, ...]
    apart: bool = False
    change: Change | None = None
    beside_unnamed: tuple[str, ...] | None = None
    scenes: Callable[[int], Scene] = random_scene
    edited: tuple[int | None, int] = (0, 0)
    style: Callable[[Scene], Scene] | None = None

    @property
    def sayable(self) -> bool:
        """Whether captions have words for what changes; else both prompts are the same."""
        return self.field in READ


TASKS: tuple[Task, ...] = (
    Task("shape", "shape", ("texture", "colour", "second"), ("texture", "colour", "second")),
    Task("size", "size", ("texture", "colour", "second"), ("texture", "colour", "second", "shape")),
    Task("turn", "pose", ("texture", "colour", "second"), ("texture", "colour", "second", "shape")),
    Task("colour", "colour", ("texture", "second"), ("texture", "shape")),
)

ALL_TASKS: dict[str, Task] = {
    **{task.name: task for task in TASKS},
    "background": Task(
        "background", "background", ("texture", "colour", "second"), ("texture", "colour", "second", "shape", "size", "pose")
    ),
    "texture": Task("texture", "texture", ("size", "pose", "colour", "second"), ("size", "pose", "colour", "second", "shape")),
}
"""With the edits that no controller of the main comparison is for. "texture" names the two textures, the shape and the
background: both colours, and how large and how tilted the object is, stand in the source alone. In a fifth of the "colour"
edits the new colour is a look-alike of the old one; they stay because numbers of them are published, see `APART`."""

APART = Task("colour", "colour", ("texture", "second"), ("texture", "shape"), apart=True)
"""Colour edits whose new colour is clearly another one."""

UNSAYABLE: dict[str, Task] = {
    "move": Task("move", "offset", ("texture", "colour", "second"), ("texture", "colour", "second", "shape", "size", "pose")),
}
"""Edits whose captions do not say them, as their scenes are older than words for places: both prompts are the same, and only
masks (`suite.masks`) tell where the object goes.

They are among no defaults, for the embedded model has seen objects in the middle or at the places that its words name, never in
between; "move" of `company.COMPANY` is the one that it can be asked for.
"""

MOVE = 0.25
"""How far "move" moves, in half picture sides: two cells of the embedded model's latent. The object crosses the middle, so that
the border cuts off a fiftieth of it at most."""


@dataclass(frozen=True)
class Case:
    """One scene, its edited truth, and both prompts."""

    task: Task
    source: Scene
    truth: Scene
    source_prompt: str
    prompt: str

    @property
    def words(self) -> tuple[str, str]:
        """The edited solid's shape in the source and in the truth; of one that is new, its shape twice."""
        before, after = self.task.edited
        new = self.truth.solids[after].shape
        return (new if before is None else self.source.solids[before].shape), new

    @property
    def style(self) -> Scene | None:
        """The scene whose look the edit asks for, where the task has one."""
        return None if self.task.style is None else self.task.style(self.truth)


OUTLINE = ("shape", "size", "pose")
"""What moves a solid's outline about its body."""


def make_case(task: Task, scene: Scene) -> Case | None:
    """The case of a scene, or None where the task cannot be shown on it (a plain object has no texture to keep)."""
    if (pair := (task.change or partial(changed, task))(scene)) is None:
        return None
    source, truth = pair
    prompts = (caption(each, task.unnamed, task.beside_unnamed if each.beside else None) for each in pair)
    return Case(task, source, truth, *prompts)


def changed(task: Task, scene: Scene, by_outline: bool = True) -> tuple[Scene, Scene] | None:
    """A textured scene and the same with another word, or at another place; None where the scene cannot show it. by_outline:
    whether it is the middle of the outline that stays where it is, or of the body."""
    if scene.texture == "plain" or (task.field == "pose" and scene.shape in ("ball", "ring")):
        return None
    word: dict[str, Any] = {task.field: _other(task, scene) if task.sayable else _moved(scene)}
    truth = replace(scene, **word)
    return scene, standing(truth, middle(scene)) if by_outline and task.field in OUTLINE else truth


def _other(task: Task, scene: Scene) -> str:
    """Another word for the attribute, chosen without chance: the one half way round its table."""
    if task.field == "size":
        return "large" if scene.size != "large" else "small"
    if task.field == "colour":
        return colour_apart(scene) if task.apart else _colour(scene)
    patterns = tuple(texture for texture in TEXTURES if texture != "plain")  # a plain object would not show its second colour
    tables = {"shape": SHAPES, "pose": tuple(POSES), "background": tuple(BACKGROUNDS), "texture": patterns}
    words = tables[task.field]
    return words[(words.index(getattr(scene, task.field)) + len(words) // 2) % len(words)]


def _colour(scene: Scene) -> str:
    """The middle one of the colours that stay distinguishable beside the second colour."""
    words = [c for c in COLOURS if c != scene.colour and scene.second in second_colours(c)]
    return words[len(words) // 2]


def colour_apart(scene: Scene) -> str:
    """The first from half way round the table on that is no look-alike of the old colour nor of the second one."""
    words = tuple(COLOURS)
    start = words.index(scene.colour) + len(words) // 2
    allowed = [c for c in second_colours(scene.colour) if c in COLOURS and scene.second in second_colours(c)]
    return next(c for i in range(len(words)) if (c := words[(start + i) % len(words)]) in allowed)


def _moved(scene: Scene) -> float:
    """The offset after a move across the middle."""
    return scene.offset + (MOVE if scene.offset <= 0 else -MOVE)


def make_cases(task: Task, scenes: Sequence[Scene], count: int) -> list[Case]:
    """The first `count` cases that a task finds among scenes."""
    return [case for scene in scenes if (case := make_case(task, scene)) is not None][:count]
