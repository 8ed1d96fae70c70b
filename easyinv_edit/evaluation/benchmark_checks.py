"""What can be wrong with a benchmark's configuration: everything at once, each with the key it is about."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from attention_control import CONTROLLERS
from easyinv_edit import recipe
from easyinv_edit.choices import nearest, plain, shown
from easyinv_edit.evaluation import columns, variants
from easyinv_edit.evaluation.benchmark import FORBID, Benchmark, Data, Published, flat
from easyinv_edit.evaluation.coco import SPLITS
from easyinv_edit.evaluation.ground_truth import ALL_TASKS
from easyinv_edit.evaluation.pie_bench import TYPES
from easyinv_edit.evaluation.suite import SUITES
from easyinv_edit.evaluation.weights import LPIPSFiles, Weights
from easyinv_edit.inversion import INVERSIONS
from easyinv_edit.models import OVERRIDES
from easyinv_edit.recipe import Steps

Problem = tuple[tuple[str, ...], str]
"""(key path, what is wrong)."""


def checked(content: Mapping[str, Any]) -> tuple[Benchmark | None, list[Problem]]:
    """The benchmark that keys and values make, or everything that is wrong with them."""
    given = _written_out(content)
    found = list(_wrong_methods(given))
    if isinstance(given.get("protocol"), Mapping):
        given["protocol"] = _written_out(given["protocol"])
        found += [(("protocol", *path), problem) for path, problem in _wrong_methods(given["protocol"])]
    try:
        made = TypeAdapter(Benchmark).validate_python(given)
    except ValidationError as error:
        told = {path[:2] for path, _ in found}
        return None, found + [item for item in _wrong_types(error) if item[0][:2] not in told]
    sound = not found
    for check in (_wrong_data, _wrong_columns, _wrong_others, *([_wrong_lines] if sound else [])):
        found += check(made)
    return (None if found else made), found


LISTS = ("inversions", "controls", "num_inference_steps", "dtypes", "metrics")


def _written_out(content: Mapping[str, Any]) -> dict[str, Any]:
    """One for a list of one, and a name for a mapping with nothing but that name."""
    given = dict(content)
    for key in LISTS:
        if key in given and not isinstance(given[key], list):
            given[key] = [given[key]]
    for key in ("inversions", "controls"):
        if key in given:
            given[key] = [{"name": each} if isinstance(each, str) else each for each in given[key]]
    return given


def _wrong_types(error: ValidationError) -> Iterator[Problem]:
    """pydantic's errors by key; of several for one key, the first."""
    seen: set[tuple[str, ...]] = set()
    for item in error.errors(include_url=False):
        path = tuple(str(part) for part in item["loc"] if part != "[key]")
        path = (
            path[:2] if path[0] in ("dtypes", "schedule", "num_inference_steps") or path[:2] == ("data", "captions") else path
        )
        if path in seen:
            continue
        seen.add(path)
        if item["type"] == "unexpected_keyword_argument":
            allowed = _fields(path[:-1])
            yield path, f"unknown key{nearest(path[-1], allowed)}; allowed: {', '.join(allowed)}"
        else:
            yield path, "is missing" if item["type"].startswith("missing") else plain(item)


def _fields(path: Sequence[str]) -> list[str]:
    """The keys that are allowed below a path."""
    below: dict[str, Any] = {"data": Data, "published": Published, "weights": LPIPSFiles if len(path) > 1 else Weights}
    return [f.name for f in dataclasses.fields(below[path[0]] if path else Benchmark)]


@dataclass(frozen=True, config=FORBID)
class _InversionKeys:
    label: str | None = None
    num_inference_steps: Steps | None = None
    pin_source: bool | None = None


@dataclass(frozen=True, config=FORBID)
class _ControlKeys:
    label: str | None = None
    source_prompt: str | None = None
    tasks: list[str] | None = None


def _wrong_methods(given: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with inversions and controls, their settings and the keys beside these."""
    for key, registry, known, extra in (
        ("inversions", INVERSIONS, INVERSIONS, _InversionKeys),
        ("controls", CONTROLLERS, variants.NAMED, _ControlKeys),
    ):
        for number, entry in enumerate(given.get(key) or ()):
            path = (key, str(number))
            if not isinstance(entry, dict):
                yield path, f"should be a name, or a mapping of name and settings (got {shown(entry)})"
            elif (settings := _settings(key, entry)).get("name") not in registry:
                name = entry.get("name")
                yield path, f"{shown(name)} is unknown; choose {'; '.join(known)}{nearest(name, known)}"
            else:
                yield from (((*path, *below), problem) for below, problem in recipe.method_problems(settings, registry))
                yield from (((*path, *below), problem) for below, problem in _wrong_keys(entry, extra))


EXAMPLES = {
    variants.SOURCE_WORD: "word",
    variants.TARGET_WORD: "word",
    variants.SOURCE_MASK: "mask.png",
    variants.TARGET_MASK: "mask.png",
    variants.TARGET_BOX: (0.0, 0.0, 1.0, 1.0),
}
"""For a check of settings, before there is an item to fill them."""


def _settings(key: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a method, with examples where an item's words and masks will stand."""
    if key == "inversions":
        return variants.without(entry, variants.INVERSION_KEYS)
    return variants.filled(variants.controller_of(entry), EXAMPLES)


def _wrong_keys(entry: Mapping[str, Any], extra: type[Any]) -> Iterator[Problem]:
    names = [f.name for f in dataclasses.fields(extra)]
    try:
        TypeAdapter(extra).validate_python({name: entry[name] for name in names if name in entry})
    except ValidationError as error:
        yield from (((str(item["loc"][0]),), plain(item)) for item in error.errors(include_url=False))


USED = {
    "tabletop": ("count", "first_seed"),
    "tabletop_edits": ("count", "first_seed", "suite", "tasks"),
    "folder": ("path", "count", "captions"),
    "coco": ("path", "count", "captions", "splits"),
    "pie_bench": ("path", "count", "types"),
}
"""Keys of `data` that each set reads."""
EDITS = ("tabletop_edits", "folder", "pie_bench")
"""Sets with target prompts."""
REMEDIES = {
    "tabletop": "say how many scenes to render",
    "tabletop_edits": "say how many scenes to render for each task",
    "folder": "give the folder with the pictures",
    "coco": "give the folder that holds val2017 and test2017",
    "pie_bench": "give the folder that holds mapping_file.json",
}


def _wrong_data(made: Benchmark) -> Iterator[Problem]:
    """Keys that the set does not read, keys it needs, and names that it does not know."""
    data, plain_data = made.data, Data()
    used = USED[data.set]
    for key in (f.name for f in dataclasses.fields(Data)):
        if key not in ("set", *used) and getattr(data, key) not in (getattr(plain_data, key), None):
            yield ("data", key), f"is not used by {data.set}, whose keys are {', '.join(used)}; leave it out"
    needed = "path" if "path" in used else "count"
    if getattr(data, needed) is None and data.suite is None:
        yield ("data", needed), f"is missing; {REMEDIES[data.set]}"
    yield from _wrong_suite(data)
    tasks = list(SUITES[data.suite].parts if data.suite in SUITES else ALL_TASKS)
    parts: tuple[tuple[str, Sequence[str]], ...] = (("tasks", tasks), ("types", list(TYPES)), ("splits", SPLITS))
    for key, known in parts:
        for part in getattr(data, key):
            if part not in known:
                yield ("data", key), f"{part!r} is unknown; choose {', '.join(known)}{nearest(part, known)}"
    wanted = bool if data.set == "coco" else str
    if data.captions is not None and "captions" in used and not isinstance(data.captions, wanted):
        yield ("data", "captions"), "should be true or false" if wanted is bool else "should be the path of a captions file"
    if made.kind == "edits" and data.set not in EDITS:
        yield ("data", "set"), f"{data.set} has no target prompts; edits can be made of {', '.join(EDITS)}"


def _wrong_suite(data: Data) -> Iterator[Problem]:
    """A version that there is not, and keys that do not go with one."""
    if data.suite is None or data.set != "tabletop_edits":
        return
    if data.suite not in SUITES:
        yield ("data", "suite"), f"{data.suite!r} is no version; choose {', '.join(SUITES)}"
    elif data.count is not None and data.count > SUITES[data.suite].count:
        yield ("data", "count"), f"suite {data.suite} has {SUITES[data.suite].count} cases of each task (got {data.count})"
    if data.first_seed != Data().first_seed:
        yield ("data", "first_seed"), "a suite has scenes of its own; leave one of them out"


def _wrong_columns(made: Benchmark) -> Iterator[Problem]:
    """Metrics and published columns that are none of this kind's."""
    known = [name for name, column in columns.COLUMNS.items() if made.kind in column.kinds]
    for number, name in enumerate(made.metrics):
        if name not in known:
            yield (
                ("metrics", str(number)),
                f"{name!r} is no column of kind {made.kind}{nearest(name, known)}; choose {'; '.join(known)}",
            )
    for number, row in enumerate(made.published):
        for title in row.values:
            if columns.plain_name(title) not in known:
                yield ("published", str(number), "values"), f"{title!r} is no column of kind {made.kind}{nearest(title, known)}"


def _wrong_lines(made: Benchmark) -> Iterator[Problem]:
    """Nothing to compare, two lines of one name, and too few steps for a method."""
    if not made.inversions:
        yield ("inversions",), f"the list is empty; choose from {', '.join(INVERSIONS)}"
    if made.kind == "edits" and not made.controls:
        yield ("controls",), f"the list is empty; choose from {'; '.join(variants.CONTROLS)}"
    if made.kind == "inversion" and made.controls:
        yield ("controls",), "is of edits; leave it out where inversions are measured"
    if made.kind == "edits" and made.batch > 1:
        yield ("batch",), "edits are made one at a time; leave it out"
    try:
        lines = variants.variants(made)
    except ValueError as error:
        yield ("inversions",), str(error)  # settings that do not go with the guidance scale
        return
    labels = [line.label for line in lines]
    for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
        key = "inversions" if made.kind == "inversion" else "controls"
        yield (key,), f"two lines are called {label!r}; give one of them a label, or leave it out"
    yield from dict.fromkeys(problem for line in lines if (problem := _too_few(line)))


def _too_few(line: variants.Variant) -> Problem | None:
    fewest = getattr(line.method, "fewest_steps", 1)
    if line.steps is None or line.steps >= fewest:
        return None
    return ("num_inference_steps",), f"{line.inversion} needs at least {fewest} steps (got {line.steps}); leave one of them out"


def _wrong_others(made: Benchmark) -> Iterator[Problem]:
    """Keys of the schedule and of the protocol that do not exist."""
    for key in made.schedule:
        if key not in OVERRIDES:
            yield ("schedule", key), f"unknown key{nearest(key, OVERRIDES)}; allowed: {', '.join(OVERRIDES)}"
    known = dict(flat(made.request()))
    for key, _ in flat(made.protocol):
        if key not in known:
            yield ("protocol", *key.split(".")), f"is no key of a benchmark{nearest(key, known)}"
