"""A recipe's text and the command line's overrides as one mapping, and every problem at its place.

OmegaConf reads, merges overrides and resolves references between keys. References to the environment are refused: a recipe from
a stranger must not read it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from easyinv_edit.errors import RecipeError
from easyinv_edit.places import Places, leaves

NO_RESOLVERS = "references such as ${oc.env:NAME} are not allowed; write the value"
SHAPE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=.*", re.S)


def refuse_all(found: Sequence[str]) -> None:
    if found:
        raise RecipeError([one_line(problem) for problem in found])


def one_line(text: str) -> str:
    """Keys, file names and values may hold line breaks; a problem may not."""
    return " ".join(text.splitlines())


def merged_content(
    text: str, name: str, places: Places, overrides: Sequence[str], groups: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """The file and the overrides as one mapping with references resolved, or what keeps them from being read.

    groups: keys whose value may be a mere name, short for a mapping that holds it.
    """
    found = [f"{_at(name, key, places)}: {NO_RESOLVERS}" for key, value in leaves(text) if _reads_outside(value)]
    found += [problem for o in overrides if (problem := _unreadable(o))]
    if found:
        return {}, found
    try:
        merged = OmegaConf.create(text if yaml.safe_load(text) else "{}")
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        return {}, [_reference_problem(name, places, (), error)]
    for override in overrides:
        try:
            merged = OmegaConf.merge(_spelled_out(merged, override, groups), OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, TypeError, ValueError):
            return {}, [f"command line: {override!r}: does not fit what the recipe holds there; give the key's whole value"]
    try:
        content = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        return {}, [_reference_problem(name, places, overrides, error)]
    return {str(key): value for key, value in content.items()}, []


def _spelled_out(content: Any, override: str, groups: Collection[str]) -> Any:
    """The content with `control: x` as `control: {name: x}` where an override sets a key below it, which would else drop x."""
    group, _, below = override.split("=")[0].partition(".")
    short = below and below != "name" and group in groups and isinstance(content.get(group), str)
    return OmegaConf.merge(content, {group: {"name": content[group]}}) if short else content


def _unreadable(override: str) -> str | None:
    """What keeps a `key=value` from being read, or None."""
    if not SHAPE.fullmatch(override):
        return f"command line: {override!r}: write key=value, e.g. guidance_scale=5"
    if _reads_outside(override):
        return f"command line: {override!r}: {NO_RESOLVERS}"
    try:
        OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or str(error).strip().split("\n")[0]
        return f"command line: {override!r}: the value is not valid YAML: {reason}; put it in quotes"
    return None


def _reference_problem(name: str, places: Places, overrides: Sequence[str], error: Exception) -> str:
    """A reference `${key}` that leads nowhere or cannot be read, at its place."""
    path = tuple(re.findall(r"[^.\[\]]+", str(getattr(error, "full_key", None) or "")))
    reason = str(error).strip().split("\n")[0]
    return problem_at(name, places, overrides, path, f"{reason}; a reference is ${{key}} with another key of this file")


def _reads_outside(value: str) -> bool:
    """Whether a value refers to anything but another key: `${oc.env:X}`, or any other resolver."""
    return bool(re.search(r"\$\{[^}]*:", value))


def place_of(path: tuple[str, ...], places: Places) -> tuple[int, int]:
    """Where a key is written, or the nearest key above it; (0, 0) for a key that is nowhere in the file."""
    return next((places[path[:length]] for length in range(len(path), 0, -1) if path[:length] in places), (0, 0))


def _at(name: str, path: tuple[str, ...], places: Places) -> str:
    line, column = place_of(path, places)
    return f"{name}:{line}:{column}: {'.'.join(path)}" if line else f"{name}: {'.'.join(path)}"


def problem_at(name: str, places: Places, overrides: Sequence[str], path: tuple[str, ...], problem: str) -> str:
    """One problem with its place: the override that set the key, else the key in the file."""
    key = ".".join(path)
    for override in reversed(overrides):
        given = override.split("=")[0]
        if given == key or key.startswith(f"{given}.") or given.startswith(f"{key}."):
            return f"command line: {override!r}: {key}: {problem}"
    return f"{_at(name, path, places)}: {problem}"
