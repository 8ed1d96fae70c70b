"""A run that can be interrupted: one line of JSON per finished piece of work, and what the run was asked to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyinv_edit.errors import InputError
from easyinv_edit.result import write_text


class Ledger:
    """The results of a run in a folder: `run.json` says what was asked, `results.jsonl` holds a line per result.

    Opened again with the same request it goes on where it stopped; with another one it raises InputError. A line cut short by
    a crash is dropped, and so is a result with an "error": it is tried again. key: the fields that tell results apart; a result
    that is there already is not added again.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any], key: Sequence[str]) -> None:
        self.key = tuple(key)
        self.file = folder / "results.jsonl"
        refuse_another(folder, request)
        write_text(folder / "run.json", json.dumps(request, indent=2) + "\n")
        self.rows: list[dict[str, Any]] = []
        self._seen: set[tuple[Any, ...]] = set()
        self._take(row for row in sound_rows(folder) if "error" not in row)
        write_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep finished results, on disk before this returns."""
        fresh = self._take(rows)
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in fresh))
        except OSError as error:
            raise InputError(f"{self.file}: cannot be written ({error.strerror or error}); make room, then go on") from error

    def holds(self, **key: Any) -> bool:
        """Whether the result of these values is there; every field of the key must be given."""
        return tuple(key[name] for name in self.key) in self._seen

    def figures(self, measure: Callable[[], Any], tell: Callable[[], object], **key: Any) -> Any:
        """What `measure` gives under these values of the key: from the ledger, or, after `tell`, measured and kept there."""
        if not self.holds(**key):
            tell()
            self.add([{**key, "figures": measure()}])
        return next(row["figures"] for row in self.rows if key.items() <= row.items())

    def _take(self, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Remember the rows that are not there yet, and return them."""
        fresh = []
        for row in rows:
            values = tuple(row.get(name) for name in self.key)
            if values not in self._seen:
                self._seen.add(values)
                fresh.append(dict(row))
        self.rows += fresh
        return fresh


def refuse_another(folder: Path, request: Mapping[str, Any]) -> None:
    """Raise InputError where a folder holds the run of another request."""
    asked = folder / "run.json"
    if not asked.exists():
        return
    given, known = json.loads(json.dumps(request)), _request(asked)
    if known != given:
        keys = [k for k in {**given, **known} if known.get(k) != given.get(k)] if isinstance(known, dict) else []
        where = f"other values of {', '.join(keys)}" if keys else "cannot be read"
        raise InputError(f"{folder}: holds another run ({asked}: {where}); choose another output folder, or remove this one")


def sound_rows(folder: Path) -> list[dict[str, Any]]:
    """The results of a run so far, those with an "error" too; lines that are no JSON are left out."""
    file = folder / "results.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _request(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
