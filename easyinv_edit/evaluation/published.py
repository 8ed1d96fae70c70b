"""Published numbers beside a run's own: the line each belongs to, and what keeps it from being comparable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from easyinv_edit.choices import describe
from easyinv_edit.evaluation.benchmark import Benchmark, Published, flat
from easyinv_edit.evaluation.coco import SPLITS
from easyinv_edit.evaluation.variants import Variant, control_label, controller_of, inversion_label, inversion_of
from easyinv_edit.model_check import examine
from easyinv_edit.models import on_disk, preset

Row = Mapping[str, Any]


def _matching(lines: Sequence[Variant], row: Published) -> Variant | None:
    """Our line that a published one belongs to."""
    for line in lines:
        named = line.inversion == row.inversion and line.control == row.control
        if named and row.dtype in (None, line.dtype):
            return line
    return None


def line(config: Benchmark, lines: Sequence[Variant], rows: Sequence[Row], items: int, row: Published) -> dict[str, Any]:
    """One published line: by the name of ours where there is one, and what keeps it from being comparable.

    rows: the sound results; items: how many the run has.
    """
    ours = _matching(lines, row)
    own = " + ".join(part for part in (", ".join(filter(None, (row.inversion, row.dtype))), row.control) if part)
    reasons = [row.why] if row.why else []
    if ours is not None and row.num_inference_steps not in (None, ours.steps):
        reasons.append(f"T is {row.num_inference_steps} there and {ours.steps} here")
    count = items if ours is None else sum(each["variant"] == ours.label for each in rows)
    if row.count not in (None, count):
        reasons.append(f"means of {row.count:,} results there and of {count:,} here")
    keys = [*(key for key, _, _ in differences(config)), *_other_settings(config, row)]
    if keys:
        reasons.append(f"this run's {', '.join(keys)} are not the published ones")
    facts = {"variant": own if ours is None else ours.label, "source": row.source}
    return {**facts, "same_protocol": not reasons, "why": "; ".join(reasons), **row.values}


def _other_settings(config: Benchmark, row: Published) -> Iterable[str]:
    """Settings of the line's inversion and control that are not those of the protocol's entries of the same labels."""

    def inversion(entry: Row) -> Row:
        pinned = entry.get("pin_source", config.pin_source)
        return {**describe(inversion_of(entry, config.guidance_scale)), "pin_source": pinned}

    def control(entry: Row) -> Row:
        return {**controller_of(entry), "source_prompt": entry.get("source_prompt")}

    both: tuple[tuple[str, str | None, Callable[[Row], str], Callable[[Row], Row]], ...] = (
        ("inversions", row.inversion, inversion_label, inversion),
        ("controls", row.control, control_label, control),
    )
    for key, label, called, settings in both:
        ours, theirs = (
            next((settings(entry) for entry in entries if called(entry) == label), None)
            for entries in (getattr(config, key), config.protocol.get(key, ()))
        )
        if ours is not None and theirs is not None:
            yield from (f"{name} of {label}" for name in {**theirs, **ours} if ours.get(name) != theirs.get(name))


def differences(config: Benchmark) -> list[tuple[str, Any, Any]]:
    """(key, published value, this run's) wherever the run decides otherwise than the published protocol.

    Inversions and controls are left out: fewer or more of them change no line.
    """
    ours, theirs = (dict(flat(content)) for content in (config.request(), config.protocol))
    compared = [key for key in theirs if key not in ("inversions", "controls")]
    return [(key, theirs[key], ours[key]) for key in compared if not _same(key, ours[key], theirs[key])]


WRITTEN_OUT: dict[str, Callable[[Any], Any]] = {
    "data.splits": lambda given: sorted(given or SPLITS),
    "data.captions": bool,
}
"""What the values of keys with several forms of one value stand for."""


def _same(key: str, ours: Any, theirs: Any) -> bool:
    """Whether a key is decided alike; a model's folder counts as the preset whose structure it has."""
    if key in WRITTEN_OUT:
        return bool(WRITTEN_OUT[key](ours) == WRITTEN_OUT[key](theirs))
    if key != "model" or ours == theirs:
        return bool(ours == theirs)
    known = preset(theirs)
    if known is None or ours == "embedded":
        return False
    return ours == known.id or (on_disk(ours) is not None and theirs in examine(ours).presets)


def notes(config: Benchmark) -> list[str]:
    """How the run's protocol differs from the published one."""
    found, own = differences(config), config.protocol.get("model", config.model)
    if not found:
        return (
            [] if own == config.model else [f"{config.model} has the structure of {own}; its weights are taken at their word"]
        )
    told = "; ".join(f"{key} is {_said(ours)} here and {_said(theirs)} there" for key, theirs, ours in found)
    nothing = "; the numbers say nothing about the published ones" if "model" in (key for key, _, _ in found) else ""
    return [f"not the protocol of the published numbers: {told}{nothing}"]


def _said(value: Any) -> str:
    return "unset" if value is None else str(value)
