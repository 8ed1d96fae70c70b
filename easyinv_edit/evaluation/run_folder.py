"""A benchmark run's folder, read: its results, its summary and its pictures, as far as they are there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from easyinv_edit.errors import ImageError
from easyinv_edit.evaluation.bench_grids import Cell, shrunk
from easyinv_edit.evaluation.ledger import sound_rows
from easyinv_edit.images import load


@dataclass(frozen=True)
class Run:
    """What figures show of a run. rows: the sound results; summary: the content of summary.json, empty where there is none."""

    folder: Path
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]

    @cached_property
    def results(self) -> Mapping[tuple[str, str], Mapping[str, Any]]:
        """By variant and item."""
        return {(row["variant"], row["item"]): row for row in self.rows}

    @cached_property
    def variants(self) -> Sequence[str]:
        """In the tables' order."""
        listed = [row.get("variant") for table in self.tables[:1] for row in table["rows"]]
        known = dict.fromkeys(row["variant"] for row in self.rows)
        return [*(name for name in listed if name in known), *(name for name in known if name not in listed)]

    @cached_property
    def parts(self) -> Mapping[str, Mapping[str, Any]]:
        """A row of every variant, which says what it is made of."""
        return {row["variant"]: row for row in reversed(self.rows)}

    @property
    def kind(self) -> str:
        """Of the benchmark: "inversion" or "edits"."""
        return next((str(row["kind"]) for row in self.rows if "kind" in row), "inversion")

    @property
    def title(self) -> str:
        """The benchmark's, empty where it is not known."""
        return str(self.summary.get("title") or "")

    @property
    def tables(self) -> Sequence[Mapping[str, Any]]:
        """Those of the summary that hold rows."""
        return [table for table in self.summary.get("tables", []) if isinstance(table.get("rows"), list)]

    def groups(self) -> dict[str, list[str]]:
        """Items by group, in their order; for inversions all of them first, where there are several groups."""
        found: dict[str, list[str]] = {}
        for item, group in {row["item"]: str(row.get("group") or "") for row in self.rows}.items():
            found.setdefault(group, []).append(item)
        if self.kind == "edits" or len(found) < 2:
            return found
        return {"": list(dict.fromkeys(row["item"] for row in self.rows)), **{g: own for g, own in found.items() if g}}

    def tells(self, variant: str, item: str, key: str) -> bool:
        """Whether there is such a picture, or an error in its place."""
        row = self.results.get((variant, item), {})
        return "error" in row or key in (row.get("pictures") or {})

    def picture(self, variant: str, item: str, key: str) -> Cell:
        """One of a result's pictures, at most as high as a cell; in words where there is none."""
        row = self.results.get((variant, item), {})
        path = (row.get("pictures") or {}).get(key)
        if path is None:
            return "error" if "error" in row else ""
        place = PurePosixPath(str(path))
        if place.is_absolute() or ".." in place.parts:
            return "outside of the folder"  # figures go further than it
        try:
            return shrunk(load(self.folder / place))
        except ImageError:
            return "unreadable"

    def shared(self, item: str, key: str) -> Cell:
        """A picture that an item's variants have in common."""
        owners = (v for v in self.variants if key in (self.results.get((v, item), {}).get("pictures") or {}))
        return next((self.picture(variant, item, key) for variant in owners), "")


def read(folder: Path) -> Run:
    """The results and the summary of a run's folder, as far as they are there."""
    rows = [row for row in sound_rows(folder) if isinstance(row.get("item"), str) and isinstance(row.get("variant"), str)]
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = {}
    return Run(folder, rows, summary if isinstance(summary, dict) else {})
