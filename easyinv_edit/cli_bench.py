"""`easyinv-edit bench`: methods measured side by side. Imports nothing heavy at the top."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyinv_edit import terminal
from easyinv_edit.terminal import Debug, Json, Quiet

if TYPE_CHECKING:
    from easyinv_edit.evaluation.inversion_bench import Plan

app = typer.Typer(no_args_is_help=True, help="Measure methods side by side.")


@app.callback()
def group() -> None:
    """Measure methods side by side."""


@app.command("inversion")
def inversion(
    images: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 8,
    steps: Annotated[str, typer.Option(help="Values of T, separated by commas.")] = "10,20,50",
    methods: Annotated[str, typer.Option(help="Inversion methods, separated by commas; by default all.")] = "",
    model: Annotated[str, typer.Option(help="A model folder, a hub name, or 'embedded'.")] = "embedded",
    folder: Annotated[str | None, typer.Option(help="Pictures of your own instead of rendered scenes.")] = None,
    guidance: Annotated[float, typer.Option(min=0, max=100, help="Guidance scale of the edit.")] = 3.0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures inverted at once.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder of the run; it goes on there.")
    ] = "outputs/bench-inversion",
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Invert pictures with every method and sample them back: errors, evaluations and seconds.

    Writes a table, CSV, JSON and a figure. Stopped with Ctrl-C it goes on where it was when the same command is given again.
    """
    from easyinv_edit.errors import InputError

    place = Path(output)
    chosen, values = _methods(methods), _steps(steps)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {dtype!r}: choose float32, bfloat16 or float16")
    terminal.require_writable(place)
    terminal.settle(quiet)
    from easyinv_edit.evaluation.inversion_bench import Plan

    plan = Plan(chosen, values, guidance, batch)
    request = {"model": model, "images": images, "folder": folder, "dtype": dtype, "device": device, **asdict(plan)}
    try:
        table = _run(plan, request, place, quiet or json_)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise
    terminal.show(table, quiet, json_, lambda rows: markdown(rows))


def _run(plan: Plan, request: dict[str, Any], place: Path, silent: bool) -> list[dict[str, Any]]:
    import torch

    from easyinv_edit.evaluation import datasets, inversion_bench
    from easyinv_edit.evaluation.ledger import Ledger
    from easyinv_edit.images import save_png
    from easyinv_edit.pipeline import EditPipeline
    from easyinv_edit.result import versions, write_text
    from easyinv_edit.running import resolve_device

    def report(text: str) -> None:
        if not silent:
            typer.echo(text, err=True)

    items = [] if request["folder"] is None else datasets.folder(Path(request["folder"]), request["images"])
    ledger = Ledger(place, request, inversion_bench.KEY)
    device = resolve_device(request["device"])
    pipe = EditPipeline.from_pretrained(request["model"], dtype=getattr(torch, request["dtype"]), device=device)
    pipe.set_progress_bar_config(disable=True)
    items = items or datasets.scenes(FIRST_SEED, request["images"], pipe.backbone.native_size[0])
    inversion_bench.run(pipe, items, plan, ledger, report)
    table = inversion_bench.summary(ledger.rows, plan)
    content = {"request": request, "versions": versions(), "device": str(device), "threads": torch.get_num_threads()}
    write_text(place / "summary.json", json.dumps({**content, "summary": table}, indent=2) + "\n")
    write_text(place / "summary.csv", as_csv(table))
    write_text(place / "summary.md", markdown(table) + "\n")
    if not (place / "figure.png").exists():
        save_png(inversion_bench.figure(pipe, items[0], 0, plan, report), place / "figure.png")
    return table


FIRST_SEED = 24_000_000
"""Scenes of this benchmark: held out from training and from the other evaluations."""


def _methods(text: str) -> tuple[str, ...]:
    from easyinv_edit.choices import nearest
    from easyinv_edit.errors import InputError
    from easyinv_edit.inversion import INVERSIONS

    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip())) or tuple(INVERSIONS)
    if unknown := [name for name in chosen if name not in INVERSIONS]:
        hints = "; ".join(f"{name!r} is unknown{nearest(name, INVERSIONS)}" for name in unknown)
        raise InputError(f"--methods: {hints}; choose from {', '.join(INVERSIONS)}")
    return chosen


def _steps(text: str) -> tuple[int, ...]:
    from easyinv_edit.errors import InputError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= 1000 for part in parts):
        raise InputError(f"--steps {text!r}: give whole numbers from 1 to 1000, separated by commas, e.g. 10,20,50")
    return tuple(dict.fromkeys(int(part) for part in parts))


COLUMNS = (
    ("evaluations", "evaluations", ".0f"),
    ("seconds", "seconds", ".2f"),
    ("relative_seconds", "x DDIM", ".2f"),
    ("latent_error", "latent error", ".4f"),
    ("psnr", "PSNR", ".1f"),
    ("ssim", "SSIM", ".3f"),
    ("latent_error_guided", "latent error, guided", ".3f"),
    ("psnr_guided", "PSNR, guided", ".1f"),
    ("ssim_guided", "SSIM, guided", ".3f"),
)


def markdown(table: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    heads = ["pictures", "T", "method", *(head for _, head, _ in COLUMNS)]
    lines = [heads, ["---"] * len(heads)]
    for row in table:
        cells = ["" if row.get(key) is None else format(row[key], spec) for key, _, spec in COLUMNS]
        lines.append([f"{row['group']} ({row['pictures']})", str(row["steps"] or ""), row["method"], *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_csv(table: list[dict[str, Any]]) -> str:
    """The summary as CSV, a line per row."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in table for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return file.getvalue()
