"""Where the weights of perceptual metrics lie, and which of the metrics a run can have. Nothing is ever downloaded.

In a benchmark's configuration:

    weights:
      lpips:
        squeeze: {backbone: squeezenet1_1-b8a52dc0.pth, heads: squeeze.pth}
      clip: clip-vit-large-patch14
      dino: dino-vitb8
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from easyinv_edit.choices import nearest, plain
from easyinv_edit.errors import InputError
from easyinv_edit.evaluation.lpips import LPIPS, Net

Metric: TypeAlias = Callable[..., Tensor]
"""An `LPIPS`, `CLIPScore` or `StructureDistance`: each says how it is called."""
CONFIG = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=CONFIG)
class LPIPSFiles:
    """backbone: torchvision's ImageNet weights; heads: LPIPS's own for that backbone; .pth or .safetensors."""

    backbone: Path
    heads: Path


@dataclass(frozen=True, config=CONFIG)
class Weights:
    """Local weights. lpips: files by net; clip, dino: folders of a CLIP model and of a DINO vision transformer; None: none."""

    lpips: dict[Net, LPIPSFiles] = dataclasses.field(default_factory=dict)
    clip: Path | None = None
    dino: Path | None = None

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any], folder: Path = Path()) -> Weights:
        """The `weights` of a configuration; relative paths start at `folder`. Raises InputError with every problem."""
        try:
            given = TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            raise InputError("; ".join(_problem(item) for item in error.errors(include_url=False))) from error
        lpips = {net: LPIPSFiles(folder / files.backbone, folder / files.heads) for net, files in given.lpips.items()}
        clip, dino = (None if path is None else folder / path for path in (given.clip, given.dino))
        return cls(lpips, clip, dino)


def _problem(item: Mapping[str, Any]) -> str:
    place = ".".join(["weights", *(str(key) for key in item["loc"] if key != "[key]")])
    said = {"missing": "is missing", "unexpected_keyword_argument": "is not known here"}
    return f"{place}: {said.get(item['type']) or plain(item)}"


def _lpips(net: Net, weights: Weights, device: torch.device) -> Metric | str:
    files = weights.lpips.get(net)
    if files is None:
        return f"no weights: weights.lpips.{net} is not given"
    missing = [path for path in (files.backbone, files.heads) if not path.exists()]
    return f"no weights: {missing[0]}" if missing else LPIPS(net, files.backbone, files.heads, device=device)


def _clip(weights: Weights, device: torch.device) -> Metric | str:
    if weights.clip is None or not weights.clip.exists():
        return f"no weights: {weights.clip or 'weights.clip is not given'}"
    from easyinv_edit.evaluation.clip_score import CLIPScore  # late: transformers takes seconds to import

    return CLIPScore(weights.clip, device=device)


def _dino(compat: bool, weights: Weights, device: torch.device) -> Metric | str:
    if weights.dino is None or not weights.dino.exists():
        return f"no weights: {weights.dino or 'weights.dino is not given'}"
    from easyinv_edit.evaluation.dino import StructureDistance

    return StructureDistance(weights.dino, compat=compat, device=device)


METRICS: dict[str, Callable[[Weights, torch.device], Metric | str]] = {
    "LPIPS (vgg)": partial(_lpips, "vgg"),
    "LPIPS (alex)": partial(_lpips, "alex"),
    "LPIPS (squeeze)": partial(_lpips, "squeeze"),
    "CLIP": _clip,
    "DINO structure": partial(_dino, False),
    "DINO structure (0-255)": partial(_dino, True),
}
"""Metrics that need weights. Once loaded, their `name` is what tables say: it tells the net of CLIP and DINO too."""


def load(weights: Weights, wanted: Iterable[str], *, device: str | torch.device = "cpu") -> dict[str, Metric | str]:
    """Each wanted name of `METRICS` with its metric, or with the text "no weights: PATH" where nothing is there.

    A run goes on without a metric; weights that are there and unusable are a mistake: raises InputError, as for unknown names.
    """
    made: dict[str, Metric | str] = {}
    for name in wanted:
        if name not in METRICS:
            raise InputError(f"metric {name!r} is unknown; choose {', '.join(METRICS)}{nearest(name, METRICS)}")
        made[name] = METRICS[name](weights, torch.device(device))
    return made
