"""EditRecipe: everything that decides an edit, as a YAML file.

`merging` reads it, pydantic checks it. Every problem is reported at once, as `file:line:column: key: what is wrong`, before any
weight is loaded.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from attention_control import CONTROLLERS
from easyinv_edit.choices import build, nearest, plain, problems, shown
from easyinv_edit.errors import RecipeError
from easyinv_edit.feature_storage import FEATURES
from easyinv_edit.inversion import INVERSIONS
from easyinv_edit.merging import merged_content, one_line, place_of, problem_at, refuse_all
from easyinv_edit.models import OVERRIDES, on_disk, preset
from easyinv_edit.places import places_of

REGISTRIES: dict[str, Mapping[str, type[Any]]] = {
    "inversion": INVERSIONS,
    "control": CONTROLLERS,
    "source_features": FEATURES,
}


def no_switch(value: Any) -> Any:
    """YAML's `yes` and `true` are numbers to Python and to pydantic, but not to anyone who writes a recipe."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


Steps = Annotated[int, BeforeValidator(no_switch), Field(ge=1, le=1000)]
Scale = Annotated[float, BeforeValidator(no_switch), Field(ge=0, le=100)]
Share = Annotated[float, BeforeValidator(no_switch), Field(ge=0, le=1)]
Side = Annotated[int, BeforeValidator(no_switch), Field(ge=8, le=4096)]
Seed = Annotated[int, BeforeValidator(no_switch), Field(ge=0, lt=2**63)]


def _default(name: str) -> Any:
    return dataclasses.field(default_factory=lambda: {"name": name})


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class EditRecipe:
    """One edit. Keys are the argument names of `EditPipeline`.

    model: a folder, a hub name, or a name from `models list`, whose recommended keys `read` and `parse` then take as defaults
    instead of those below, also where a recipe names no model and is the embedded one's; schedule: what of the scheduler's
    configuration is decided otherwise; lora, lora_scale: a LoRA file, folder or hub name, and its strength; low_memory: see
    `EditPipeline.enable_low_memory`; image: a file, or a rendered tabletop scene, "scene:SEED" (one solid in the middle) or
    "table:SEED" (one or two at places); style: a second picture, for controllers that read one, with its prompt; prompts: one
    or more target prompts; inversion, control: a name and that method's settings, or settings alone, which refine the
    recommended method; source_features: a name, or {name: exact, dtype: float16, device: cpu, max_bytes: 100000000}; that and
    batch_size: see `EditPipeline.edit`; seed: of all noise that is drawn; size: one side, or [height, width], in pixels, by
    default the model's own; output: the folder for pictures and result.json.
    """

    model: str = "embedded"
    schedule: dict[str, str | bool | int | float] = dataclasses.field(default_factory=dict)
    lora: str | None = None
    lora_scale: Annotated[float, BeforeValidator(no_switch), Field(ge=-10, le=10)] = 1.0
    low_memory: bool = False
    image: str | None = None
    source_prompt: str = ""
    style: str | None = None
    style_prompt: str = ""
    prompts: list[str] = dataclasses.field(default_factory=list)
    negative_prompt: str | None = None
    num_inference_steps: Steps = 50
    inversion: dict[str, Any] = _default("easyinv")
    inversion_guidance_scale: Scale = 1.0
    control: dict[str, Any] = _default("masactrl")
    guidance_scale: Scale = 7.5
    source_guidance_scale: Scale | None = None
    pin_source: bool = True
    source_features: Literal["auto", "live", "exact", "inversion"] | dict[str, Any] = "auto"
    batch_size: Annotated[int, BeforeValidator(no_switch), Field(ge=1, le=1024)] | None = None
    noise_mix: Share = 0.0
    seed: Seed | None = 0
    size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"
    output: str = "outputs/edit"

    def to_yaml(self) -> str:
        """The recipe as YAML with every key written out; `read` gives it back equal.

        Keys that an inversion file given as the image has decided are left out: `read` refuses them, and nothing reads them.
        """
        content = dataclasses.asdict(self)
        for key in decided_keys(content):
            del content[key]
        return str(OmegaConf.to_yaml(OmegaConf.create(_escaped(content))))


INVERSION_KEYS = ("source_prompt", "num_inference_steps", "inversion", "inversion_guidance_scale", "size", "fit")
DECIDED = "decided when the inversion was made; give the image instead, or leave it out"


def decided_keys(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that an inversion file given as the image has decided; a style picture is still inverted by most of them."""
    if not str(content.get("image")).endswith(".safetensors"):
        return ()
    return INVERSION_KEYS if content.get("style") is None else ("source_prompt",)


def _escaped(value: Any) -> Any:
    """The same value with `${` made literal in every string: a prompt may hold what would else be a reference."""
    if isinstance(value, dict):
        return {key: _escaped(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(below) for below in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def read(path: str | os.PathLike[str], overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> EditRecipe:
    """Read a recipe file; see `parse`. Raises RecipeError with every problem."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        problem = f"{path}: cannot be read ({reason}); give a YAML file, or a name from `recipes list`"
        raise RecipeError([one_line(problem)]) from error
    return parse(text, str(path), overrides, values)


def parse(
    text: str, name: str = "recipe", overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> EditRecipe:
    """Read a recipe from YAML text; `name` stands for the file in problems.

    overrides: `key=value` or `group.key=value`, read as YAML; values: keys set as they are, over everything else. Keys that an
    inversion file has decided are problems where the file or the overrides set them beside it. Raises RecipeError with every
    problem, in the file's order.
    """
    places, found = places_of(text, name)
    refuse_all(found)
    content, found = merged_content(text, name, places, overrides, REGISTRIES)
    refuse_all(found)
    asked_again = [] if "image" in (values or {}) else [((key,), DECIDED) for key in decided_keys(content) if key in content]
    content = {**content, **(values or {})}
    content = _over(_recommended(content.get("model", EditRecipe.model)), _named(content))
    problems_found = sorted([*_check(content), *asked_again], key=lambda item: place_of(item[0], places))
    refuse_all([problem_at(name, places, overrides, key, problem) for key, problem in problems_found])
    return EditRecipe(**content)


def _recommended(model: Any) -> dict[str, Any]:
    """The keys that go with a model preset; none where a folder of that name lies here."""
    known = preset(model) if isinstance(model, str) and not on_disk(model) else None
    return _named(known.recipe) if known else {}


def _named(content: dict[str, Any]) -> dict[str, Any]:
    """`inversion: ddim` is short for `inversion: {name: ddim}`, and one prompt for a list of one."""
    result = dict(content)
    for key in ("inversion", "control"):
        if isinstance(content.get(key), str):
            result[key] = {"name": content[key]}
    if isinstance(content.get("prompts"), str):
        result["prompts"] = [content["prompts"]]
    return result


def _over(recommended: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """The content over what is recommended. A named method starts from its own defaults; settings without a name refine the
    recommended method, or the default one."""
    result = {**recommended, **content}
    for key, default in {"inversion": "easyinv", "control": "masactrl", "source_features": "auto"}.items():
        value = result.get(key)
        if isinstance(value, dict) and "name" not in value:
            result[key] = {"name": default, **recommended.get(key, {}), **value}
    return result


SIZES = "should be one side, or [height, width], each a whole number from 8 to 4096"


def _check(content: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """(key path, problem) for everything that is wrong."""
    found: list[tuple[tuple[str, ...], str]] = []
    fields = [f.name for f in dataclasses.fields(EditRecipe)]
    try:
        TypeAdapter(EditRecipe).validate_python(content)
    except ValidationError as error:
        seen = set()
        for item in error.errors(include_url=False):
            path = tuple(str(part) for part in item["loc"])
            key = path[:2] if path[0] in ("prompts", "schedule") else path[:1]
            if item["type"] == "unexpected_keyword_argument":
                found.append((key, f"unknown key{nearest(key[0], fields)}; allowed: {', '.join(fields)}"))
            elif key not in seen:
                found.append((key, f"{SIZES} (got {shown(content['size'])})" if key[0] == "size" else plain(item)))
            seen.add(key)
    for group, registry in REGISTRIES.items():
        if isinstance(content.get(group), dict):
            found += [((group, *path), problem) for path, problem in method_problems(content[group], registry)]
    for key in content["schedule"] if isinstance(content.get("schedule"), dict) else ():
        if key not in OVERRIDES:
            found.append((("schedule", key), f"unknown key{nearest(key, OVERRIDES)}; allowed: {', '.join(OVERRIDES)}"))
    return found or _check_style(content)


def _check_style(content: dict[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """A second picture is given exactly where the controller reads one."""
    control = build(CONTROLLERS, content.get("control", "masactrl"), "controller")
    reads = getattr(control, "sources", 1) > 1
    if reads and content.get("style") is None:
        return [(("control",), f"{control.name} reads a second picture; give it as style")]
    if not reads and content.get("style") is not None:
        return [(("style",), f"{control.name} reads no second picture; leave it out, or use the portrait controller")]
    return []


def method_problems(choice: dict[str, Any], registry: Mapping[str, type[Any]]) -> list[tuple[tuple[str, ...], str]]:
    name = choice.get("name")
    if not isinstance(name, str) or name not in registry:
        return [(("name",), f"{shown(name)} is unknown; choose {', '.join(registry)}{nearest(name, registry)}")]
    method = registry[name]
    below = [
        ((*path, *deeper), problem)
        for path, nested in _nested(choice, method)
        for deeper, problem in method_problems(nested, registry)
    ]
    try:
        method(**{key: value for key, value in choice.items() if key != "name"})
    except ValidationError as error:
        found = [((key,) if key else (), text.removeprefix(f"{key}: ")) for key, text in problems(error, method)]
        told = {path[:1] for path, _ in below}
        return below + [item for item in found if item[0] not in told]
    return below


def _nested(choice: dict[str, Any], method: type[Any]) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """The mappings of methods within a method, with their paths: what it refines, or what it composes."""
    known = {f.name for f in dataclasses.fields(method)}
    parts: list[tuple[tuple[str, ...], Any]] = [(("base",), choice.get("base"))] if "base" in known else []
    several = choice.get("controllers")
    if "controllers" in known and isinstance(several, list):
        parts += [(("controllers", str(i)), part) for i, part in enumerate(several)]
    return [(path, part) for path, part in parts if isinstance(part, dict)]
