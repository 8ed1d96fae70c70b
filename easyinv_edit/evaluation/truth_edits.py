"""Make the edits whose true result is known, and say how near each method comes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from easyinv_edit.evaluation.ground_truth import Case
from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.evaluation.variants import CONTROLS
from easyinv_edit.images import to_pil, to_unit
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.tabletop.judge import Judge, shown
from easyinv_edit.tabletop.render import render, silhouettes
from easyinv_edit.trajectory import Trajectory

METHODS: dict[str, dict[str, Any]] = {
    "random noise, plain": {"control": "none", "noise_mix": 1.0},
    "inverted, plain": {"control": "none"},
    "inverted, masactrl": {"control": "masactrl"},
    "inverted, masactrl .7": {"control": CONTROLS["masactrl, union .7"]},
}
"""What is compared; keyword arguments of `EditPipeline.edit`."""
BASELINE = "inverted, plain"
INVERTED_TOGETHER = 8
"""Pictures that are inverted in one batch."""


@dataclass(frozen=True)
class Outcome:
    """One method on one task.

    psnr, object_psnr: mean dB against the rendered truth, whole picture and inside the true object; gain, spread: mean and
    deviation over scenes of object_psnr less that of `BASELINE` on the same scene; better: share of scenes on which it is above
    that; target: share of pictures in which the judge sees the requested word, NaN where the task has none; kept: the same for
    each word that both prompts leave unnamed, where the truth shows it; silhouette: mean intersection over union of what stands
    out from the ground with what should.
    """

    task: str
    method: str
    psnr: float
    object_psnr: float
    gain: float
    spread: float
    better: float
    target: float
    kept: dict[str, float]
    silhouette: float


def run_task(
    pipe: EditPipeline,
    judge: Judge,
    cases: Sequence[Case],
    *,
    inversion: str = "easyinv",
    num_inference_steps: int = 25,
    guidance_scale: float = 3.0,
) -> tuple[list[Outcome], Image.Image]:
    """Edit every case with every method; returns the outcomes, bounds included, and a grid of pictures.

    Grid rows: source, true edit, then the methods; one column per case, at most twelve.
    """
    size = pipe.backbone.native_size[0]
    sources, _ = render([case.source for case in cases], size)
    truths, masks = render([case.truth for case in cases], size)
    trajectories = _inverted(pipe, to_pil(sources * 2 - 1), cases, inversion, num_inference_steps)
    made: dict[str, Tensor] = {"source unedited": sources, "autoencoder of the truth": _round_trip(pipe, truths)}
    for method, options in METHODS.items():
        edits = [
            _edit(pipe, t, c, i, guidance_scale, options) for i, (t, c) in enumerate(zip(trajectories, cases, strict=True))
        ]
        made[method] = torch.cat(edits)
    inside = {name: [psnr(a, b, m) for a, b, m in zip(made[name], truths, masks, strict=True)] for name in made}
    outcomes = [_score(name, pictures, cases, truths, masks, inside, judge) for name, pictures in made.items()]
    rows = [sources, truths, *(made[method] for method in METHODS)]
    columns = min(len(cases), 12)
    grid = torch.cat([torch.cat(list(row[:columns]), -1) for row in rows], -2)
    return outcomes, to_pil(grid[None] * 2 - 1)[0]


def _inverted(
    pipe: EditPipeline, pictures: Sequence[Image.Image], cases: Sequence[Case], inversion: str, steps: int
) -> list[Trajectory]:
    pairs = [(picture, case.source_prompt) for picture, case in zip(pictures, cases, strict=True)]
    made: list[Trajectory] = []
    for first in range(0, len(pairs), INVERTED_TOGETHER):
        images, prompts = zip(*pairs[first : first + INVERTED_TOGETHER], strict=True)
        made += pipe.invert_batch(images, prompts, inversion, num_inference_steps=steps)
    return made


def _edit(pipe: EditPipeline, trajectory: Trajectory, case: Case, seed: int, scale: float, options: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    result = pipe.edit(trajectory, case.prompt, guidance_scale=scale, generator=generator, output_type="pt", **options)
    return result.images.float().cpu()


@torch.no_grad()
def _round_trip(pipe: EditPipeline, pictures: Tensor) -> Tensor:
    pixels = pipe.backbone.decode(pipe.backbone.encode(pictures.to(pipe.backbone.device) * 2 - 1))
    return to_unit(pixels.cpu())


def _score(
    name: str,
    pictures: Tensor,
    cases: Sequence[Case],
    truths: Tensor,
    masks: Tensor,
    inside: dict[str, list[float]],
    judge: Judge,
) -> Outcome:
    """inside: per method, the dB inside each case's true object."""
    whole = [psnr(a, b) for a, b in zip(pictures, truths, strict=True)]
    gains = [own - base for own, base in zip(inside[name], inside[BASELINE], strict=True)]
    target: list[float] = []
    kept: dict[str, list[bool]] = {}
    for words, case in zip(judge.read(pictures), cases, strict=True):
        wanted = shown(case.truth)
        target.append(float(words[case.task.field] == wanted[case.task.field]) if case.task.sayable else math.nan)
        for field in case.task.kept:
            if field in wanted:
                kept.setdefault(field, []).append(words[field] == wanted[field])
    return Outcome(
        task=cases[0].task.name,
        method=name,
        psnr=statistics.fmean(whole),
        object_psnr=statistics.fmean(inside[name]),
        gain=statistics.fmean(gains),
        spread=statistics.stdev(gains) if len(gains) > 1 else 0.0,
        better=statistics.fmean(gain > 0 for gain in gains),
        target=statistics.fmean(target),
        kept={field: statistics.fmean(right) for field, right in kept.items()},
        silhouette=_overlap(silhouettes(pictures, [case.truth for case in cases]), masks[:, 0] > 0.5),
    )


def _overlap(a: Tensor, b: Tensor) -> float:
    """Mean intersection over union of masks (B, H, W)."""
    return ((a & b).sum((1, 2)) / (a | b).sum((1, 2))).mean().item()
