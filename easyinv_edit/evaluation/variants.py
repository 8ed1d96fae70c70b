"""What a benchmark compares: inversions at their numbers of steps, in their dtypes, under their controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attention_control import CONTROLLERS
from easyinv_edit.choices import build, describe
from easyinv_edit.evaluation.datasets import EditItem, Item
from easyinv_edit.inversion import INVERSIONS, InversionMethod

if TYPE_CHECKING:
    from easyinv_edit.evaluation.benchmark import Benchmark

CEILING = "autoencoder alone"
BASELINE = "none"
"""The control that the others' gains are against."""
SOURCE_WORD, TARGET_WORD = "{source_word}", "{target_word}"
SOURCE_MASK, TARGET_MASK = "{source_mask}", "{target_mask}"
TARGET_BOX = "{target_box}"
STANDINS = (SOURCE_WORD, TARGET_WORD, SOURCE_MASK, TARGET_MASK, TARGET_BOX)
"""Stand in a control's settings for the item's own words, masks and box; a setting is left out where the item has none."""
INVERSION_KEYS = ("label", "num_inference_steps", "pin_source")
"""Keys of an inversion in a configuration that are not the method's settings."""
CONTROL_KEYS = ("label", "source_prompt", "tasks")
"""Keys of a control that are not the controller's settings."""

CONTROLS: dict[str, Mapping[str, Any]] = {
    **{name: {"name": name} for name, c in CONTROLLERS.items() if not hasattr(c, "example") and not hasattr(c, "sources")},
    "masactrl, union .7": {"name": "masactrl", "strength": 0.7},
    "masactrl, words": {
        "name": "masactrl",
        "source_words": SOURCE_WORD,
        "target_words": TARGET_WORD,
        "mask_threshold": 0.25,
    },
    "structure, all sites": {"name": "structure", "sites": "0-"},
    "masactrl, masks": {"name": "masactrl", "source_mask": SOURCE_MASK, "target_mask": TARGET_MASK},
    "prompt_to_prompt, blend": {
        "name": "prompt_to_prompt",
        "blend_source": SOURCE_WORD,
        "blend_target": TARGET_WORD,
        "blend_threshold": 0.45,
    },
}
"""What edits are compared under, by the name in tables: every registered controller that needs no second picture, box or list,
with its defaults, and some with settings. The embedded model's cross-attention is diffuse, so the thresholds on its maps are
above the papers'; its layout is held by its 16 x 16 maps, which `structure`'s default sites leave out."""
ON_REQUEST: dict[str, Mapping[str, Any]] = {
    "object_add": {"name": "object_add", "word": TARGET_WORD, "box": TARGET_BOX},
    "portrait": {"name": "portrait"},
}
"""Further names, of controllers that need what only some items have: something to add, or a second picture."""
NAMED = {**CONTROLS, **ON_REQUEST}


@dataclass(frozen=True)
class Variant:
    """One line of the tables. label: the line's name; inversion: the inversion's; method: itself, None for the autoencoder's
    round trip; steps: T; pinned: whether edits overwrite the source; control: the control's name, and settings: the controller
    with its settings, None where nothing is edited; source_prompt: takes the place of the items' own where it is not None;
    tasks: the groups of items it is for, none for all."""

    label: str
    inversion: str
    method: InversionMethod | None
    steps: int | None
    dtype: str
    pinned: bool = True
    control: str | None = None
    settings: Mapping[str, Any] | None = None
    source_prompt: str | None = None
    tasks: tuple[str, ...] = ()

    def suits(self, items: Iterable[Item]) -> bool:
        """Whether these items are among those it is for."""
        return not self.tasks or all(item.group in self.tasks for item in items)

    def facts(self) -> dict[str, Any]:
        """What a row of results says of its variant."""
        known: dict[str, Any] = {"variant": self.label, "dtype": self.dtype}
        if self.method is not None:
            known |= {"inversion": self.inversion, "steps": self.steps, "settings": describe(self.method)}
        if self.control is not None:
            known |= {"control": self.control, "pin_source": self.pinned}
        return known

    def controller(self, item: EditItem) -> dict[str, Any]:
        """The controller and its settings for one item."""
        settings = self.settings or {}
        return filled(settings, known_of(item)) if _mentioned(settings) else dict(settings)


def variants(config: Benchmark) -> list[Variant]:
    """Every line of the tables in their order; the autoencoder alone is each dtype's first where inversions are measured."""
    several = len(config.dtypes) > 1, len(set(steps_of(config))) > 1
    made = []
    for dtype in config.dtypes:
        if config.kind == "inversion":
            made.append(Variant(f"{CEILING}, {dtype}" if several[0] else CEILING, CEILING, None, None, dtype))
        for entry, steps in _by_steps(config):
            name, method = inversion_label(entry), inversion_of(entry, config.guidance_scale)
            label = ", ".join([name, *([dtype] if several[0] else []), *([f"T={steps}"] if several[1] else [])])
            one = Variant(label, name, method, steps, dtype, bool(entry.get("pin_source", config.pin_source)))
            made += [_controlled(one, control) for control in config.controls] if config.kind == "edits" else [one]
    return made


def _controlled(one: Variant, choice: Mapping[str, Any]) -> Variant:
    """The variant under a control."""
    name = control_label(choice)
    prompt, label = choice.get("source_prompt"), f"{one.label} + {name}"
    one = dataclasses.replace(one, source_prompt=prompt, tasks=tuple(choice.get("tasks") or ()))
    return dataclasses.replace(one, label=label, control=name, settings=controller_of(choice))


def _by_steps(config: Benchmark) -> list[tuple[Mapping[str, Any], int]]:
    """Inversions with their number of steps, those of one T together; one with a number of its own comes once."""
    found: list[tuple[Mapping[str, Any], int]] = []
    for number, steps in enumerate(config.num_inference_steps):
        for entry in config.inversions:
            own = entry.get("num_inference_steps")
            if own is None or number == 0:
                found.append((entry, steps if own is None else own))
    return found


def steps_of(config: Benchmark) -> list[int]:
    """T of every line."""
    return [steps for _, steps in _by_steps(config)]


def groups(lines: Sequence[Variant]) -> list[list[Variant]]:
    """Lines that share an inversion, which is then made once for all of them."""
    found: dict[str, list[Variant]] = {}
    for line in lines:
        method = "" if line.method is None else str(describe(line.method))
        found.setdefault(str((method, line.steps, line.dtype, line.source_prompt)), []).append(line)
    return list(found.values())


def inversion_of(entry: Mapping[str, Any], guidance: float) -> InversionMethod:
    """An inversion of a configuration; one that fits itself to the edit's guidance scale is told it."""
    settings = without(entry, INVERSION_KEYS)
    kind = INVERSIONS.get(str(entry["name"]))
    fields = {f.name for f in dataclasses.fields(kind)} if kind else set()  # type: ignore[arg-type]
    if "guidance_scale" in fields:
        settings = {"guidance_scale": guidance, **settings}
    method: InversionMethod = build(INVERSIONS, settings, "inversion method")
    return method


def controller_of(choice: Mapping[str, Any]) -> Mapping[str, Any]:
    """The controller of a configuration's control: of `CONTROLS` where nothing but its name is given."""
    given = without(choice, CONTROL_KEYS)
    return NAMED.get(given["name"], given) if len(given) == 1 and "name" in given else given


def inversion_label(entry: Mapping[str, Any]) -> str:
    """What tables call an inversion."""
    return str(entry.get("label") or _named(without(entry, INVERSION_KEYS)))


def control_label(choice: Mapping[str, Any]) -> str:
    """What tables call a control."""
    return str(choice.get("label") or _named(without(choice, CONTROL_KEYS)))


def _named(settings: Mapping[str, Any]) -> str:
    """The name, and the settings that are given."""
    return ", ".join([str(settings.get("name")), *(f"{key}={value}" for key, value in settings.items() if key != "name")])


def without(given: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A mapping less some of its keys."""
    return {key: value for key, value in given.items() if key not in tuple(keys)}


def known_of(item: EditItem) -> dict[str, Any]:
    """What an item puts in place of `STANDINS`."""
    words = {} if item.words is None else dict(zip((SOURCE_WORD, TARGET_WORD), item.words, strict=True))
    masks = {} if item.masks is None else dict(zip((SOURCE_MASK, TARGET_MASK), item.masks, strict=True))
    return {**words, **masks, **({} if item.box is None else {TARGET_BOX: item.box})}


def filled(settings: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with what is known in place of `STANDINS`, less those that need more; a mask is a setting's whole value."""
    return {key: _replaced(value, known) for key, value in settings.items() if _mentioned(value) <= known.keys()}


def _mentioned(value: Any) -> set[str]:
    """The stand-ins that a setting holds."""
    if isinstance(value, Mapping):
        return {name for pair in value.items() for part in pair for name in _mentioned(part)}
    if isinstance(value, list | tuple):
        return {name for part in value for name in _mentioned(part)}
    return {name for name in STANDINS if name in value} if isinstance(value, str) else set()


def _replaced(value: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {_replaced(key, known): _replaced(below, known) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(part, known) for part in value]
    if not isinstance(value, str):
        return value
    if value in known:
        return known[value]
    for name in (SOURCE_WORD, TARGET_WORD):
        value = value.replace(name, known.get(name, name))
    return value
