"""The items of a benchmark: those of a set on disk, or rendered ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from easyinv_edit.errors import EasyInvWarning
from easyinv_edit.evaluation import coco, datasets, pie_bench, suite
from easyinv_edit.evaluation.benchmark import Benchmark
from easyinv_edit.evaluation.datasets import Item
from easyinv_edit.evaluation.ground_truth import ALL_TASKS


def stored(config: Benchmark) -> tuple[list[Item], list[str]]:
    """The items of a set on disk, and what is odd about the set in words; none for a rendered one.

    Raises InputError with everything that is missing or damaged.
    """
    if config.data.path is None:
        return [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EasyInvWarning)
        found = _read(config, Path(config.data.path))
    return list(found), [str(each.message) for each in caught if issubclass(each.category, EasyInvWarning)]


def _read(config: Benchmark, path: Path) -> Sequence[Item]:
    data = config.data
    if data.set == "coco":
        return coco.load(path, data.count, splits=data.splits or coco.SPLITS, captions=bool(data.captions))
    if data.set == "pie_bench":
        return pie_bench.load(path, data.types, data.count)
    captions = Path(data.captions) if isinstance(data.captions, str) else None
    return (datasets.edits_folder if config.kind == "edits" else datasets.folder)(path, data.count, captions)


def rendered(config: Benchmark, size: int) -> list[Item]:
    """Tabletop scenes, or edits of them task by task. size: side of the square pictures in pixels."""
    data = config.data
    if data.suite is not None:
        return list(suite.items(size, data.tasks, data.count, suite.SUITES[data.suite]))
    assert data.count is not None
    if data.set == "tabletop":
        return datasets.scenes(data.first_seed, data.count, size)
    tasks = [ALL_TASKS[name] for name in dict.fromkeys(data.tasks or ALL_TASKS)]
    return [item for task in tasks for item in datasets.tabletop_edits(task, data.first_seed, data.count, size)]
