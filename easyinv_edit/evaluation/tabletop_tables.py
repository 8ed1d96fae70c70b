"""What `tabletop evaluate` prints: its report as Markdown, every figure with its deviation over the sets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import chain
from typing import Any

from easyinv_edit.evaluation.markdown import table


def text(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    size, edit = report["size"], report["one edit"]
    head = (
        f"{size['parameters'] / 1e6:.1f} M parameters, {size['float16_megabytes']:.1f} MB in float16, {size['pixels']} pixels; "
        f"{len(report['sets'])} x {report['scenes']} scenes, {report['samples']} samples, T = {report['steps']}; "
        f"one edit {edit['seconds']:.1f} s, "
        f"{edit['evaluations']} evaluations, {edit['threads']} threads"
    )
    sets = report["sets"]
    return "\n\n".join([head, _autoencoder(sets), _samples(sets), _reconstructions(sets), _edits(sets)])


def _autoencoder(sets: Sequence[dict[str, Any]]) -> str:
    parts = [given["autoencoder"] for given in sets]
    fields = list(parts[0]["rendered"])
    lines = [
        ["rendered", "", "", *_cells([part["rendered"] for part in parts], fields, 3)],
        ["round trip", *_cells(parts, ["psnr", "object_psnr"], 1), *_cells([p["round trip"] for p in parts], fields, 3)],
    ]
    return table(["autoencoder", "dB", "dB inside the object", *fields], lines)


def _samples(sets: Sequence[dict[str, Any]]) -> str:
    parts = [given["samples"] for given in sets]
    fields = list(dict.fromkeys(field for row in parts[0].values() for field in row if field != "kernel distance"))
    lines = []
    for name in parts[0]:
        rows = [part[name] for part in parts]
        lines.append([name, *_cells(rows, fields, 3), *_cells(rows, ["kernel distance"], 4)])
    return table(["samples", *fields, "kernel distance"], lines)


def _reconstructions(sets: Sequence[dict[str, Any]]) -> str:
    fields = {"psnr_latent_ceiling": 1, "psnr": 1, "noise_deviation": 2, "evaluations": 0, "seconds": 2}
    lines = []
    for number, first in enumerate(sets[0]["reconstructions"]):
        rows = [given["reconstructions"][number] for given in sets]
        lines.append([first["method"], *(_cell(rows, field, digits) for field, digits in fields.items())])
    heads = ["inversion", "dB to the autoencoder", "dB to the picture", "std of z_T", "evaluations", "seconds"]
    return table(heads, lines)


def _edits(sets: Sequence[dict[str, Any]]) -> str:
    fields = {"psnr": 2, "object_psnr": 2, "gain": 2, "better": 2, "target": 2, "silhouette": 2}
    parts = [list(chain.from_iterable(given["edits"].values())) for given in sets]
    kept = list(dict.fromkeys(field for row in parts[0] for field in row["kept"]))
    lines = []
    for rows in zip(*parts, strict=True):
        first = rows[0]
        figures = [_cell(rows, field, digits) for field, digits in fields.items()]
        lines.append([first["task"], first["method"], *figures, *_cells([row["kept"] for row in rows], kept, 2)])
    heads = ["dB to the truth", "inside the object", "gain", "better", "word obeyed", "silhouette"]
    return table(["edit", "method", *heads, *(f"{field} kept" for field in kept)], lines)


def _cells(rows: Sequence[dict[str, float]], fields: Sequence[str], digits: int) -> list[str]:
    return [_cell(rows, field, digits) for field in fields]


def _cell(rows: Sequence[dict[str, float]], field: str, digits: int) -> str:
    """Mean over the sets, and its deviation where there are several; empty where no set has it."""
    values = [row[field] for row in rows if field in row]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
