"""The command line. Heavy libraries are imported inside commands, so that `--help` is instant.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. Bad input is one line per problem on stderr, never a traceback
unless `--debug` is given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from easyinv_edit import cli_bench as bench
from easyinv_edit import cli_models as models
from easyinv_edit import cli_report as reports
from easyinv_edit import cli_tabletop as tabletop
from easyinv_edit import terminal
from easyinv_edit.terminal import Debug, Json, Quiet, config_file, shipped

if TYPE_CHECKING:
    from easyinv_edit.recipe import EditRecipe

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
recipes_app = typer.Typer(no_args_is_help=True, help="List, show and check recipes.")
app.add_typer(recipes_app, name="recipes")
app.add_typer(tabletop.app, name="tabletop")
app.add_typer(bench.app, name="bench")
app.add_typer(models.app, name="models")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys, e.g. guidance_scale=5.")]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder for the pictures and result.json.")]
RecipeName = Annotated[str | None, typer.Option("--recipe", "-r", help="A recipe file, or a name from `recipes list`.")]
ControlName = Annotated[str | None, typer.Option("--control", "-c", help="A controller, instead of the recipe's.")]
SourcePrompt = Annotated[str | None, typer.Option("--source-prompt", "-s", help="What the image shows.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"easyinv-edit {version('easyinv-edit')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Edit real images with text, training-free: EasyInv inversion and attention control on diffusion models."""


@app.command()
def demo(output: Output = None, quiet: Quiet = False, json_: Json = False, debug: Debug = False) -> None:
    """Edit two rendered scenes and a photograph with the embedded model, offline."""
    terminal.settle(quiet)
    from easyinv_edit import demo as demonstration

    folder = Path(output or "outputs/demo")
    terminal.require_writable(folder)
    report = demonstration.run(folder, progress=terminal.bars(quiet, json_))
    terminal.show(report, quiet, json_, demonstration.table)


@app.command()
def edit(
    image: Annotated[
        str, typer.Argument(help="An image, an inversion made by `invert` (.safetensors), scene:SEED or table:SEED.")
    ],
    prompt: Annotated[str, typer.Argument(help="What the edited image shall show; several: 'prompts=[FIRST, SECOND]'.")],
    overrides: Overrides = None,
    source_prompt: SourcePrompt = None,
    recipe: RecipeName = None,
    control: ControlName = None,
    output: Output = None,
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Edit an image to a target prompt.

    An inversion file has already decided its image, source prompt, size, steps and inversion method; a recipe's are not used.
    """
    several = prompt.startswith("prompts=")
    overrides = [*([prompt] if several else []), *(overrides or [])]
    given = {"image": image, "prompts": None if several else [prompt], "source_prompt": source_prompt, "output": output}
    values = {key: value for key, value in given.items() if value is not None}
    if image.endswith(".safetensors"):
        _refuse_inversion_keys(overrides, source_prompt)
    _carry_out(_recipe(recipe, _with_control(control, overrides), values), quiet, json_)


@app.command()
def invert(
    image: Annotated[str, typer.Argument(help="An image, scene:SEED or table:SEED.")],
    overrides: Overrides = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The inversion file to write.")] = "inversion.safetensors",
    source_prompt: SourcePrompt = None,
    recipe: RecipeName = None,
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Invert an image once, to be edited many times."""
    terminal.settle(quiet)
    from easyinv_edit.errors import InputError
    from easyinv_edit.running import invert_recipe, open_pipeline, require_readable_image

    if not output.endswith(".safetensors"):
        raise InputError(f"{output}: an inversion file must end in .safetensors, so that `edit` knows it")
    values = {"image": image, **({} if source_prompt is None else {"source_prompt": source_prompt})}
    chosen = _recipe(recipe, overrides, values)
    require_readable_image(image)
    terminal.require_writable(Path(output).parent)
    pipe = open_pipeline(chosen)
    pipe.set_progress_bar_config(disable=not terminal.bars(quiet, json_))
    trajectory = invert_recipe(chosen, pipe)
    trajectory.save(output)
    facts = {"file": output, "evaluations": trajectory.cost.evaluations, "seconds": round(trajectory.cost.seconds, 3)}
    terminal.show(facts, quiet, json_, lambda f: f"{f['file']}: {f['evaluations']} UNet evaluations, {f['seconds']} s")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a name from `recipes list`.")],
    overrides: Overrides = None,
    control: ControlName = None,
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Carry out a recipe."""
    _carry_out(_recipe(recipe, _with_control(control, overrides), {}), quiet, json_)


@app.command()
def doctor(json_: Json = False, debug: Debug = False) -> None:
    """Check versions, devices and the embedded model."""
    terminal.settle(True)
    from dataclasses import asdict

    from easyinv_edit.doctor import examine

    findings = examine()
    lines = [f"{'ok ' if f.good else 'BAD'}  {f.what}: {f.found}" for f in findings]
    typer.echo(json.dumps([asdict(f) for f in findings], indent=2) if json_ else "\n".join(lines))
    if not all(f.good for f in findings):
        raise typer.Exit(1)


app.command("report")(reports.report)


@recipes_app.command("list")
def recipes_list(json_: Json = False, debug: Debug = False) -> None:
    """The recipes that come with this package."""
    found = {path.stem: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for path in shipped()}
    typer.echo(json.dumps(found, indent=2) if json_ else "\n".join(f"{name:24} {first}" for name, first in found.items()))


@recipes_app.command("show")
def recipes_show(name: str, overrides: Overrides = None, debug: Debug = False) -> None:
    """A recipe with every key written out."""
    typer.echo(_recipe(name, overrides, {}).to_yaml(), nl=False)


@recipes_app.command("check")
def recipes_check(names: list[str], debug: Debug = False) -> None:
    """Report every problem of recipes, without loading a model."""
    from easyinv_edit.errors import RecipeError

    found: list[str] = []
    for name in names:
        try:
            _recipe(name, None, {})
        except RecipeError as error:
            found += error.problems
    if found:
        raise RecipeError(found)
    typer.echo(f"{len(names)} recipe{'s' if len(names) > 1 else ''}: no problems")


def _carry_out(recipe: EditRecipe, quiet: bool, json_: bool) -> None:
    terminal.settle(quiet)
    from easyinv_edit import running
    from easyinv_edit.trajectory import Trajectory

    running.require_image_and_prompts(recipe)
    terminal.require_writable(Path(recipe.output))
    image = recipe.image or ""
    stored = Trajectory.load(image) if image.endswith(".safetensors") else None
    for picture in [*([] if stored else [image]), *([recipe.style] if recipe.style else [])]:
        running.require_readable_image(picture)
    running.require_readable_masks(recipe.control)
    pipe = running.open_pipeline(recipe)
    pipe.set_progress_bar_config(disable=not terminal.bars(quiet, json_))
    result = running.edit_recipe(recipe, pipe, stored or running.invert_recipe(recipe, pipe))
    terminal.show(result.save(recipe.output), quiet, json_, lambda facts: _edit_text(facts, recipe.output))


def _with_control(control: str | None, overrides: list[str] | None) -> list[str]:
    """`--control NAME` as the override it stands for, before those of its settings: the recipe's controller is forgotten."""
    return [*([] if control is None else [f"control={control}"]), *(overrides or [])]


def _edit_text(facts: dict[str, Any], folder: str) -> str:
    psnr, ceiling = (facts["reconstruction"].get(key) for key in ("psnr", "vae_psnr"))
    kept = facts["source_features"]
    features = "" if kept is None else f"source features {kept['bytes'] / 1e6:.1f} MB in {kept['dtype']}; "
    return (
        f"{folder}: {', '.join(facts['images'].values())}\n"
        f"UNet evaluations: {_by_phase(facts['evaluations'])}; seconds: {_by_phase(facts['seconds'])}; "
        f"peak memory {facts['peak_memory_bytes'] / 1e9:.1f} GB; {features}"
        f"reconstruction {_decibels(psnr)} (autoencoder alone {_decibels(ceiling)})"
    )


def _by_phase(spent: dict[str, float]) -> str:
    """What each phase of an edit took, in words; the style picture's inversion where there is one."""
    words = {"invert": "to invert", "style": "to invert the style", "edit": "to edit"}
    shown = [(spent[phase], what) for phase, what in words.items() if phase in spent]
    return ", ".join(f"{value if isinstance(value, int) else f'{value:.1f}'} {what}" for value, what in shown)


def _decibels(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} dB"


def _recipe(name: str | None, overrides: list[str] | None, values: dict[str, Any]) -> EditRecipe:
    from easyinv_edit import recipe

    _refuse_given_twice(overrides or [], values)
    if name is None:
        return recipe.parse("", "recipe", overrides or (), values)
    return recipe.read(config_file("recipes", name), overrides or (), values)


def _refuse_given_twice(overrides: list[str], values: dict[str, Any]) -> None:
    """Raise InputError for overrides of keys that arguments and options of the command have set: one of both would be lost."""
    from easyinv_edit.errors import InputError

    if twice := [o for o in overrides if o.split("=")[0].split(".")[0] in values]:
        hint = "; for several prompts leave PROMPT out" if any(o.startswith("prompts=") for o in twice) else ""
        raise InputError(f"command line: {', '.join(map(repr, twice))}: given a second time; give each once{hint}")


def _refuse_inversion_keys(overrides: list[str], source_prompt: str | None) -> None:
    from easyinv_edit.errors import InputError
    from easyinv_edit.recipe import DECIDED, INVERSION_KEYS

    given = [o.split("=")[0] for o in overrides] + ([] if source_prompt is None else ["source_prompt"])
    if wrong := [key for key in given if key.split(".")[0] in ("image", *INVERSION_KEYS)]:
        raise InputError(f"{', '.join(wrong)}: {DECIDED}")


def main() -> None:
    """Entry point: turns exceptions into one line and an exit code."""
    debug = "--debug" in sys.argv
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        from easyinv_edit.errors import EasyInvError, InputError

        if debug:
            raise
        known = isinstance(error, (EasyInvError, ValueError))
        typer.echo(f"error: {error}" if known else f"error: {type(error).__name__}: {error} (--debug shows where)", err=True)
        sys.exit(2 if isinstance(error, InputError) or type(error).__name__ == "ControlError" else 1)


if __name__ == "__main__":
    main()
