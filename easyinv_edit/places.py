"""Where things stand in a YAML text: line and column of every key, so that a recipe's problems can be pointed at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from easyinv_edit.errors import first_line

Places = Mapping[tuple[str, ...], tuple[int, int]]
"""Line and column, from 1, of every key path of a file."""


def places_of(text: str, name: str) -> tuple[Places, list[str]]:
    """Line and column, from 1, of every key path; and whatever keeps the text from being a mapping of plain keys."""
    try:
        aliases = [token.start_mark for token in yaml.scan(text) if isinstance(token, yaml.AliasToken)]
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        places: dict[tuple[str, ...], tuple[int, int]] = {}
        found = [f"{_mark(name, mark)}: YAML aliases are not allowed; refer to another key as ${{key}}" for mark in aliases]
        if root is not None and not isinstance(root, yaml.MappingNode):
            found.append(f"{name}:1:1: a recipe is a mapping of keys, e.g. 'prompts: [a red cube]'")
        if root is not None and not found:
            found += _walk(root, (), places, name)
        if not found:
            yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return {}, [f"{_mark(name, mark) if mark else name}: not valid YAML: {error.problem}"]
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        return {}, [f"{name}: not valid YAML: {first_line(error)}"]
    return places, found


def _walk(node: Any, path: tuple[str, ...], places: dict[tuple[str, ...], tuple[int, int]], name: str) -> list[str]:
    """Fill `places` below a YAML node; returns what is wrong with its keys."""
    found = []
    children = [(item, str(i), item) for i, item in enumerate(node.value)] if isinstance(node, yaml.SequenceNode) else []
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        below = (*path, str(key.value))
        if key.tag != "tag:yaml.org,2002:str":
            found.append(f"{_mark(name, key.start_mark)}: a key must be a word; put it in quotes if it is one")
        elif below in places:
            found.append(f"{_mark(name, key.start_mark)}: {'.'.join(below)}: written twice; keep one")
        else:
            children.append((key, str(key.value), value))
            places[below] = (key.start_mark.line + 1, key.start_mark.column + 1)
    for key, word, value in children:
        places[*path, word] = (key.start_mark.line + 1, key.start_mark.column + 1)
        found += _walk(value, (*path, word), places, name)
    return found


def _mark(name: str, mark: Any) -> str:
    return f"{name}:{mark.line + 1}:{mark.column + 1}"


def leaves(text: str) -> list[tuple[tuple[str, ...], str]]:
    """(key path, text) of every scalar value."""

    def walk(value: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
        if isinstance(value, dict):
            return [leaf for key, below in value.items() for leaf in walk(below, (*path, str(key)))]
        if isinstance(value, list):
            return [leaf for i, below in enumerate(value) for leaf in walk(below, (*path, str(i)))]
        return [(path, str(value))]

    return walk(yaml.safe_load(text) or {}, ())
