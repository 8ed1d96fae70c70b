"""`easyinv-edit bench`: methods measured side by side. Imports nothing heavy at the top."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyinv_edit import cli_speed, terminal
from easyinv_edit.terminal import Debug, Json, Quiet

if TYPE_CHECKING:
    from easyinv_edit.evaluation.edit_bench import Plan as EditPlan
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
    from easyinv_edit.inversion import INVERSIONS

    chosen, values = _names(methods, INVERSIONS, "--methods"), _steps(steps)
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
    terminal.show(table, quiet, json_, lambda rows: markdown(rows, INVERSION_COLUMNS))


@app.command("edits")
def edits(
    scenes: Annotated[int, typer.Option(min=1, help="Cases per task.")] = 8,
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Steps, T.")] = 25,
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; by default all.")] = "",
    controls: Annotated[str, typer.Option(help="Controls, separated by semicolons; by default all.")] = "",
    inversions: Annotated[str, typer.Option(help="Inversion methods, separated by commas.")] = "easyinv",
    model: Annotated[str, typer.Option(help="A tabletop model's folder, or 'embedded'.")] = "embedded",
    guidance: Annotated[float, typer.Option(min=0, max=100, help="Guidance scale.")] = 3.0,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the run; it goes on there.")] = "outputs/bench-edits",
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Edit rendered scenes whose true result is known, with every controller: errors, words read, evaluations, seconds."""
    from easyinv_edit.evaluation import edit_bench
    from easyinv_edit.evaluation.ground_truth import ALL_TASKS
    from easyinv_edit.inversion import INVERSIONS

    place = Path(output)
    plan = edit_bench.Plan(
        _names(tasks, ALL_TASKS, "--tasks"),
        _names(controls if ";" in controls or not controls else f"{controls};", edit_bench.CONTROLS, "--controls"),
        _names(inversions, INVERSIONS, "--inversions"),
        scenes,
        steps,
        guidance,
    )
    terminal.require_writable(place)
    terminal.settle(quiet)
    try:
        table = _run_edits(plan, model, place, quiet or json_)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise
    terminal.show(table, quiet, json_, lambda rows: markdown(rows, EDIT_COLUMNS))


@app.command("cost")
def cost(
    prompts: Annotated[str, typer.Option(help="Numbers of prompts per image, separated by commas.")] = "1,8",
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Steps, T.")] = 50,
    model: Annotated[str, typer.Option(help="A model folder, a hub name, or 'embedded'.")] = "embedded",
    guidance: Annotated[float, typer.Option(min=0, max=100, help="Guidance scale.")] = 3.0,
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Count evaluations, seconds and memory of MasaCtrl edits against the authors' four-row layout."""
    counts = _steps(prompts, "--prompts")
    terminal.settle(quiet)
    from easyinv_edit.evaluation import cost_bench
    from easyinv_edit.pipeline import EditPipeline
    from easyinv_edit.running import source_image

    pipe = EditPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    image = source_image(f"scene:{FIRST_SEED}", pipe.backbone.native_size)
    texts = [
        f"a {size} {shape} on a {b} background" for b in ("white", "mint") for size in ("large", "small") for shape in SHAPES
    ]
    table: list[dict[str, Any]] = []
    for count in counts:
        given = [texts[i % len(texts)] for i in range(count)]
        report = (lambda _text: None) if quiet or json_ else (lambda text: typer.echo(text, err=True))
        table += cost_bench.measure(pipe, image, given, steps=steps, guidance=guidance, report=report)
    memory = cost_bench.step_memory(pipe, pipe.backbone.native_size[0] // pipe.backbone.downscale)
    extra = memory["controlled"] / memory["plain"] - 1
    note = f"peak memory of a step of three rows: {memory['plain']:,} bytes plain, {extra:+.1%} under control"
    facts = {"table": table, "memory": memory}
    terminal.show(facts, quiet, json_, lambda found: f"{markdown(found['table'], COST_COLUMNS)}\n\n{note}")


app.command("speed")(cli_speed.speed)
SHAPES = ("ball", "cube", "cone", "cylinder")


def _run_edits(plan: EditPlan, model: str, place: Path, silent: bool) -> list[dict[str, Any]]:
    import torch

    from easyinv_edit.errors import ModelError
    from easyinv_edit.evaluation import edit_bench
    from easyinv_edit.evaluation.ledger import Ledger
    from easyinv_edit.images import save_png
    from easyinv_edit.pipeline import EditPipeline, embedded_folder
    from easyinv_edit.result import versions, write_text
    from easyinv_edit.tabletop import judge as judging

    home = embedded_folder() if model == "embedded" else Path(model)
    if not (home / "judge.safetensors").exists():
        raise ModelError(f"{model}: has no judge.safetensors, so it is no tabletop model; edits with a truth need one")
    ledger = Ledger(place, {"model": model, **asdict(plan)}, edit_bench.KEY)
    pipe, judge = EditPipeline.from_pretrained(model), judging.load(home / "judge.safetensors")
    pipe.set_progress_bar_config(disable=True)
    report = (lambda _text: None) if silent else (lambda text: typer.echo(text, err=True))
    edit_bench.run(pipe, judge, plan, FIRST_SEED, ledger, place / "pictures", report)
    table = edit_bench.summary(ledger.rows, plan)
    content = {"request": asdict(plan), "versions": versions(), "threads": torch.get_num_threads()}
    write_text(place / "summary.json", json.dumps({**content, "summary": table}, indent=2) + "\n")
    write_text(place / "summary.csv", as_csv(table))
    write_text(place / "summary.md", markdown(table, EDIT_COLUMNS) + "\n")
    for task in plan.tasks:
        for name in plan.inversions:
            page = edit_bench.figure(plan, task, name, FIRST_SEED, pipe.backbone.native_size[0], place / "pictures")
            save_png(page, place / f"figure-{task}-{name}.png")
    return table


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
    write_text(place / "summary.md", markdown(table, INVERSION_COLUMNS) + "\n")
    if not (place / "figure.png").exists():
        save_png(inversion_bench.figure(pipe, items[0], 0, plan, report), place / "figure.png")
    return table


FIRST_SEED = 24_000_000
"""Scenes of this benchmark: held out from training and from the other evaluations."""


def _names(text: str, known: Iterable[str], option: str) -> tuple[str, ...]:
    """The names of a list separated by ";" or ",", all of them for an empty one. Raises InputError for unknown names."""
    from easyinv_edit.choices import nearest
    from easyinv_edit.errors import InputError

    allowed = list(known)
    parts = [part.strip() for part in text.split(";" if ";" in text else ",")]
    chosen = tuple(dict.fromkeys(part for part in parts if part)) or tuple(allowed)
    if unknown := [name for name in chosen if name not in allowed]:
        hints = "; ".join(f"{name!r} is unknown{nearest(name, allowed)}" for name in unknown)
        raise InputError(
            f"{option}: {hints}; choose from {'; '.join(allowed) if ',' in ''.join(allowed) else ', '.join(allowed)}"
        )
    return chosen


def _steps(text: str, option: str = "--steps") -> tuple[int, ...]:
    from easyinv_edit.errors import InputError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 1 <= int(part) <= 1000 for part in parts):
        raise InputError(f"{option} {text!r}: give whole numbers from 1 to 1000, separated by commas")
    return tuple(dict.fromkeys(int(part) for part in parts))


Column = tuple[str, str, str]
"""(key, heading, format); an empty format prints the value as it is."""
INVERSION_COLUMNS: tuple[Column, ...] = (
    ("group", "pictures", ""),
    ("pictures", "n", ""),
    ("steps", "T", ""),
    ("method", "method", ""),
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
EDIT_COLUMNS: tuple[Column, ...] = (
    ("task", "edit", ""),
    ("inversion", "inversion", ""),
    ("control", "control", ""),
    ("cases", "n", ""),
    ("psnr", "dB to the truth", ".2f"),
    ("inside", "inside the object", ".2f"),
    ("outside", "outside", ".2f"),
    ("gain", "gain inside over none", "+.2f"),
    ("spread", "spread", ".2f"),
    ("better", "better in", ".0%"),
    ("target", "target word", ".2f"),
    ("kept", "kept words", ".2f"),
    ("evaluations", "evaluations", ".0f"),
    ("seconds", "seconds", ".2f"),
)
COST_COLUMNS: tuple[Column, ...] = (
    ("prompts", "prompts", ""),
    ("layout", "layout", ""),
    ("evaluations", "evaluations", ""),
    ("seconds", "seconds", ".1f"),
    ("relative_seconds", "of the four rows'", ".2f"),
    ("difference", "difference of latents", ".1e"),
    ("psnr", "of pictures, dB", ".0f"),
)


def markdown(table: list[dict[str, Any]], columns: Sequence[Column]) -> str:
    """A summary as a Markdown table."""
    lines = [[head for _, head, _ in columns], ["---"] * len(columns)]
    lines += [["" if row.get(key) is None else format(row[key], spec) for key, _, spec in columns] for row in table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_csv(table: list[dict[str, Any]]) -> str:
    """The summary as CSV, a line per row."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in table for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return file.getvalue()
