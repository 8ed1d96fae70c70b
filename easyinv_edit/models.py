"""Model presets: what is known of a published checkpoint, and the settings to edit with it. Imports nothing heavy.

A preset is a file of `configs/models`: a comment with the model's name, then the keys of `ModelPreset`. Its `recipe` holds keys
of an EditRecipe; whoever reads them checks them there, and a test does so for every preset that is shipped.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from easyinv_edit.choices import nearest, plain
from easyinv_edit.errors import RecipeError
from easyinv_edit.places import Places, places_of
from easyinv_edit.terminal import shipped

Text = Annotated[str, Field(min_length=1)]
Prediction = Literal["epsilon", "v_prediction"]
OVERRIDES = (
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "steps_offset",
    "timestep_spacing",
)
"""What may be decided over a scheduler's configuration, by diffusers' names."""


def _override(key: str) -> str:
    if key not in OVERRIDES:
        raise ValueError(f"is unknown{nearest(key, OVERRIDES)}; allowed: {', '.join(OVERRIDES)}")
    return key


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class UNetKind:
    """What tells a model's UNet from another family's or version's: what it predicts, and how wide its text is."""

    prediction_type: Prediction
    cross_attention_dim: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ModelPreset:
    """A published checkpoint and how to edit with it.

    name: the file's, by which it is chosen; title: the file's first line; id: its name on the hub; family: of its adapter;
    licence: of the weights; memory: what they take, and an edit beside them; unet: see `UNetKind`; schedule: what is decided
    over its scheduler's configuration; recipe: recommended keys of an EditRecipe, among them `size`, the side in pixels it was
    trained at; load: lines of Python that build `pipe`, where loading `id` is not enough, else empty.
    """

    name: Text
    title: Text
    id: Text
    family: Literal["sd", "sdxl"]
    licence: Text
    memory: Text
    unet: UNetKind
    schedule: dict[Annotated[str, AfterValidator(_override)], str | bool | int | float]
    recipe: dict[str, Any]
    load: str = ""

    @property
    def size(self) -> int | None:
        """The side in pixels the model was trained at."""
        return self.recipe.get("size")


def presets() -> dict[str, ModelPreset]:
    """Every shipped preset by its name. Raises RecipeError with every problem of every file."""
    found, problems = {}, []
    for path in shipped("models"):
        try:
            found[path.stem] = read_preset(path)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return found


def preset(name: str) -> ModelPreset | None:
    """The shipped preset of that name, or None."""
    return next((read_preset(path) for path in shipped("models") if path.stem == name), None)


def read_preset(path: Path) -> ModelPreset:
    """Read one preset. Raises RecipeError with every problem, each a line `file:line:column: key: what is wrong`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError([f"{path}: cannot be read ({reason})"]) from error
    places, problems = places_of(text, str(path))
    if problems:
        raise RecipeError(problems)
    given = {"name": path.stem, "title": text.split("\n", 1)[0].lstrip("# ") if text.startswith("#") else ""}
    content = yaml.safe_load(text) or {}
    problems = [
        f"{_at(path, (key,), places)}: is no key; the file's name and first line say it" for key in given if key in content
    ]
    try:
        read = TypeAdapter(ModelPreset).validate_python({**content, **given})
    except ValidationError as error:
        problems += [_problem(path, item, places) for item in error.errors(include_url=False)]
    if problems:
        raise RecipeError(problems)
    return read


def _problem(path: Path, item: Any, places: Places) -> str:
    """One of pydantic's errors as a line with its place."""
    key = tuple(str(part) for part in item["loc"] if part != "[key]")
    if key == ("title",):
        return f"{path}:1:1: the first line must be a comment with the model's name"
    if item["type"] == "unexpected_keyword_argument":
        allowed = [f.name for f in fields(UNetKind if len(key) > 1 else ModelPreset) if f.name not in ("name", "title")]
        text = f"unknown key{nearest(key[-1], allowed)}; allowed: {', '.join(allowed)}"
    else:
        text = "is missing" if item["type"].startswith("missing") else plain(item)
    return f"{_at(path, key, places)}: {text}"


def _at(path: Path, key: tuple[str, ...], places: Places) -> str:
    """A key of a file with the place where it is written, or where the nearest key above it is."""
    place = next((places[key[:length]] for length in range(len(key), 0, -1) if key[:length] in places), None)
    return f"{path}:{place[0]}:{place[1]}: {'.'.join(key)}" if place else f"{path}: {'.'.join(key)}"


def on_disk(path: str | os.PathLike[str]) -> Path | None:
    """A path that exists, `~` expanded, or None; never raises, whatever the text is."""
    try:
        found = Path(path).expanduser()
        return found if str(path) and found.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def download_command(hub_name: str) -> str:
    """The shell command that fetches a model into a folder, on a machine with network."""
    return f"hf download {hub_name} --local-dir FOLDER"


def cached_folder(hub_name: str) -> Path | None:
    """Where the local hub cache has a model's index and what else of it was fetched, or None. Never asks the network."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", hub_name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_name, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None
