"""What the tests of figures share: pictures of noise, a run's folder as the runner makes it, and where cells of a grid are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from easyinv_edit.evaluation.bench_grids import APART, GAP

WIDE, HIGH, TIMES = 32, 24, 4
"""Test pictures in pixels, and by what cells magnify them."""
CELL = WIDE * TIMES, HIGH * TIMES
COLUMNS = [
    {"name": "PSNR", "unit": "dB", "better": "higher", "digits": 2},
    {"name": "evaluations", "unit": "", "better": "lower", "digits": 0},
]
WHITE = "white"


def noise(seed: int, size: tuple[int, int] = (WIDE, HIGH)) -> Image.Image:
    """Pixels without any order: no two pictures are alike, and none looks the same after a shift."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def pixels(picture: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(picture.convert("RGB"))


def cell(
    sheet: Image.Image, right: int, below: int, apart: tuple[int, int] = (0, 0), size: tuple[int, int] = CELL
) -> Image.Image:
    """A cell by how many cells stand right of it and below it, and how many gaps between blocks."""
    x = sheet.width - (right + 1) * (size[0] + GAP) - apart[0] * APART
    y = sheet.height - (below + 1) * (size[1] + GAP) - apart[1] * APART
    return sheet.crop((x, y, x + size[0], y + size[1]))


def magnified(picture: Image.Image) -> NDArray[np.uint8]:
    return pixels(picture).repeat(TIMES, 0).repeat(TIMES, 1)


class Folder:
    """A run's folder, made as the runner makes it."""

    def __init__(self, place: Path, kind: str = "inversion") -> None:
        self.place, self.kind = place, kind
        self.rows: list[dict[str, Any]] = []
        self.made: dict[tuple[str, str, str], Image.Image] = {}

    def add(self, item: str, variant: str, keys: Sequence[str] = ("source", "result"), group: str = "", **facts: Any) -> None:
        """A result with pictures; source and truth are the item's."""
        paths = {}
        for key in keys:
            owner = item if key in ("source", "truth") else variant
            if (item, owner, key) not in self.made:
                self.made[item, owner, key] = picture = noise(len(self.made))
                target = self.place / "pictures" / f"{len(self.made):05d}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                picture.save(target)
            paths[key] = f"pictures/{list(self.made).index((item, owner, key)) + 1:05d}.png"
        row = {"kind": self.kind, "item": item, "group": group, "variant": variant, **facts}
        self.rows.append(row | ({"pictures": paths} if paths else {}))

    def write(self, tables: Sequence[dict[str, Any]] = (), columns: Sequence[dict[str, Any]] = tuple(COLUMNS)) -> Path:
        self.place.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        (self.place / "results.jsonl").write_text(text, encoding="utf-8")
        content = {
            "title": "Test",
            "kind": self.kind,
            "columns": list(columns),
            "tables": list(tables),
            "published": [],
            "notes": [],
        }
        (self.place / "summary.json").write_text(json.dumps(content), encoding="utf-8")
        return self.place

    def picture(self, item: str, variant: str, key: str = "result") -> Image.Image:
        return self.made[item, item if key in ("source", "truth") else variant, key]


def table(*rows: dict[str, Any], group: str = "") -> dict[str, Any]:
    return {"title": group or "all", "group": group, "rows": list(rows)}


def line(variant: str, psnr: float | None, evaluations: float | None, **others: Any) -> dict[str, Any]:
    return {"variant": variant, "n": 1, "PSNR": psnr, "evaluations": evaluations, **others}


def names(files: Sequence[Path]) -> list[str]:
    return [file.name for file in files]


def sheet(folder: Path, name: str = "grid") -> Image.Image:
    return Image.open(folder / "figures" / f"{name}.png")
