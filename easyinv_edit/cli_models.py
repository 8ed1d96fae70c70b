"""`easyinv-edit models`: presets of published models, and whether a model on disk can be used. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from easyinv_edit import terminal
from easyinv_edit.terminal import Debug, Json

if TYPE_CHECKING:
    from easyinv_edit.model_check import ModelReport

app = typer.Typer(no_args_is_help=True, help="List and show model presets, and check models on disk.")


@app.command("list")
def list_presets(json_: Json = False, debug: Debug = False) -> None:
    """The models with a preset."""
    from easyinv_edit.models import presets

    found = {name: {"title": known.title, "family": known.family, "id": known.id} for name, known in presets().items()}
    lines = (f"{name:16} {known['family']:6} {known['title']}" for name, known in found.items())
    typer.echo(json.dumps(found, indent=2) if json_ else "\n".join(lines))


@app.command("show")
def show_preset(
    name: Annotated[str, typer.Argument(help="A name from `models list`.")], json_: Json = False, debug: Debug = False
) -> None:
    """A preset: where its model is, under which licence, how much memory it takes, and recommended settings."""
    from easyinv_edit.choices import nearest
    from easyinv_edit.errors import InputError
    from easyinv_edit.models import preset

    known, files = preset(name), {path.stem: path for path in terminal.shipped("models")}
    if known is None:
        raise InputError(f"model preset {name!r} is unknown; choose {', '.join(files)}{nearest(name, files)}")
    typer.echo(json.dumps(asdict(known), indent=2) if json_ else files[name].read_text(encoding="utf-8").rstrip())


@app.command("check")
def check_model(
    model: Annotated[str, typer.Argument(help="A folder, or a name from `models list` to be looked up in the hub cache.")],
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Whether a model on disk can be used, and what it is; nothing is loaded. Exit code 1 where it cannot be used."""
    from easyinv_edit.model_check import examine

    report = examine(model)
    typer.echo(json.dumps(report.facts(), indent=2) if json_ else "\n".join(_lines(report)))
    if not report.usable:
        raise typer.Exit(1)


def _lines(report: ModelReport) -> Iterator[str]:
    yield f"{report.path}: {'can be used' if report.usable else 'cannot be used'}"
    yield from (f"problem: {problem}" for problem in report.problems)
    facts = {
        "family": report.family,
        "pipeline": report.pipeline,
        "prediction": report.prediction_type,
        "timesteps": _timesteps(report),
        "trained at": None if report.native_size is None else "{} x {} pixels".format(*report.native_size),
        "text width": report.cross_attention_dim,
        "sites": None if report.self_attention_sites is None else f"{report.self_attention_sites} of self-attention",
        "on disk": _size(report.bytes_on_disk) if report.bytes_on_disk else None,
        "presets": ", ".join(report.presets) or ("none fits" if report.usable else None),
    }
    yield from (f"{name:12} {value}" for name, value in facts.items() if value is not None)
    for name, part in report.parts.items():
        yield f"{name:16} {part.parameters / 1e6:.1f} M parameters, {part.dtype}, {_size(part.bytes)}"
    yield from (f"note: {note}" for note in report.notes)


def _timesteps(report: ModelReport) -> str | None:
    ends = ", zero terminal SNR" if report.zero_terminal_snr else ""
    return None if report.timestep_spacing is None else f"{report.timestep_spacing}{ends}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
