"""`easyinv-edit tabletop`: render scenes, train the embedded model, measure it. Imports nothing heavy at the top."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from easyinv_edit import terminal
from easyinv_edit.terminal import Debug, Json

app = typer.Typer(no_args_is_help=True, help="The tabletop world and the embedded model.")


@app.command("render")
def render_scenes(
    seeds: Annotated[list[int], typer.Argument(help="Scene seeds.")],
    output: Annotated[str, typer.Option("--output", "-o")] = "outputs/scenes",
    table: Annotated[bool, typer.Option("--table", help="Of the wider world, one or two solids at places.")] = False,
    size: Annotated[int, typer.Option(min=16, max=1024, help="Side in pixels.")] = 128,
    debug: Debug = False,
) -> None:
    """Render scenes to PNG files and print their captions; `scene:SEED` and `table:SEED` name them as images of edits."""
    from easyinv_edit.images import save_png
    from easyinv_edit.running import rendered, scene_of
    from easyinv_edit.tabletop.captions import caption

    world = "table" if table else "scene"
    for seed in seeds:
        scene = scene_of(f"{world}:{seed}")
        path = Path(output) / f"{world}-{seed}.png"
        save_png(rendered(scene, (size, size)), path)
        typer.echo(f"{path}: {caption(scene)}")


@app.command("edits")
def render_edits(
    tasks: Annotated[list[str] | None, typer.Argument(help="Kinds of edits, by default all.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Edits of each kind.")] = 4,
    first_seed: Annotated[int, typer.Option(min=0, help="Scenes from here on.")] = 24_000_000,
    output: Annotated[str, typer.Option("--output", "-o")] = "outputs/edits",
    size: Annotated[int, typer.Option(min=16, max=1024, help="Side in pixels.")] = 128,
    debug: Debug = False,
) -> None:
    """Render edits whose true result is known, with masks and both prompts, as a folder that `bench edits --folder` reads."""
    from easyinv_edit.choices import nearest
    from easyinv_edit.errors import InputError
    from easyinv_edit.evaluation.company import COMPANY
    from easyinv_edit.evaluation.datasets import tabletop_edits
    from easyinv_edit.evaluation.edit_files import write
    from easyinv_edit.evaluation.ground_truth import ALL_TASKS

    known = {**ALL_TASKS, **COMPANY}
    if wrong := [name for name in tasks or () if name not in known]:
        raise InputError(f"{wrong[0]!r} is no kind of edit{nearest(wrong[0], known)}; choose {', '.join(known)}")
    chosen = [known[name] for name in tasks or known]
    items = [item for task in chosen for item in tabletop_edits(task, first_seed, count, size)]
    for line in write(items, Path(output)):
        typer.echo(line)


@app.command("train")
def train_model(
    recipe: Annotated[str, typer.Argument(help="A training recipe, or a name from configs/tabletop.")] = "cpu",
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the run; it resumes there.")] = "runs/tabletop",
    start: Annotated[Path | None, typer.Option(help="A finished model's folder, to be trained on.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    debug: Debug = False,
) -> None:
    """Train the embedded model from scratch, or resume; with --start, train a finished one on."""
    terminal.settle(True)
    from easyinv_edit.running import resolve_device
    from easyinv_edit.tabletop.training import read_training_recipe, train

    settings = read_training_recipe(terminal.config_file("tabletop", recipe))
    train(settings, Path(output), resolve_device(device), report=typer.echo, start=start)


@app.command("evaluate")
def evaluate_model(
    model: Annotated[str, typer.Option(help="A model folder or 'embedded'.")] = "embedded",
    output: Annotated[str, typer.Option("--output", "-o")] = "outputs/evaluation",
    scenes: Annotated[int, typer.Option(min=1, help="Held-out scenes per measurement.")] = 24,
    steps: Annotated[int, typer.Option(min=2, help="Steps of every sampling, T.")] = 25,
    sets: Annotated[int, typer.Option(min=1, max=10, help="How often, each time on other scenes with other noise.")] = 1,
    samples: Annotated[
        int | None, typer.Option(min=2, max=10_000, help="Samples of each world and guidance; default: 8 for every scene.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="A model folder whose judge reads the pictures; default: the model's.")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model: autoencoder, samples judged, reconstructions, and edits whose true result is rendered."""
    terminal.settle(True)
    from easyinv_edit.evaluation import tabletop, tabletop_tables

    say = partial(typer.echo, err=True)
    report = tabletop.evaluate(model, Path(output), scenes, steps, say, sets=sets, samples=samples, judge_of=judge)
    terminal.show(report, False, json_, tabletop_tables.text)
