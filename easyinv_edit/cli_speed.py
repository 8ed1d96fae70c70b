"""`easyinv-edit bench speed`: the cost of control at true size. Imports nothing heavy at the top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyinv_edit import terminal
from easyinv_edit.terminal import Debug, Json, Quiet

if TYPE_CHECKING:
    from easyinv_edit.evaluation.speed_bench import Plan

DTYPES = ("float32", "bfloat16", "float16")


def speed(
    shapes: Annotated[str, typer.Option(help="Published UNets, separated by commas: sd14, sd21, sdxl.")] = "sd14,sdxl",
    size: Annotated[int, typer.Option(min=0, max=4096, help="Side in pixels, a multiple of 64; 0: each one's own.")] = 0,
    steps: Annotated[int, typer.Option(min=2, max=999, help="Steps of a whole edit, T.")] = 50,
    targets: Annotated[int, typer.Option(min=1, max=64, help="Prompts edited at once, each guided.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    edit: Annotated[bool, typer.Option("--edit/--no-edit", help="Whole edits too: hours on a CPU.")] = False,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Times a step is measured; the median is told.")] = 3,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the tables.")] = "outputs/bench-speed",
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Time steps and edits of published UNets at true size, with random weights: plain, and under MasaCtrl.

    Writes a table, CSV and JSON, after every line anew.
    """
    from easyinv_edit.errors import InputError

    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r}: choose {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if size % 64:
        raise InputError(f"--size {size}: give a multiple of 64, or 0 for the size each model was trained at")
    terminal.require_writable(Path(output))
    terminal.settle(quiet)
    import torch

    from easyinv_edit.cli_bench import _names
    from easyinv_edit.evaluation.shapes import SHAPES
    from easyinv_edit.evaluation.speed_bench import Plan
    from easyinv_edit.running import resolve_device

    chosen = {name: SHAPES[name] for name in _names(shapes, SHAPES, "--shapes")}
    plan = Plan(chosen, size, steps, getattr(torch, dtype), resolve_device(device), targets, edit, repeats)
    try:
        content = _run(plan, Path(output), quiet or json_)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the lines that were measured are in {output}", err=True)
        raise
    terminal.show(content["rows"], quiet, json_, lambda _rows: _text(content))


def _run(plan: Plan, place: Path, silent: bool) -> dict[str, Any]:
    from easyinv_edit.cli_bench import as_csv
    from easyinv_edit.evaluation import speed_bench
    from easyinv_edit.result import write_text

    def report(text: str) -> None:
        if not silent:
            typer.echo(text, err=True)

    request = {"shapes": list(plan.shapes), "size": plan.size, "steps": plan.steps, "targets": plan.targets}
    request |= {"edit": plan.edit, "repeats": plan.repeats}
    rows: list[dict[str, Any]] = []
    content = {"request": request, "environment": speed_bench.environment(plan), "rows": rows}
    for row in speed_bench.measure(plan, report):
        rows.append(row)
        write_text(place / "speed.json", json.dumps(content, indent=2) + "\n")
        write_text(place / "speed.csv", as_csv(rows))
        write_text(place / "speed.md", _text(content) + "\n")
    return content


def _text(content: dict[str, Any]) -> str:
    """The table, and under it the machine it was measured on."""
    from easyinv_edit.cli_bench import markdown

    found = content["environment"]
    machine = found["gpu"] or f"{found['cpu']}, {found['threads']} threads"
    note = f"{machine}; torch {found['versions']['torch']}, {found['dtype']}; random weights. Memory: {found['memory']}."
    return f"{markdown(content['rows'], COLUMNS)}\n\n{note}"


COLUMNS = (
    ("shape", "UNet", ""),
    ("size", "pixels", ""),
    ("work", "work", ""),
    ("rows", "rows", ""),
    ("evaluations", "evaluations", ""),
    ("seconds", "seconds", ".3g"),
    ("relative_seconds", "x plain", ".3f"),
    ("evaluations_per_second", "evaluations/s", ".3g"),
    ("tflop_per_second", "TFLOP/s", ".3g"),
    ("matrix_tflop_per_second", "matrix product's", ".3g"),
    ("fraction", "of it", ".0%"),
    ("peak_gigabytes", "peak GB", ".2f"),
    ("finite", "finite", ""),
)
