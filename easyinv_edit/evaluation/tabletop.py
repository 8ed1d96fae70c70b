"""Measure a tabletop model: what it draws, how it inverts, and how its edits compare with the rendered truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from easyinv_edit.errors import ModelError
from easyinv_edit.evaluation.ground_truth import TASKS, make_cases, run_task
from easyinv_edit.evaluation.reconstruction import reconstruct
from easyinv_edit.images import save_png, to_pil
from easyinv_edit.pipeline import EditPipeline, embedded_folder
from easyinv_edit.result import versions, write_text
from easyinv_edit.tabletop import judge as judging
from easyinv_edit.tabletop.captions import caption
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import random_scene

HELD_OUT = 20_000_000
"""Seeds of this evaluation: neither trained on nor used in the training's own gates."""
SAMPLED_BACK = ("ddim", "easyinv", "fixed_point")
"""Inversions that tell how well a model can be inverted; `bench inversion` measures them all."""
Report = Callable[[str], None]


def evaluate(model: str, folder: Path, count: int, steps: int, report: Report) -> dict[str, Any]:
    """Measure `model` on `count` held-out scenes per measurement at T = `steps`; writes pictures, report.json and returns it.

    Raises ModelError where the model folder holds no judge: then it is no tabletop model.
    """
    home = embedded_folder() if model == "embedded" else Path(model)
    if not (home / "judge.safetensors").exists():
        raise ModelError(f"{model}: has no judge.safetensors, so it is no tabletop model; train one with `tabletop train`")
    pipe, judge = EditPipeline.from_pretrained(model), judging.load(home / "judge.safetensors")
    pipe.set_progress_bar_config(disable=True)
    content: dict[str, Any] = {"model": model, "scenes": count, "steps": steps, "versions": versions()}
    report("samples")
    content["samples"] = _samples(pipe, judge, 4 * count, folder)
    report("reconstructions")
    content["reconstructions"] = _reconstructions(pipe, count, steps)
    content["edits"] = []
    for task in TASKS:
        report(f"edits: {task.name}")
        cases = make_cases(task, [random_scene(HELD_OUT + i) for i in range(20 * count)], count)
        outcomes, grid = run_task(pipe, judge, cases, num_inference_steps=steps)
        save_png(grid, folder / f"edit-{task.name}.png")
        content["edits"] += [asdict(outcome) for outcome in outcomes]
    write_text(folder / "report.json", json.dumps(content, indent=2) + "\n")
    return content


def _samples(pipe: EditPipeline, judge: judging.Judge, count: int, folder: Path) -> dict[str, dict[str, float]]:
    """Judge accuracy on rendered pictures and on the stock pipeline's samples (full captions, guidance 3 and 5, T = 25)."""
    scenes = [random_scene(HELD_OUT + 1_000_000 + i) for i in range(count)]
    size = pipe.backbone.native_size[0]
    result = {"rendered": judging.accuracy(judge, render(scenes, size)[0], scenes)}
    stock = pipe.backbone.pipe
    stock.set_progress_bar_config(disable=True)
    for scale in (3.0, 5.0):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 25, "guidance_scale": scale, "generator": generator, "output_type": "pt"}
        pictures = stock([caption(scene) for scene in scenes], **options).images.float().cpu()
        result[f"guidance {scale:g}"] = judging.accuracy(judge, pictures, scenes)
        columns = min(count, 8)
        rows = [torch.cat(list(row), -1) for row in pictures[: count // columns * columns][:32].split(columns)]
        save_png(to_pil(torch.cat(rows, -2)[None] * 2 - 1)[0], folder / f"samples-g{scale:g}.png")
    return result


def _reconstructions(pipe: EditPipeline, count: int, steps: int) -> list[dict[str, Any]]:
    scenes = [random_scene(HELD_OUT + 2_000_000 + i) for i in range(count)]
    pictures = [to_pil(p[None] * 2 - 1)[0] for p in render(scenes, pipe.backbone.native_size[0])[0]]
    prompts = [caption(scene) for scene in scenes]
    return [asdict(reconstruct(pipe, pictures, prompts, method, steps)) for method in SAMPLED_BACK]


def text(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    fields = list(report["samples"]["rendered"])
    samples = [[name, *(f"{row[field]:.2f}" for field in fields)] for name, row in report["samples"].items()]
    inversions = [
        [
            row["method"],
            f"{row['psnr_latent_ceiling']:.1f}",
            f"{row['psnr']:.1f}",
            f"{row['noise_deviation']:.2f}",
            f"{row['evaluations']:.0f}",
            f"{row['seconds']:.2f}",
        ]
        for row in report["reconstructions"]
    ]
    edits = [
        [
            row["task"],
            row["method"],
            f"{row['psnr']:.2f}",
            f"{row['object_psnr']:.2f}",
            f"{row['gain']:+.2f} ± {row['spread']:.2f}",
            f"{row['target']:.2f}",
            f"{row['kept']:.2f}",
        ]
        for row in report["edits"]
    ]
    heads = ["inversion", "dB to the autoencoder", "dB to the picture", "std of z_T", "evaluations", "seconds"]
    edit_heads = ["edit", "method", "dB to the truth", "inside the object", "gain ± spread", "target", "kept"]
    tables = [_table(["pictures", *fields], samples), _table(heads, inversions), _table(edit_heads, edits)]
    return "\n\n".join(tables)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
