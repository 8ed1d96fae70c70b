"""Build a registered method from what a user writes: a name, a name with fields, or a ready object."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from easyinv_edit.errors import InputError


def build(registry: Mapping[str, type[Any]], choice: Any, what: str) -> Any:
    """`choice` as an object of `registry`.

    choice: a registered name; a mapping with "name" and the method's fields; or an object, which is returned as it is. what:
    how to call it in errors ("inversion method"). Raises InputError naming the allowed names or fields and the nearest match.
    """
    if isinstance(choice, str):
        choice = {"name": choice}
    if not isinstance(choice, Mapping):
        return choice
    fields = {key: value for key, value in choice.items() if key != "name"}
    name = choice.get("name")
    if not isinstance(name, str) or name not in registry:
        raise InputError(f"{what} {shown(name)} is unknown; choose {', '.join(registry)}{nearest(name, registry)}")
    try:
        return registry[name](**{str(key): value for key, value in fields.items()})
    except ValidationError as error:
        raise InputError(f"{what} {name}: {'; '.join(text for _, text in problems(error, registry[name]))}") from error


def problems(error: ValidationError, method: type[Any]) -> list[tuple[str, str]]:
    """(field, one line) for every problem of a method's settings."""
    allowed = [f.name for f in dataclasses.fields(method)]
    lines = {}
    for item in error.errors(include_url=False):
        if not item["loc"]:  # settings that do not go together
            lines[""] = str(item["msg"]).removeprefix("Value error, ")
            continue
        key = str(item["loc"][0])
        if item["type"] == "unexpected_keyword_argument":
            lines[key] = (
                f"{key}: unknown setting of {method.name}; allowed: {', '.join(allowed) or 'none'}{nearest(key, allowed)}"
            )
        elif item["type"] in ("missing", "missing_argument"):
            lines[key] = f"{key}: is missing; {method.name} needs it"
        else:
            lines.setdefault(key, f"{key}: {plain(item)}")
    return list(lines.items())


def plain(item: Mapping[str, Any]) -> str:
    """A pydantic error as one plain clause that names what was given."""
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return f"{message} (got {shown(item['input'])})"


def shown(value: Any) -> str:
    """What was given, cut where it is too long for a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(word: Any, allowed: Any) -> str:
    """The question "did you mean 'x'?" where something allowed is close, else nothing."""
    match = difflib.get_close_matches(str(word), list(allowed), n=1)
    return f" - did you mean {match[0]!r}?" if match else ""


def describe(method: Any) -> dict[str, Any]:
    """A method as the mapping a recipe would hold: its name and fields, those of a method within it likewise."""
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    content = {f.name: getattr(method, f.name) for f in fields}
    return {
        "name": getattr(method, "name", type(method).__name__),
        **{key: _described(value) for key, value in content.items()},
    }


def _described(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return describe(value)
    if isinstance(value, tuple | list) and any(dataclasses.is_dataclass(item) for item in value):
        return [_described(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float | list | tuple | dict):
        return value
    return str(value) if isinstance(value, os.PathLike) else f"({type(value).__name__} in memory)"
