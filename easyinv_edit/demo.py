"""The demonstration: two rendered scenes and a photograph, inverted and edited with the embedded model, offline."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.figures import stack, strip
from easyinv_edit.images import save_png, to_unit
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.result import EditResult, versions, write_text
from easyinv_edit.running import SCENES, rendered, scene_of, source_image
from easyinv_edit.tabletop.scene import replace


@dataclass(frozen=True)
class Example:
    """One source and the edit asked of it. The prompts of the scenes name neither texture nor colours; shape: what the edit
    makes of a scene's solid, so that the true result can be rendered."""

    name: str
    image: str
    source_prompt: str
    prompt: str
    shape: str = ""


EXAMPLES = (
    Example(
        "cube-to-ball",
        "scene:20000963",
        "a large upright cube on a white background",
        "a large upright ball on a white background",
        "ball",
    ),
    Example(
        "cube-to-cylinder",
        "scene:20000063",
        "a large upright cube on a white background",
        "a large upright cylinder on a white background",
        "cylinder",
    ),
    Example("coffee", "coffee.jpg", "", "a medium upright ball on a beige background"),
)
METHODS = ("easyinv", "ddim")
GUIDANCE = 3.0
"""Where the embedded model keeps most of its source; 7.5, the package's default, is for full-size models."""


def run(folder: Path, progress: bool = True) -> dict[str, Any]:
    """Run every example and write its pictures under `folder`, with an overview; returns the table's rows, JSON-able."""
    pipe = EditPipeline.embedded()
    pipe.set_progress_bar_config(disable=not progress)
    runs = [_edit(pipe, example, method, folder) for example in EXAMPLES for method in METHODS]
    report = {"folder": str(folder), "rows": [row for row, _ in runs], "versions": versions()}
    shown = [result for row, result in runs if row["method"] == METHODS[0]]
    strips = [_overview(pipe, example, result) for example, result in zip(EXAMPLES, shown, strict=True)]
    save_png(stack(strips), folder / "overview.png")
    write_text(folder / "result.json", json.dumps(report, indent=2) + "\n")
    return report


def _edit(pipe: EditPipeline, example: Example, method: str, folder: Path) -> tuple[dict[str, Any], EditResult]:
    """One example by one inversion method: its row of the table, and the result, saved."""
    image = source_image(_located(example.image), pipe.backbone.native_size)
    result = pipe(image, example.prompt, example.source_prompt, inversion=method, guidance_scale=GUIDANCE)
    facts = result.save(folder / f"{example.name}-{method}")
    free, _ = pipe.reconstruct(result.trajectory, guidance_scale=1.0)
    mine, theirs = (to_unit(pipe.backbone.decode(z).double()) for z in (free, result.trajectory.clean.to(free)))
    back = psnr(mine, theirs)
    row = {
        "source": example.name,
        "prompt": example.prompt,
        "method": method,
        "psnr": facts["reconstruction"]["psnr"],
        "sampled_back": round(back, 3) if math.isfinite(back) else None,
        "evaluations": sum(facts["evaluations"].values()),
        "seconds": round(sum(facts["seconds"].values()), 2),
    }
    return row, result


def _overview(pipe: EditPipeline, example: Example, result: EditResult) -> Image.Image:
    """Source, reconstruction, the target prompt without control, the edit, and for a scene the true result."""
    alone = pipe.edit(result.trajectory, result.prompts, control="none", guidance_scale=GUIDANCE)
    pictures = {
        "source": result.source,
        "reconstruction": result.reconstruction,
        "edit by prompt alone": alone.edited[0],
        "edit with MasaCtrl": result.edited[0],
        "true result, rendered": _truth(pipe, example),
    }
    shown = {label: picture for label, picture in pictures.items() if picture is not None}
    return strip(list(shown.values()), list(shown))


def _truth(pipe: EditPipeline, example: Example) -> Image.Image | None:
    """The scene with the shape asked for, None for a photograph."""
    if not example.shape:
        return None
    return rendered(replace(scene_of(example.image), shape=example.shape), pipe.backbone.native_size)


def _located(image: str) -> str:
    return image if image.startswith(SCENES) else str(files("easyinv_edit") / "tabletop" / "photos" / image)


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
