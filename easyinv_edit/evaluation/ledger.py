"""A run that can be interrupted: one line of JSON per finished piece of work, and what the run was asked to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyinv_edit.errors import InputError
from easyinv_edit.result import write_text


class Ledger:
    """The results of a run in a folder: `run.json` says what was asked, `results.jsonl` holds a line per result.

    Opened again with the same request it goes on where it stopped; with another one it raises InputError. A line cut short by
    a crash is dropped. key: the fields that tell results apart; a result that is there already is not added again.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any], key: Sequence[str]) -> None:
        self.key = tuple(key)
        self.file = folder / "results.jsonl"
        asked = folder / "run.json"
        if asked.exists() and self._read_request(asked) != json.loads(json.dumps(request)):
            raise InputError(f"{folder}: holds another run ({asked}); choose another output folder, or remove this one")
        write_text(asked, json.dumps(request, indent=2) + "\n")
        self.rows = list(self._sound_lines())
        write_text(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keep finished results, on disk before this returns."""
        fresh = [dict(row) for row in rows if not self.holds(**{name: row.get(name) for name in self.key})]
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in fresh))
        except OSError as error:
            raise InputError(f"{self.file}: cannot be written ({error.strerror or error}); make room, then go on") from error
        self.rows += fresh

    def holds(self, **key: Any) -> bool:
        """Whether some result has these values."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    @staticmethod
    def _read_request(path: Path) -> Any:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _sound_lines(self) -> Iterable[dict[str, Any]]:
        if not self.file.exists():
            return
        for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
