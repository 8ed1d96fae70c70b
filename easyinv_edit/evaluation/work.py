"""What the benchmarks' kinds share while they run: the open pipeline, the columns, and what a result's row holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from easyinv_edit import images
from easyinv_edit.evaluation.benchmark import Benchmark
from easyinv_edit.evaluation.columns import Measures
from easyinv_edit.evaluation.datasets import EditItem, Item
from easyinv_edit.evaluation.variants import Variant
from easyinv_edit.pipeline import EditPipeline

PICTURES = "pictures"


@dataclass(frozen=True)
class Work:
    """One run in one dtype. numbers: of every item in its set; names: of every variant in file names."""

    config: Benchmark
    pipe: EditPipeline
    measures: Measures
    folder: Path
    numbers: Mapping[str, int]
    names: Mapping[str, str]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures in pixels."""
        side = self.config.size
        return self.pipe.backbone.native_size if side is None else (side, side)

    def options(self) -> dict[str, Any]:
        """What every inversion is told."""
        return {
            "guidance_scale": self.config.inversion_guidance_scale,
            "negative_prompt": self.config.negative_prompt,
            "size": self.config.size,
            "fit": self.config.fit,
        }

    def row(self, item: Item, variant: Variant) -> dict[str, Any]:
        """What a result's row begins with."""
        known: dict[str, Any] = {"kind": self.config.kind, "item": item.name, "group": item.group, **variant.facts()}
        prompt = item.prompt if variant.source_prompt is None else variant.source_prompt
        if self.config.kind == "inversion":
            return {**known, "prompt": prompt}
        return {**known, "prompt": getattr(item, "target_prompt", ""), "source_prompt": prompt}

    def kept(self, item: Item) -> bool:
        """Whether this item's pictures are kept."""
        return self.config.pictures is None or self.numbers[item.name] < self.config.pictures

    def keep(self, item: Item, what: str, picture: Image.Image) -> str:
        """Write one of an item's pictures; its path relative to the run's folder."""
        path = f"{PICTURES}/{self.numbers[item.name]:05d}-{slug(item.name)}.{what}.png"
        images.save_png(picture, self.folder / path)
        return path


class Bench(Protocol):
    """One kind of benchmark."""

    def prepare(self, part: Sequence[Item], variant: Variant) -> Any:
        """What variants of one group share: the inversions of some items."""

    def measure(self, part: Sequence[Item], prepared: Any, variant: Variant) -> list[dict[str, Any]]:
        """A row for each of the items."""


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "item"


def file_names(labels: Sequence[str]) -> dict[str, str]:
    """A part of a file's name for each label, no two alike."""
    return {label: f"{number:02d}-{slug(label)}" for number, label in enumerate(labels)}


def unit(picture: Image.Image) -> Tensor:
    """A picture as (1, 3, H, W) in [0, 1], float32."""
    return images.to_tensor(picture) / 2 + 0.5


def fitted_mask(item: EditItem, size: tuple[int, int], policy: images.Policy) -> Tensor | None:
    """An item's mask at the model's size, (1, 1, H, W) of 0 and 1."""
    mask = item.mask
    if mask is None:
        return None
    drawn = images.to_pil(mask.expand(1, 3, *mask.shape) * 2 - 1)[0]
    return (unit(images.fit(drawn, size, policy)[0])[:, :1] > 0.5).float()


def seeded(seed: int) -> torch.Generator:
    """A generator for one item."""
    return torch.Generator().manual_seed(seed)
