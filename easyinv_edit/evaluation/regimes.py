"""Where EasyInv reconstructs better than DDIM inversion, and where worse: guidance, T, its eta and window, and backgrounds.

Every setting is compared with DDIM inversion on the same pictures, sampled back alone under the caption it was inverted with.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from PIL import Image

from easyinv_edit.errors import EasyInvWarning
from easyinv_edit.evaluation.benchmark import FIRST_SEED
from easyinv_edit.evaluation.ledger import Ledger
from easyinv_edit.evaluation.markdown import table
from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.images import to_pil, to_unit
from easyinv_edit.inversion import EasyInv
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.tabletop.captions import caption
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import random_scene
from easyinv_edit.trajectory import Trajectory

GUIDANCE: dict[float, tuple[float, ...]] = {1.0: (1.0, 3.0, 7.5), 3.0: (3.0,)}
"""Guidance scales of sampling, by that of inverting."""
SETTINGS: tuple[tuple[float, tuple[float, float]], ...] = (
    (0.8, (0.05, 0.25)),
    (0.5, (0.05, 0.25)),
    (0.2, (0.05, 0.25)),
    (0.5, (0.25, 0.45)),
    (0.5, (0.5, 0.7)),
    (0.5, (0.85, 0.95)),
    (0.8, (0.85, 0.95)),
)
"""(eta, window): the second is EasyInv's default for SD models, the last for SDXL."""
KEY = ("steps", "invert", "method")
"""What tells the inversions of a `Ledger` apart."""
FLIPS = 10_000
"""Random signs of the paired test: p is known to about 1e-4."""
Report = Callable[[str], None]


@dataclass(frozen=True)
class Pictures:
    """What is inverted. white: which pictures have a white background."""

    pictures: list[Image.Image]
    prompts: list[str]
    white: list[bool]


def scenes(count: int, size: int) -> Pictures:
    """Rendered single solids, held out from training; `size` is their side in pixels."""
    made = [random_scene(FIRST_SEED + i) for i in range(count)]
    pictures = [to_pil(picture[None] * 2 - 1)[0] for picture in render(made, size)[0]]
    return Pictures(pictures, [caption(scene) for scene in made], [scene.background == "white" for scene in made])


def measure(
    pipe: EditPipeline, given: Pictures, steps: Sequence[int], batch: int, ledger: Ledger, report: Report
) -> Iterator[dict[str, Any]]:
    """A row for every T, pair of guidance scales and setting, those of one inversion at a time.

    Each holds the mean dB of DDIM inversion against the autoencoder's round trip, and, for all, white and other backgrounds,
    the mean difference of EasyInv in dB, its standard error and p of `paired_test`, two-sided. ledger: by `KEY`; what it holds
    is not measured again.
    """

    def sampled_back(method: str | EasyInv, name: str) -> list[list[float]]:
        tell = partial(report, f"T = {count}, inverted at guidance {invert:g}: {name}")
        measured = partial(_sampled_back, pipe, given, method, count, invert, batch)
        values: list[list[float]] = ledger.figures(measured, tell, steps=count, invert=invert, method=name)
        return values

    for count, invert in product(steps, GUIDANCE):
        plain = sampled_back("ddim", "ddim")
        for eta, window in SETTINGS:
            found = sampled_back(EasyInv(eta=eta, window=window), f"eta {eta:g}, window {window[0]:g}-{window[1]:g}")
            for sample, ours, theirs in zip(GUIDANCE[invert], found, plain, strict=True):
                facts = {"steps": count, "invert": invert, "sample": sample, "eta": eta, "window": list(window)}
                yield facts | compared(theirs, ours, given.white)


def compared(plain: Sequence[float], values: Sequence[float], white: Sequence[bool]) -> dict[str, Any]:
    """dB of two methods on the same pictures: the first one's mean, and the second's differences by background."""
    row: dict[str, Any] = {"ddim": statistics.fmean(plain)}
    kinds = {"all": [True] * len(white), "white": list(white), "other": [not each for each in white]}
    for kind, chosen in kinds.items():
        differences = [b - a for a, b, wanted in zip(plain, values, chosen, strict=True) if wanted]
        row[kind] = None if len(differences) < 2 else _difference(differences)
    return row


def _difference(differences: Sequence[float]) -> dict[str, float]:
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        "pictures": len(differences),
        "difference": statistics.fmean(differences),
        "error": error,
        "p": paired_test(differences),
    }


def paired_test(differences: Sequence[float], flips: int = FLIPS) -> float:
    """p, two-sided, of a mean this far from 0 if each difference were as likely the other way round (Fisher's sign flips).

    flips: random assignments of signs, drawn from a fixed seed; the given one counts as one of them, so p is never 0.
    """
    values = torch.tensor(differences, dtype=torch.float64)
    signs = torch.randint(2, (flips, len(values)), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    as_far = (signs @ values).abs() >= values.sum().abs() * (1 - 1e-12)
    return (as_far.sum().item() + 1) / (flips + 1)


@torch.no_grad()
def _sampled_back(
    pipe: EditPipeline, given: Pictures, method: str | EasyInv, steps: int, invert: float, batch: int
) -> list[list[float]]:
    """dB of each picture against the autoencoder's round trip, for each guidance scale of sampling."""
    values: list[list[float]] = [[] for _ in GUIDANCE[invert]]
    for i in range(0, len(given.pictures), batch):
        part = slice(i, i + batch)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*inverting at guidance", category=EasyInvWarning)  # it is the question
            rows = pipe.invert_batch(
                given.pictures[part], given.prompts[part], method, num_inference_steps=steps, guidance_scale=invert
            )
        ceilings = [_decoded(pipe, row.clean) for row in rows]
        for found, scale in zip(values, GUIDANCE[invert], strict=True):
            found += [psnr(a, b) for a, b in zip(_back(pipe, rows, scale), ceilings, strict=True)]
    return values


def _back(pipe: EditPipeline, rows: list[Trajectory], scale: float) -> list[torch.Tensor]:
    latents, _ = pipe.reconstruct(rows, guidance_scale=scale)
    return [_decoded(pipe, z) for z in torch.split(latents, 1)]


def _decoded(pipe: EditPipeline, z: torch.Tensor) -> torch.Tensor:
    return to_unit(pipe.backbone.decode(z).double()).cpu()


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the difference to DDIM inversion in dB, its standard error, and p where it is below .05."""
    head = ["T", "guidance of inverting / sampling", "eta", "window", "DDIM, dB", "all", "white", "other"]
    lines = []
    for row in rows:
        window = "-".join(f"{end:g}" for end in row["window"])
        facts = [str(row["steps"]), f"{row['invert']:g} / {row['sample']:g}", f"{row['eta']:g}", window, f"{row['ddim']:.2f}"]
        lines.append([*facts, *(_shown(row[kind]) for kind in ("all", "white", "other"))])
    return table(head, lines)


def _shown(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    cell = f"{found['difference']:+.2f} ± {found['error']:.2f}"
    return cell if found["p"] >= 0.05 else f"{cell} (p {_small(found['p'])})"


def _small(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0")
