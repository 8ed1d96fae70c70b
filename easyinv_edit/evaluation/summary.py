"""The tables of a benchmark: means over its results, published numbers beside them, and what must be known to read both."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from easyinv_edit.choices import describe
from easyinv_edit.evaluation.benchmark import Benchmark, Published, flat
from easyinv_edit.evaluation.coco import SPLITS
from easyinv_edit.evaluation.columns import COLUMNS, Measures, plain_name
from easyinv_edit.evaluation.datasets import CAPTIONS
from easyinv_edit.evaluation.variants import (
    BASELINE,
    CEILING,
    Variant,
    control_label,
    controller_of,
    inversion_label,
    inversion_of,
)
from easyinv_edit.model_check import examine
from easyinv_edit.models import on_disk, preset

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
        "published": [_published(config, lines, sound, len(groups), row) for row in config.published],
        "notes": [
            *_protocol_notes(config),
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
    made = [_line(measures, line, [row for row in chosen if row["variant"] == line.label]) for line in lines]
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


def _matching(lines: Sequence[Variant], row: Published) -> Variant | None:
    """Our line that a published one belongs to."""
    for line in lines:
        named = line.inversion == row.inversion and line.control == row.control
        if named and row.dtype in (None, line.dtype):
            return line
    return None


def _published(config: Benchmark, lines: Sequence[Variant], rows: Sequence[Row], items: int, row: Published) -> dict[str, Any]:
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


def _protocol_notes(config: Benchmark) -> list[str]:
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


# --- for people ---------------------------------------------------------------------------------------------------------


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables, with the published lines below ours and the notes at the end."""
    parts = [f"# {summary['title']}"]
    reasons = list(dict.fromkeys(row["why"] for row in summary["published"] if not row["same_protocol"]))
    for table in summary["tables"]:
        several = len(summary["tables"]) > 1
        lines = _markdown_lines(summary, table, reasons)
        parts.append("\n".join([*([f"## {table['title']}", ""] if several else []), *lines]))
    if reasons:
        parts.append("\n".join(f"{_mark(number)} {why}" for number, why in enumerate(reasons)))
    if summary["notes"]:
        parts.append("\n".join(f"- {note}" for note in summary["notes"]))
    return "\n\n".join(parts) + "\n"


def _mark(number: int) -> str:
    """The mark of the first reason, the second and so on."""
    return "\\*" * (number + 1)


def _markdown_lines(summary: Mapping[str, Any], table: Mapping[str, Any], reasons: Sequence[str]) -> list[str]:
    arrows = {"higher": " ↑", "lower": " ↓", None: ""}
    columns = summary["columns"]
    heads = [f"{c['name']}{', ' + c['unit'] if c['unit'] else ''}{arrows[c['better']]}" for c in columns]
    lines = [["variant", "n", *heads], ["---"] * (len(heads) + 2)]
    for row in lines_of(summary, table):
        published = row.get("source")
        mark = "" if not published or row["same_protocol"] else f" {_mark(reasons.index(row['why']))}"
        name = f"*{row['variant']}: {published}*{mark}" if published else row["variant"]
        lines.append([name, str(row.get("n", "")), *(_cell(row, column) for column in columns)])
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _cell(row: Row, column: Mapping[str, Any]) -> str:
    value, fewer = row.get(column["name"]), row.get(f"{column['name']} n")
    return "" if value is None else f"{value:.{column['digits']}f}{'' if fewer is None else f' ({fewer})'}"


def lines_of(summary: Mapping[str, Any], table: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The lines of a table; in that of all items published ones follow the line they belong to, those of no line the last."""
    published = [] if table["group"] else list(summary["published"])
    for row in table["rows"]:
        yield dict(row)
        yield from (dict(each) for each in published if each["variant"] == row["variant"])
    ours = {row["variant"] for row in table["rows"]}
    yield from (dict(each) for each in published if each["variant"] not in ours)


def as_csv(summary: Mapping[str, Any]) -> str:
    """Every line of every table; source is empty for ours."""
    rows = [{"table": table["title"], **line} for table in summary["tables"] for line in lines_of(summary, table)]
    known = ["table", "variant", "source", "inversion", "control", "steps", "dtype", "n"]
    heads = list(dict.fromkeys([*known, *(key for row in rows for key in row)]))
    file = io.StringIO()
    writer = csv.DictWriter(file, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
