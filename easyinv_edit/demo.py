"""The demonstration: two rendered scenes and a photograph, inverted and edited with the embedded model, offline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.evaluation.reconstruction import sample_back
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.running import SCENE, source_image


@dataclass(frozen=True)
class Example:
    """One source and the edit asked of it; guidance 5 is what the embedded model draws best at."""

    name: str
    image: str
    source_prompt: str
    prompt: str


EXAMPLES: tuple[Example, ...] = ()
METHODS = ("easyinv", "ddim")


def run(folder: Path, progress: bool = True) -> dict[str, Any]:
    """Run every example and write its pictures under `folder`; returns the table's rows, JSON-able."""
    pipe = EditPipeline.embedded()
    pipe.set_progress_bar_config(disable=not progress)
    return {"folder": str(folder), "rows": [row for example in EXAMPLES for row in _example(pipe, example, folder)]}


def _example(pipe: EditPipeline, example: Example, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for method in METHODS:
        image = source_image(_located(example.image), pipe.backbone.native_size)
        result = pipe(image, example.prompt, example.source_prompt, inversion=method, guidance_scale=5.0)
        target = folder / example.name if method == METHODS[0] else folder / f"{example.name}-{method}"
        facts = result.save(target)
        back = psnr(_unit(sample_back(pipe, result.trajectory)), _unit(pipe.backbone.decode(result.trajectory.clean)))
        rows.append(
            {
                "source": example.name,
                "prompt": example.prompt,
                "method": method,
                "psnr": facts["reconstruction"]["psnr"],
                "sampled_back": round(back, 3) if math.isfinite(back) else None,
                "evaluations": sum(facts["evaluations"].values()),
                "seconds": round(sum(facts["seconds"].values()), 2),
            }
        )
    return rows


def _located(image: str) -> str:
    return image if image.startswith(SCENE) else str(files("easyinv_edit") / "tabletop" / "photos" / image)


def _unit(pixels: Any) -> Any:
    return (pixels.cpu().double() / 2 + 0.5).clamp(0, 1)


def table(report: dict[str, Any]) -> str:
    """The rows as text."""
    head = f"{'source':16} {'inversion':10} {'reconstruction':>15} {'sampled back':>13} {'evaluations':>12} {'seconds':>8}"
    lines = [head]
    for row in report["rows"]:
        quality, back = ("exact" if value is None else f"{value:.1f} dB" for value in (row["psnr"], row["sampled_back"]))
        lines.append(
            f"{row['source']:16} {row['method']:10} {quality:>15} {back:>13} {row['evaluations']:>12} {row['seconds']:>8.1f}"
        )
    return "\n".join([*lines, NOTE.format(folder=report["folder"])])


NOTE = """
reconstruction: the pinned source branch against the picture, which is the autoencoder's round trip.
sampled back: the inverted noise sampled alone against that round trip, which is what the inversion itself loses.
evaluations and seconds: one edit, inversion included. Pictures: {folder}"""
