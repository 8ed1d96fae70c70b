"""The tabletop suite: edits with a rendered right answer that stay the same for good.

A version is never changed: what would change its cases makes a new one. Version 1 is what this package's first numbers were
measured on (`bench edits --scenes 24`, which draws other scenes today); a fifth of its colour edits go to a look-alike.
Version 2 has clear colour edits, texture edits, more scenes, and for each task scenes of its own. Version 3 has what the
controllers of the wider world are for, `company.COMPANY`, besides, whose "move" says the place in words; it is of
`random_scene`, the others are of `early_scene`. It is final from its first release on: until then its scenes, and with them its
digest, follow the world that the embedded model is trained on, as the changelog says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from easyinv_edit.choices import nearest
from easyinv_edit.errors import EasyInvError, InputError
from easyinv_edit.evaluation.company import COMPANY
from easyinv_edit.evaluation.datasets import TabletopEdit, tabletop_edits
from easyinv_edit.evaluation.ground_truth import ALL_TASKS, APART, UNSAYABLE, Case, Task, changed, make_case
from easyinv_edit.evaluation.set_files import check_count
from easyinv_edit.tabletop import judge as judging
from easyinv_edit.tabletop.judge import Judge
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import BACKGROUNDS, COLOURS, POSES, SECOND_COLOURS, SIZES, early_scene

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """The cases of one task: of the first scenes from a seed on that it can be shown on."""

    task: Task
    first_seed: int


@dataclass(frozen=True)
class Suite:
    """A fixed set of edits. version: its name; parts: by the task's name; count: cases of each task; digest: what `digest`
    gives for it, in hexadecimal digits."""

    version: str
    parts: Mapping[str, Part]
    count: int
    digest: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that prompts can ask for: those that are meant where none are named."""
        return tuple(name for name, part in self.parts.items() if part.task.sayable)


FIRST_SEED = 26_000_000
"""Scenes of the suite from version 2 on: neither trained on nor used by any other evaluation."""


def _early(task: Task) -> Task:
    """On the scenes that the embedded model's version 1 knew, where a new shape stands about the old one's body."""
    return replace(task, scenes=early_scene, change=partial(changed, task, by_outline=False))


_FIRST = {name: _early(task) for name, task in ALL_TASKS.items() if name != "texture"}
_SECOND = {name: _early(task) for name, task in {**ALL_TASKS, "colour": APART, **UNSAYABLE}.items()}
_THIRD = {**ALL_TASKS, "colour": APART, **COMPANY}

SUITES: dict[str, Suite] = {
    "1": Suite(
        version="1",
        parts={name: Part(task, 24_000_000) for name, task in _FIRST.items()},
        count=24,
        digest="1d422dcb747fac83e69a7b2de60ad4792fa5e141046afc6be4ff5fbaa74c4df9",
    ),
    "2": Suite(
        version="2",
        parts={name: Part(task, FIRST_SEED + 1000 * i) for i, (name, task) in enumerate(_SECOND.items())},
        count=32,
        digest="16d538b4ced5c751a46d02e0464966d23f8fb1f8c31bcf7061d2cbc49ea3d25a",
    ),
    "3": Suite(
        version="3",
        parts={name: Part(task, FIRST_SEED + 100_000 + 1000 * i) for i, (name, task) in enumerate(_THIRD.items())},
        count=32,
        digest="a11859ac43e6a673c19cd0b61037d37781fd371bd5869807d85db8b4737b88e2",
    ),
}
"""Every version, the latest last."""
SUITE = SUITES["3"]


def cases(tasks: Iterable[str] = (), count: int | None = None, suite: Suite = SUITE) -> list[Case]:
    """The cases of some tasks, one task after the other, with both prompts.

    tasks: names, none for those that prompts can ask for; count: the first ones of each task, by default all. Raises InputError
    on an unknown task or a count that there is not, EasyInvError where the cases are no longer those of this version.
    """
    return [case for part, number in _chosen(tasks, count, suite) for _, case in _found(part, number)]


def items(size: int, tasks: Iterable[str] = (), count: int | None = None, suite: Suite = SUITE) -> list[TabletopEdit]:
    """The same cases as a benchmark's items, rendered when they are asked for. size: side of the square pictures in pixels."""
    chosen = _chosen(tasks, count, suite)
    return [item for part, number in chosen for item in tabletop_edits(part.task, part.first_seed, number, size)]


def masks(cases: Sequence[Case], size: int) -> tuple[Tensor, Tensor]:
    """Where the object is before and after each edit: two (n, 1, size, size) of coverage in [0, 1]; size: side in pixels."""
    return render([case.source for case in cases], size)[1], render([case.truth for case in cases], size)[1]


def judge_accuracy(judge: Judge, cases: Sequence[Case], size: int) -> dict[str, float]:
    """Share of right words that a judge reads per attribute off the true results themselves: the most that prompt accuracy can
    mean. An attribute that no picture can show is left out."""
    truths = [case.truth for case in cases]
    return judging.accuracy(judge, render(truths, size)[0], truths)


def manifest(suite: Suite = SUITE) -> list[dict[str, Any]]:
    """Everything that decides the cases, JSON-able, a mapping each: task, kept, seed, source, truth, source_prompt, prompt."""
    return [
        {**_mapping(case), "task": name, "kept": part.task.kept, "seed": seed}
        for name, part in suite.parts.items()
        for seed, case in _found(part, suite.count)
    ]


def _mapping(case: Case) -> dict[str, Any]:
    """Scenes without what they do not have: versions are older than places and second solids."""
    older = {"place": "middle", "beside": None}
    scenes = {
        key: {k: v for k, v in asdict(getattr(case, key)).items() if k not in older or v != older[k]}
        for key in ("source", "truth")
    }
    return {**asdict(case), **scenes}


def digest(suite: Suite) -> str:
    """SHA-256 of the manifest and of the numbers its words stand for; the renderer itself is held by a test on its pictures."""
    meaning = {"sizes": SIZES, "poses": POSES, "colours": COLOURS, "second": SECOND_COLOURS, "backgrounds": BACKGROUNDS}
    content = json.dumps([manifest(suite), meaning], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _found(part: Part, count: int) -> Iterator[tuple[int, Case]]:
    """(seed, case) of the first `count` cases."""
    tried = ((seed, make_case(part.task, part.task.scenes(seed))) for seed in itertools.count(part.first_seed))
    return itertools.islice(((seed, case) for seed, case in tried if case is not None), count)


def _chosen(tasks: Iterable[str], count: int | None, suite: Suite) -> list[tuple[Part, int]]:
    """The parts that are asked for and how many cases of each."""
    check_count(count)
    if digest(suite) != suite.digest:
        raise EasyInvError(f"suite {suite.version}: its scenes or captions have changed; give what they are now a new version")
    names = tuple(dict.fromkeys(tasks)) or suite.tasks
    for name in names:
        if name not in suite.parts:
            known = f"choose from {', '.join(suite.parts)}{nearest(name, suite.parts)}"
            raise InputError(f"{name!r} is no task of suite {suite.version}; {known}")
    if count is not None and count > suite.count:
        raise InputError(f"count is {count}; suite {suite.version} has {suite.count} cases of each task")
    return [(suite.parts[name], count or suite.count) for name in names]
