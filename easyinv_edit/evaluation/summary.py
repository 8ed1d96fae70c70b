"""The tables of a benchmark: means over its results, published numbers beside them, and what must be known to read both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from easyinv_edit.evaluation import published
from easyinv_edit.evaluation.benchmark import Benchmark
from easyinv_edit.evaluation.columns import COLUMNS, Measures, plain_name
from easyinv_edit.evaluation.datasets import CAPTIONS
from easyinv_edit.evaluation.variants import BASELINE, CEILING, Variant

Row = Mapping[str, Any]
FORMS = {
    "compat": "background columns are PIE-Bench's: both pictures are black inside the mask and scored over their full area, "
    "which flatters (a mask over half of the picture gives 3 dB)",
    "masked_mean": "background columns count pixels outside the mask alone; PIE-Bench's count black ones inside it as equal "
    "(LPIPS and structure see black there in either form)",
}
PINNED = (
    f"{CEILING} is what an edit with a pinned source, the default, reconstructs under every method, by construction; the other "
    "rows are sampled back without the pin"
)
UNGUIDED = (
    "guided columns repeat the others there, because guidance has no direction where the negative prompt is empty too (SDXL's "
    "is zeros)"
)


def build(
    config: Benchmark,
    measures: Measures,
    lines: Sequence[Variant],
    rows: Sequence[Row],
    groups: Sequence[str],
    notes: Sequence[str],
) -> dict[str, Any]:
    """`summary.json`: the tables of all items and, where there are several, of every group, as far as the results go.

    lines: the variants in the tables' order; rows: the results; groups: of the items; notes: what else is known.
    """
    sound = _with_gains([row for row in rows if "error" not in row])
    named = [group for group in dict.fromkeys(groups) if group] if len(set(groups)) > 1 else []
    tables = [_table(config, measures, lines, sound, group) for group in ("", *named)]
    failed = len(rows) - len(sound)
    broken = [f"{failed} of {len(rows)} results are errors; results.jsonl holds each with its reason"] if failed else []
    return {
        "title": config.title,
        "kind": config.kind,
        "columns": _columns(config, measures),
        "tables": tables,
        "published": [published.line(config, lines, sound, len(groups), row) for row in config.published],
        "notes": [
            *published.notes(config),
            *_inversion_notes(config, measures, sound),
            *_measure_notes(config, measures),
            *notes,
            *broken,
        ],
    }


def _columns(config: Benchmark, measures: Measures) -> list[dict[str, Any]]:
    """Ours in their order, then those that only published numbers have."""
    titles = [measures.titles[name] for name in measures.names]
    titles += dict.fromkeys(title for row in config.published for title in row.values if title not in titles)
    return [_described(title) for title in titles]


def _described(title: str) -> dict[str, Any]:
    column = COLUMNS[plain_name(title)]
    return {"name": title, "unit": column.unit, "better": column.better, "digits": column.digits}


def _table(config: Benchmark, measures: Measures, lines: Sequence[Variant], rows: Sequence[Row], group: str) -> dict[str, Any]:
    """One table; group: whose items, empty for all."""
    chosen = [row for row in rows if group in ("", row["group"])]
    meant = [line for line in lines if not (group and line.tasks) or group in line.tasks]
    made = [_line(measures, line, [row for row in chosen if row["variant"] == line.label]) for line in meant]
    if "x DDIM" in measures.names:
        _set_pace(made)
    whole = "all pictures" if config.kind == "inversion" else "all edits"
    return {"title": group or whole, "group": group, "rows": made}


def _line(measures: Measures, line: Variant, own: Sequence[Row]) -> dict[str, Any]:
    """Means of one variant's results; how many went into a column where they are fewer than all."""
    known = {"variant": line.label, "inversion": line.inversion, "control": line.control, "steps": line.steps}
    made: dict[str, Any] = {**known, "dtype": line.dtype, "n": len(own)}
    for name in measures.names:
        title, (source, mean) = measures.titles[name], AGGREGATES.get(name, (measures.titles[name], statistics.fmean))
        values = [row[source] for row in own if _is_number(row.get(source))]
        made[title] = mean(values) if values else None
        if values and len(values) != len(own):
            made[f"{title} n"] = len(values)
    return made


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _share_above(values: Sequence[float]) -> float:
    return statistics.fmean(value > 0 for value in values)


AGGREGATES: dict[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "spread": ("gain", _deviation),
    "better": ("gain", _share_above),
}
"""Columns that are not means of their own: of which numbers, and what."""


def _with_gains(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, each with the dB inside the object over those of no control on the same item, where both are known."""

    def same(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("item", "inversion", "steps", "dtype"))

    plain = {same(row): row.get("inside") for row in rows if row.get("control") == BASELINE}
    made = []
    for row in rows:
        own, base = row.get("inside"), plain.get(same(row))
        made.append(dict(row) if own is None or base is None else {**row, "gain": own - base})
    return made


def _set_pace(lines: Sequence[dict[str, Any]]) -> None:
    """Seconds over those of DDIM inversion of the same T and dtype; both must have been measured."""
    pace = {(line["steps"], line["dtype"]): line.get("seconds") for line in lines if line["inversion"] == "ddim"}
    for line in lines:
        own, theirs = line.get("seconds"), pace.get((line["steps"], line["dtype"]))
        line["x DDIM"] = own / theirs if own and theirs else None


def _inversion_notes(config: Benchmark, measures: Measures, rows: Sequence[Row]) -> list[str]:
    """What the first row means for edits, and why guidance may have changed nothing."""
    if config.kind != "inversion":
        return []
    bare, known = {row["item"] for row in rows if row.get("prompt") == ""}, {row["item"] for row in rows}
    told = [PINNED]
    if bare and not config.negative_prompt and any(name.endswith(", guided") for name in measures.names):
        remedy = f"; a {CAPTIONS} in the folder (columns file, prompt) gives prompts" if config.data.set == "folder" else ""
        told.append(f"{len(bare)} of {len(known)} pictures have no prompt: {UNGUIDED}{remedy}")
    return told


def _measure_notes(config: Benchmark, measures: Measures) -> list[str]:
    """Which columns are empty, and how masks count."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in measures.missing.items():
        by_reason.setdefault(reason, []).append(measures.titles[name])
    notes = [f"{reason} ({'; '.join(titles)})" for reason, titles in by_reason.items()]
    return notes + ([FORMS[config.mask_form]] if any(name.startswith("background") for name in measures.names) else [])
