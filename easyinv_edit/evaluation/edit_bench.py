"""Every controller on edits whose true result is rendered: which one does which kind of edit, and at what cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from attention_control import CONTROLLERS
from easyinv_edit.evaluation.ground_truth import ALL_TASKS, Case, Task, make_cases
from easyinv_edit.evaluation.ledger import Ledger
from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.figures import stack, strip
from easyinv_edit.images import load, save_png, to_pil, to_tensor
from easyinv_edit.inversion import for_guidance
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.tabletop.judge import Judge, shown
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import random_scene
from easyinv_edit.trajectory import Trajectory

KEY = ("task", "case", "inversion", "control")
"""What tells results apart."""
BASELINE = "none"
SHOWN = 8
"""Cases in a figure."""
Report = Callable[[str], None]


def _masactrl_words(case: Case) -> dict[str, Any]:
    words = {"source_words": case.source.shape, "target_words": case.truth.shape}
    return {"name": "masactrl", **words, "mask_threshold": 0.25}


def _blended(case: Case) -> dict[str, Any]:
    words = {"blend_source": case.source.shape, "blend_target": case.truth.shape}
    return {"name": "prompt_to_prompt", **words, "blend_threshold": 0.45}


def _by_default(name: str) -> Callable[[Case], dict[str, Any]]:
    return lambda _case: {"name": name}


CONTROLS: dict[str, Callable[[Case], dict[str, Any]]] = {
    **{name: _by_default(name) for name, c in CONTROLLERS.items() if not hasattr(c, "example") and not hasattr(c, "sources")},
    "masactrl, union .7": lambda _case: {"name": "masactrl", "strength": 0.7},
    "masactrl, words": _masactrl_words,
    "prompt_to_prompt, blend": _blended,
}
"""What is compared, by the name in tables: every registered controller that needs no second picture, box or list, with its
defaults, and some with settings. The embedded model's cross-attention is diffuse, so the thresholds on its maps are above the
papers'."""


@dataclass(frozen=True)
class Plan:
    """What to measure: task, control and inversion names; cases per task; T and the guidance scale of the edits."""

    tasks: tuple[str, ...]
    controls: tuple[str, ...]
    inversions: tuple[str, ...]
    scenes: int
    steps: int
    guidance: float


def cases_of(task: Task, first_seed: int, count: int) -> list[Case]:
    """The first `count` cases of a task among scenes from a seed on."""
    return make_cases(task, [random_scene(first_seed + i) for i in range(20 * count)], count)


def run(pipe: EditPipeline, judge: Judge, plan: Plan, first_seed: int, ledger: Ledger, folder: Path, report: Report) -> None:
    """Measure what the ledger does not hold yet, a row per edit; the edited pictures are kept in `folder`."""
    for name in plan.tasks:
        cases = cases_of(ALL_TASKS[name], first_seed, plan.scenes)
        for inversion in plan.inversions:
            for number, case in enumerate(cases):
                left = [c for c in plan.controls if not ledger.holds(task=name, case=number, inversion=inversion, control=c)]
                if not left:
                    continue
                report(f"{name}, {inversion}: case {number + 1} of {len(cases)}")
                trajectory = _inverted(pipe, case, inversion, plan)
                for control in left:
                    row = {"task": name, "case": number, "inversion": inversion, "control": control}
                    picture = folder / f"{name}-{number}-{inversion}-{control.replace(', ', '-').replace(' ', '')}.png"
                    ledger.add([row | _edit(pipe, judge, case, trajectory, control, plan, picture)])


def _inverted(pipe: EditPipeline, case: Case, inversion: str, plan: Plan) -> Trajectory:
    picture = render([case.source], pipe.backbone.native_size[0])[0]
    seeded = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_inference_steps": plan.steps, "generator": seeded}
    return pipe.invert(to_pil(picture * 2 - 1)[0], case.source_prompt, for_guidance(inversion, plan.guidance), **options)


def _edit(
    pipe: EditPipeline, judge: Judge, case: Case, trajectory: Trajectory, control: str, plan: Plan, path: Path
) -> dict[str, Any]:
    """Edit one case, keep the picture, and compare it with the truth."""
    made = pipe.edit(trajectory, case.prompt, control=CONTROLS[control](case), guidance_scale=plan.guidance)
    save_png(made.images[0], path)
    picture = to_tensor(load(path)) / 2 + 0.5
    truth, mask = render([case.truth], pipe.backbone.native_size[0])
    words, wanted = judge.read(picture)[0], shown(case.truth)
    kept = [words[field] == wanted[field] for field in case.task.kept if field in wanted]
    return {
        "psnr": psnr(picture, truth),
        "inside": psnr(picture, truth, mask),
        "outside": psnr(picture, truth, 1 - mask.float()),
        "target": float(words[case.task.field] == wanted[case.task.field]),
        "kept": statistics.fmean(kept),
        "evaluations": made.cost["edit"].evaluations,
        "seconds": made.cost["edit"].seconds,
    }


MEASURES = ("psnr", "inside", "outside", "target", "kept", "evaluations", "seconds")


def summary(rows: Sequence[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Means per task, inversion and control; gain and spread: of the dB inside the object over `BASELINE` on the same case;
    better: share of cases in which it is above it."""
    table = []
    for task in plan.tasks:
        for inversion in plan.inversions:
            own = [row for row in rows if (row["task"], row["inversion"]) == (task, inversion)]
            plain = {row["case"]: row["inside"] for row in own if row["control"] == BASELINE}
            for control in plan.controls:
                mine = [row for row in own if row["control"] == control]
                means = {key: statistics.fmean(row[key] for row in mine) if mine else None for key in MEASURES}
                gains = [row["inside"] - plain[row["case"]] for row in mine if row["case"] in plain]
                line: dict[str, Any] = {"task": task, "inversion": inversion, "control": control, "cases": len(mine), **means}
                table.append(line | _gain(gains))
    return table


def _gain(gains: Sequence[float]) -> dict[str, float | None]:
    if not gains:
        return {"gain": None, "spread": None, "better": None}
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    return {"gain": statistics.fmean(gains), "spread": spread, "better": statistics.fmean(g > 0 for g in gains)}


def figure(plan: Plan, task: str, inversion: str, first_seed: int, size: int, folder: Path) -> Image.Image:
    """A column per case, at most SHOWN: source, truth and every control, from the pictures that were kept."""
    cases = cases_of(ALL_TASKS[task], first_seed, plan.scenes)[:SHOWN]
    rows = [strip(_pictures(render([c.source for c in cases], size)[0]), ["source", *[""] * (len(cases) - 1)])]
    rows.append(strip(_pictures(render([c.truth for c in cases], size)[0]), ["truth", *[""] * (len(cases) - 1)]))
    for control in plan.controls:
        name = control.replace(", ", "-").replace(" ", "")
        made = [load(folder / f"{task}-{number}-{inversion}-{name}.png") for number in range(len(cases))]
        rows.append(strip(made, [control, *[""] * (len(cases) - 1)]))
    page = stack(rows)
    return page.resize((page.width // 2, page.height // 2), Image.Resampling.BOX)


def _pictures(pictures: Tensor) -> list[Image.Image]:
    return to_pil(pictures * 2 - 1)
