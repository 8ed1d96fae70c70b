"""EditRecipe: everything that decides an edit, as a YAML file.

OmegaConf reads, merges overrides and resolves references between keys; pydantic checks. Every problem is reported at once, as
`file:line:column: key: what is wrong`, before any weight is loaded. References to the environment are refused: a recipe from
a stranger must not read it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from attention_control import CONTROLLERS
from easyinv_edit.choices import nearest, plain, problems
from easyinv_edit.errors import RecipeError
from easyinv_edit.inversion import INVERSIONS

REGISTRIES: dict[str, Mapping[str, type[Any]]] = {"inversion": INVERSIONS, "control": CONTROLLERS}
Steps = Annotated[int, Field(ge=1, le=1000)]
Scale = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Side = Annotated[int, Field(ge=8, le=4096)]


def _default(name: str) -> Any:
    return dataclasses.field(default_factory=lambda: {"name": name})


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class EditRecipe:
    """One edit. Keys are the argument names of `EditPipeline`.

    model: a folder, a hub name or "embedded"; image: a file, or "scene:SEED" for a rendered tabletop scene; prompts: one or more
    target prompts; inversion, control: a name and that method's settings; seed: of the fresh noise that `noise_mix` asks for;
    size: one side, or [height, width], in pixels, by default the model's own; output: the folder for pictures and result.json.
    """

    model: str = "embedded"
    image: str | None = None
    source_prompt: str = ""
    prompts: list[str] = dataclasses.field(default_factory=list)
    negative_prompt: str | None = None
    num_inference_steps: Steps = 50
    inversion: dict[str, Any] = _default("easyinv")
    inversion_guidance_scale: Scale = 1.0
    control: dict[str, Any] = _default("masactrl")
    guidance_scale: Scale = 7.5
    source_guidance_scale: Scale | None = None
    pin_source: bool = True
    noise_mix: Share = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = 0
    size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    device: str = "auto"
    output: str = "outputs/edit"

    def to_yaml(self) -> str:
        """The recipe as YAML with every key written out; `read` gives it back equal."""
        return str(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(self))))  # type: ignore[call-overload]


def read(path: str | os.PathLike[str], overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> EditRecipe:
    """Read a recipe file; see `parse`. Raises RecipeError with every problem."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError([f"{path}: cannot be read ({reason}); give a YAML file, or a name from `recipes list`"]) from error
    return parse(text, str(path), overrides, values)


def parse(
    text: str, name: str = "recipe", overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> EditRecipe:
    """Read a recipe from YAML text; `name` stands for the file in problems.

    overrides: `key=value` or `group.key=value`, read as YAML; values: keys set as they are, over everything else. Raises
    RecipeError with every problem.
    """
    places, found = _places(text, name)
    if found:
        raise RecipeError(found)
    outside = [f"{_at(name, key, places)}: {NO_RESOLVERS}" for key, value in _leaves(text) if _reads_outside(value)]
    content, unreadable = _merged(text, name, overrides)
    if found := outside + unreadable:
        raise RecipeError(found)
    content = _with_names({**content, **(values or {})})
    found = [_line(name, places, overrides, key, problem) for key, problem in _check(content)]
    if found:
        raise RecipeError(found)
    return EditRecipe(**content)


NO_RESOLVERS = "references such as ${oc.env:NAME} are not allowed; write the value"


def _merged(text: str, name: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The file and the overrides as one mapping, or what keeps them from being read."""
    shape = r"[A-Za-z_][\w.]*=.*"
    found = [f"command line: {o!r}: write key=value, e.g. guidance_scale=5" for o in overrides if not re.fullmatch(shape, o, re.S)]
    found += [f"command line: {o!r}: {NO_RESOLVERS}" for o in overrides if _reads_outside(o)]
    if found or any(_reads_outside(value) for _, value in _leaves(text)):
        return {}, found
    try:
        merged = OmegaConf.merge(OmegaConf.create(text or "{}"), OmegaConf.from_dotlist(list(overrides)))
        content = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        return {}, [f"{name}: {str(error).strip().splitlines()[0]}"]
    return {str(key): value for key, value in content.items()}, []  # type: ignore[union-attr]


def _with_names(content: dict[str, Any]) -> dict[str, Any]:
    """`inversion: ddim` is short for `inversion: {name: ddim}`; settings without a name belong to the default method."""
    defaults = {"inversion": "easyinv", "control": "masactrl"}
    result = dict(content)
    for key, default in defaults.items():
        value = content.get(key)
        if isinstance(value, str):
            result[key] = {"name": value}
        elif isinstance(value, dict):
            result[key] = {"name": default, **value}
    if isinstance(content.get("prompts"), str):
        result["prompts"] = [content["prompts"]]
    return result


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
            key = path[:2] if path[0] in ("prompts", "size") and path[1:2] and path[1].isdigit() else path[:1]
            if item["type"] == "unexpected_keyword_argument":
                found.append((key, f"unknown key{nearest(key[0], fields)}; allowed: {', '.join(fields)}"))
            elif key not in seen:
                found.append((key, plain(item)))
            seen.add(key)
    for group, registry in REGISTRIES.items():
        if isinstance(content.get(group), dict):
            found += [((group, *path), problem) for path, problem in _check_method(content[group], registry)]
    return found


def _check_method(choice: dict[str, Any], registry: Mapping[str, type[Any]]) -> list[tuple[tuple[str, ...], str]]:
    name = choice.get("name")
    if name not in registry:
        return [(("name",), f"{name!r} is unknown; choose {', '.join(registry)}{nearest(name, registry)}")]
    try:
        registry[name](**{key: value for key, value in choice.items() if key != "name"})
    except ValidationError as error:
        return [((key,), text.removeprefix(f"{key}: ")) for key, text in problems(error, registry[name])]
    return []


Places = Mapping[tuple[str, ...], tuple[int, int]]


def _places(text: str, name: str) -> tuple[Places, list[str]]:
    """Line and column, from 1, of every key path; or the problem that keeps the text from being YAML."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        return {}, [f"{name}{place}: not valid YAML: {error.problem}"]
    except yaml.YAMLError as error:
        return {}, [f"{name}: not valid YAML: {str(error).splitlines()[0]}"]
    places: dict[tuple[str, ...], tuple[int, int]] = {}
    found: list[str] = []
    if root is not None and not isinstance(root, yaml.MappingNode):
        return {}, [f"{name}:1:1: a recipe is a mapping of keys, e.g. 'prompts: [a red cube]'"]

    def walk(node: Any, path: tuple[str, ...]) -> None:
        children = node.value if isinstance(node, yaml.MappingNode) else ()
        for key, value in children:
            place = (key.start_mark.line + 1, key.start_mark.column + 1)
            below = (*path, str(key.value))
            if below in places:
                found.append(f"{name}:{place[0]}:{place[1]}: {'.'.join(below)}: written twice; keep one")
            places[below] = place
            walk(value, below)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                places[(*path, str(i))] = (item.start_mark.line + 1, item.start_mark.column + 1)
                walk(item, (*path, str(i)))

    if root is not None:
        walk(root, ())
    return places, found


def _leaves(text: str) -> list[tuple[tuple[str, ...], str]]:
    """(key path, text) of every scalar value."""

    def walk(value: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
        if isinstance(value, dict):
            return [leaf for key, below in value.items() for leaf in walk(below, (*path, str(key)))]
        if isinstance(value, list):
            return [leaf for i, below in enumerate(value) for leaf in walk(below, (*path, str(i)))]
        return [(path, str(value))]

    return walk(yaml.safe_load(text) or {}, ())


def _reads_outside(value: str) -> bool:
    """Whether a value refers to anything but another key: `${oc.env:X}`, or any other resolver."""
    return bool(re.search(r"\$\{[^}]*:", value))


def _at(name: str, path: tuple[str, ...], places: Places) -> str:
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            line, column = places[path[:length]]
            return f"{name}:{line}:{column}: {'.'.join(path)}"
    return f"{name}: {'.'.join(path)}"


def _line(name: str, places: Places, overrides: Sequence[str], path: tuple[str, ...], problem: str) -> str:
    key = ".".join(path)
    given = [o for o in overrides if o.split("=")[0] == key or (len(path) > 1 and o.split("=")[0] == path[0])]
    if given:
        return f"command line: {given[-1]!r}: {key}: {problem}"
    return f"{_at(name, path, places)}: {problem}"
