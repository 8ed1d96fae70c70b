"""Edits whose true result is known: the scene is changed in one word, rendered again, and compared with what the edit made.

Both prompts leave some words unnamed, so that only the source can supply them; that is what attention control is for.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.images import to_pil, to_unit
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.tabletop.captions import caption
from easyinv_edit.tabletop.judge import READ, Judge, shown
from easyinv_edit.tabletop.render import render, silhouettes
from easyinv_edit.tabletop.scene import (
    BACKGROUNDS,
    COLOURS,
    POSES,
    SHAPES,
    TEXTURES,
    Scene,
    random_scene,
    replace,
    second_colours,
)
from easyinv_edit.trajectory import Trajectory

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

They are among no defaults, for the embedded model cannot make them: it has seen objects only within 2 of 64 pixels of the
middle. Of the 8 pixels that "move" moves, its objects' centres (8 scenes, T = 25) go 2 where MasaCtrl is given both masks,
which smears them, and 2.5 where the inverted noise itself is moved. They are for models that have seen more.
"""

MOVE = 0.25
"""How far "move" moves, in half picture sides: two cells of the embedded model's latent. The object crosses the middle, so that
the border cuts off a fiftieth of it at most."""

METHODS: dict[str, dict[str, Any]] = {
    "random noise, plain": {"control": "none", "noise_mix": 1.0},
    "inverted, plain": {"control": "none"},
    "inverted, masactrl": {"control": "masactrl"},
}
"""What is compared; keyword arguments of `EditPipeline.edit`."""
BASELINE = "inverted, plain"
INVERTED_TOGETHER = 8
"""Pictures that are inverted in one batch."""


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


@dataclass(frozen=True)
class Outcome:
    """One method on one task.

    psnr, object_psnr: mean dB against the rendered truth, whole picture and inside the true object; gain, spread: mean and
    deviation over scenes of object_psnr less that of `BASELINE` on the same scene; better: share of scenes on which it is above
    that; target: share of pictures in which the judge sees the requested word, NaN where the task has none; kept: the same for
    each word that both prompts leave unnamed, where the truth shows it; silhouette: mean intersection over union of what stands
    out from the ground with what should.
    """

    task: str
    method: str
    psnr: float
    object_psnr: float
    gain: float
    spread: float
    better: float
    target: float
    kept: dict[str, float]
    silhouette: float


def make_case(task: Task, scene: Scene) -> Case | None:
    """The case of a scene, or None where the task cannot be shown on it (a plain object has no texture to keep)."""
    if (pair := (task.change or partial(_changed, task))(scene)) is None:
        return None
    source, truth = pair
    prompts = (caption(each, task.unnamed, task.beside_unnamed if each.beside else None) for each in pair)
    return Case(task, source, truth, *prompts)


def _changed(task: Task, scene: Scene) -> tuple[Scene, Scene] | None:
    """A textured scene and the same with another word, or at another place."""
    if scene.texture == "plain" or (task.field == "pose" and scene.shape in ("ball", "ring")):
        return None
    changed: dict[str, Any] = {task.field: _other(task, scene) if task.sayable else _moved(scene)}
    return scene, replace(scene, **changed)


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


def run_task(
    pipe: EditPipeline,
    judge: Judge,
    cases: Sequence[Case],
    *,
    inversion: str = "easyinv",
    num_inference_steps: int = 25,
    guidance_scale: float = 3.0,
) -> tuple[list[Outcome], Image.Image]:
    """Edit every case with every method; returns the outcomes, bounds included, and a grid of pictures.

    Grid rows: source, true edit, then the methods; one column per case, at most twelve.
    """
    size = pipe.backbone.native_size[0]
    sources, _ = render([case.source for case in cases], size)
    truths, masks = render([case.truth for case in cases], size)
    trajectories = _inverted(pipe, to_pil(sources * 2 - 1), cases, inversion, num_inference_steps)
    made: dict[str, Tensor] = {"source unedited": sources, "autoencoder of the truth": _round_trip(pipe, truths)}
    for method, options in METHODS.items():
        edits = [
            _edit(pipe, t, c, i, guidance_scale, options) for i, (t, c) in enumerate(zip(trajectories, cases, strict=True))
        ]
        made[method] = torch.cat(edits)
    inside = {name: [psnr(a, b, m) for a, b, m in zip(made[name], truths, masks, strict=True)] for name in made}
    outcomes = [_score(name, pictures, cases, truths, masks, inside, judge) for name, pictures in made.items()]
    rows = [sources, truths, *(made[method] for method in METHODS)]
    columns = min(len(cases), 12)
    grid = torch.cat([torch.cat(list(row[:columns]), -1) for row in rows], -2)
    return outcomes, to_pil(grid[None] * 2 - 1)[0]


def _inverted(
    pipe: EditPipeline, pictures: Sequence[Image.Image], cases: Sequence[Case], inversion: str, steps: int
) -> list[Trajectory]:
    pairs = [(picture, case.source_prompt) for picture, case in zip(pictures, cases, strict=True)]
    made: list[Trajectory] = []
    for first in range(0, len(pairs), INVERTED_TOGETHER):
        images, prompts = zip(*pairs[first : first + INVERTED_TOGETHER], strict=True)
        made += pipe.invert_batch(images, prompts, inversion, num_inference_steps=steps)
    return made


def _edit(pipe: EditPipeline, trajectory: Trajectory, case: Case, seed: int, scale: float, options: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    result = pipe.edit(trajectory, case.prompt, guidance_scale=scale, generator=generator, output_type="pt", **options)
    return result.images.float().cpu()


@torch.no_grad()
def _round_trip(pipe: EditPipeline, pictures: Tensor) -> Tensor:
    pixels = pipe.backbone.decode(pipe.backbone.encode(pictures.to(pipe.backbone.device) * 2 - 1))
    return to_unit(pixels.cpu())


def _score(
    name: str,
    pictures: Tensor,
    cases: Sequence[Case],
    truths: Tensor,
    masks: Tensor,
    inside: dict[str, list[float]],
    judge: Judge,
) -> Outcome:
    """inside: per method, the dB inside each case's true object."""
    whole = [psnr(a, b) for a, b in zip(pictures, truths, strict=True)]
    gains = [own - base for own, base in zip(inside[name], inside[BASELINE], strict=True)]
    target: list[float] = []
    kept: dict[str, list[bool]] = {}
    for words, case in zip(judge.read(pictures), cases, strict=True):
        wanted = shown(case.truth)
        target.append(float(words[case.task.field] == wanted[case.task.field]) if case.task.sayable else math.nan)
        for field in case.task.kept:
            if field in wanted:
                kept.setdefault(field, []).append(words[field] == wanted[field])
    return Outcome(
        task=cases[0].task.name,
        method=name,
        psnr=statistics.fmean(whole),
        object_psnr=statistics.fmean(inside[name]),
        gain=statistics.fmean(gains),
        spread=statistics.stdev(gains) if len(gains) > 1 else 0.0,
        better=statistics.fmean(gain > 0 for gain in gains),
        target=statistics.fmean(target),
        kept={field: statistics.fmean(right) for field, right in kept.items()},
        silhouette=_overlap(silhouettes(pictures, [case.truth for case in cases]), masks[:, 0] > 0.5),
    )


def _overlap(a: Tensor, b: Tensor) -> float:
    """Mean intersection over union of masks (B, H, W)."""
    return ((a & b).sum((1, 2)) / (a | b).sum((1, 2))).mean().item()
