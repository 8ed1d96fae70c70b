"""`easyinv-edit bench`: methods measured side by side. Imports nothing heavy at the top."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyinv_edit import cli_regimes, cli_speed, terminal
from easyinv_edit.terminal import Debug, Json, Quiet

if TYPE_CHECKING:
    from easyinv_edit.evaluation.benchmark import Benchmark

app = typer.Typer(no_args_is_help=True, help="Measure methods side by side.")
Config = Annotated[
    str | None, typer.Option("--config", help="A benchmark's file, or a name of configs/benchmarks; it decides the rest.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="With --config: its keys, e.g. data.count=8.")
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder of the run; it goes on there.")]


@app.callback()
def group() -> None:
    """Measure methods side by side."""


@app.command("inversion")
def inversion(
    ctx: typer.Context,
    overrides: Overrides = None,
    config: Config = None,
    images: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 8,
    steps: Annotated[str, typer.Option(help="Values of T, separated by commas.")] = "10,20,50",
    methods: Annotated[str, typer.Option(help="Inversion methods, separated by commas; by default all.")] = "",
    model: Annotated[str, typer.Option(help="A model folder, a hub name, or 'embedded'.")] = "embedded",
    folder: Annotated[str | None, typer.Option(help="Pictures of your own instead of rendered scenes.")] = None,
    guidance: Annotated[float, typer.Option(min=0, max=100, help="Guidance scale of the edit.")] = 3.0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures inverted at once.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    output: Output = None,
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Invert pictures with every method and sample them back: errors, evaluations and seconds.

    --config reads a file, such as paper_table1, and KEY=VALUE decides its keys otherwise; without it the options do. Writes
    results, tables and pictures. Stopped at any moment it goes on where it was when the same command is given again.
    """
    if config is not None:
        _carry_out(*_configured(ctx, config, overrides, "inversion"), output, quiet, json_)
        return
    _refuse_overrides(overrides, "--steps 10,20")
    from easyinv_edit.errors import InputError
    from easyinv_edit.evaluation.benchmark import from_mapping
    from easyinv_edit.inversion import INVERSIONS

    chosen, values = _names(methods, INVERSIONS, "--methods"), _steps(steps)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {dtype!r}: choose float32, bfloat16 or float16")
    content = {
        "kind": "inversion",
        "title": "Inversions sampled back",
        "data": {"set": "tabletop" if folder is None else "folder", "path": folder, "count": images},
        "model": model,
        "dtypes": [dtype],
        "device": device,
        "inversions": list(chosen),
        "num_inference_steps": list(values),
        "guidance_scale": guidance,
        "batch": batch,
        "output": "outputs/bench-inversion",
    }
    _carry_out(from_mapping(content), "", output, quiet, json_)


@app.command("edits")
def edits(
    ctx: typer.Context,
    overrides: Overrides = None,
    config: Config = None,
    scenes: Annotated[int, typer.Option(min=1, help="Cases per task.")] = 8,
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Steps, T.")] = 25,
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; by default all.")] = "",
    controls: Annotated[str, typer.Option(help="Controls, separated by semicolons; by default all.")] = "",
    inversions: Annotated[str, typer.Option(help="Inversion methods, separated by commas.")] = "easyinv",
    model: Annotated[str, typer.Option(help="A model folder, a hub name, or 'embedded'.")] = "embedded",
    guidance: Annotated[float, typer.Option(min=0, max=100, help="Guidance scale.")] = 3.0,
    output: Output = None,
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Edit pictures under every control and compare: rendered scenes with their true result, or a published set.

    --config reads a file, such as pie_bench, and KEY=VALUE decides its keys otherwise; without it the options do. Stopped at
    any moment it goes on where it was when the same command is given again.
    """
    if config is not None:
        _carry_out(*_configured(ctx, config, overrides, "edits"), output, quiet, json_)
        return
    _refuse_overrides(overrides, "--tasks shape,colour")
    from easyinv_edit.evaluation.benchmark import from_mapping
    from easyinv_edit.evaluation.ground_truth import ALL_TASKS
    from easyinv_edit.evaluation.variants import CONTROLS
    from easyinv_edit.inversion import INVERSIONS

    listed = controls if ";" in controls or not controls else f"{controls};"
    content = {
        "kind": "edits",
        "title": "Edits of rendered scenes against their true result",
        "data": {"set": "tabletop_edits", "count": scenes, "tasks": list(_names(tasks, ALL_TASKS, "--tasks"))},
        "model": model,
        "controls": list(_names(listed, CONTROLS, "--controls")),
        "inversions": list(_names(inversions, INVERSIONS, "--inversions")),
        "num_inference_steps": [steps],
        "guidance_scale": guidance,
        "output": "outputs/bench-edits",
    }
    _carry_out(from_mapping(content), "", output, quiet, json_)


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
    """Count evaluations and seconds of MasaCtrl edits against the authors' four-row layout, and every controller's memory."""
    counts = _steps(prompts, "--prompts")
    terminal.settle(quiet)
    from easyinv_edit.evaluation import cost_bench
    from easyinv_edit.evaluation.benchmark import FIRST_SEED
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
    shares = "; ".join(f"{row['control']} {row['extra']:+.1%}" for row in memory)
    note = f"peak memory of a step against {memory[0]['plain']:,} bytes plain (three rows; those of two sources four): {shares}"
    facts = {"table": table, "memory": memory}
    terminal.show(facts, quiet, json_, lambda found: f"{markdown(found['table'], COST_COLUMNS)}\n\n{note}")


app.command("regimes")(cli_regimes.regimes)
app.command("speed")(cli_speed.speed)
SHAPES = ("ball", "cube", "cone", "cylinder")


OPTION_KEYS = {
    "images": "data.count",
    "scenes": "data.count",
    "steps": "num_inference_steps",
    "methods": "inversions",
    "inversions": "inversions",
    "tasks": "data.tasks",
    "controls": "controls",
    "folder": "data.path",
    "guidance": "guidance_scale",
    "model": "model",
    "batch": "batch",
    "dtype": "dtypes",
    "device": "device",
}
"""What an option is called in a benchmark's file."""


def _configured(ctx: typer.Context, name: str, overrides: Sequence[str] | None, kind: str) -> tuple[Benchmark, str]:
    """The benchmark of a file and what config.yaml will hold. Raises InputError where options would decide it too."""
    from easyinv_edit.errors import InputError
    from easyinv_edit.evaluation import benchmark

    sources = {key: ctx.get_parameter_source(key) for key in OPTION_KEYS}
    given = [key for key, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        instead = ", ".join(f"{OPTION_KEYS[key]}=... for --{key}" for key in given)
        raise InputError(f"--{given[0]}: with --config the file decides; write {instead}")
    path = terminal.config_file("benchmarks", name)
    made, text = benchmark.read(path, overrides or ())
    if made.kind != kind:
        command = "inversion" if made.kind == "inversion" else "edits"
        raise InputError(f"{path}: is of kind {made.kind}; run it by `easyinv-edit bench {command} --config {name}`")
    changed = [f"# {override}" for override in overrides or ()]
    return made, "\n".join(
        [text.rstrip(), *(["", "# decided otherwise on the command line:", *changed] if changed else []), ""]
    )


def _refuse_overrides(overrides: Sequence[str] | None, several: str) -> None:
    """Raise InputError for words that are no options; several: how one option is given several values."""
    from easyinv_edit.errors import InputError

    if overrides and "=" in overrides[0]:
        raise InputError(f"{overrides[0]!r}: keys are of a benchmark's file; give it with --config, or use the options")
    if overrides:
        raise InputError(f"{overrides[0]!r}: belongs to no option; separate several values of one by commas, e.g. {several}")


def _carry_out(config: Benchmark, text: str, output: str | None, quiet: bool, json_: bool) -> None:
    """Run a benchmark and print its tables; exit code 1 where single results failed."""
    place = Path(output or config.output or f"outputs/bench-{config.kind}")
    terminal.require_writable(place)
    terminal.settle(quiet)
    from easyinv_edit.evaluation import runner, summary_text

    report = (lambda _text: None) if quiet or json_ else (lambda told: typer.echo(told, err=True))
    try:
        done = runner.run(config, place, report, text)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise
    terminal.show(done.summary, quiet, json_, lambda found: summary_text.markdown(found).rstrip())
    if done.failed:
        first = done.failed[0]
        typer.echo(
            f"error: {len(done.failed)} of {done.results} results failed, the first {first['item']}, {first['variant']}: "
            f"{first['error']}; {place / 'results.jsonl'} holds them all, and the same command tries them again",
            err=True,
        )
        raise typer.Exit(1)


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
    from easyinv_edit.evaluation import markdown as text

    lines = [["" if row.get(key) is None else format(row[key], spec) for key, _, spec in columns] for row in table]
    return text.table([head for _, head, _ in columns], lines)


def as_csv(table: list[dict[str, Any]]) -> str:
    """The summary as CSV, a line per row."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in table for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return file.getvalue()
