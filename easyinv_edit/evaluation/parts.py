"""A report in a JSON file that grows part by part, so that an interrupted measurement goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from easyinv_edit.result import write_text


class Parts:
    """What a report holds so far.

    content: as it stands in the file, head and parts; places in it, mappings, are made by whoever measures.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """path: of the file, written whole after every part; head: what is measured and how, JSON-able: the parts of a file
        that says all of it alike are taken over, any other is begun anew; say: told what is being done."""
        self.path, self._say = path, say
        before, wanted = _read(path), json.loads(json.dumps(head))
        same = before is not None and all(before.get(key) == value for key, value in wanted.items())
        if before and not same:
            say(f"{path}: is of another measurement; begun anew")
        self.content: dict[str, Any] = before if before and same else wanted

    def add(self, place: dict[str, Any], name: str, title: str, measure: Callable[[], Any]) -> None:
        """Measure what a place of the content calls `name`, unless it is there. title: what it is to be told as."""
        if name in place:
            return
        self._say(title)
        place[name] = measure()
        write_text(self.path, json.dumps(self.content, indent=2) + "\n")


def _read(path: Path) -> dict[str, Any] | None:
    """The report there is, if it is one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
