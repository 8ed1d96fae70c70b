"""Every inversion method on the same pictures: what it costs, and how far from the picture it is sampled back.

Sampled back means alone, under the prompt it was inverted with, by the method's own sampler: at guidance 1 and at the guidance
of an edit. With the source pinned, as edits do by default, every method gives the autoencoder's round trip, which is the
ceiling that stands in the first row.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from easyinv_edit.choices import describe
from easyinv_edit.cost import Cost
from easyinv_edit.evaluation.datasets import Item, chunks
from easyinv_edit.evaluation.ledger import Ledger
from easyinv_edit.evaluation.metrics import psnr, ssim
from easyinv_edit.figures import stack, strip
from easyinv_edit.images import to_pil, to_unit
from easyinv_edit.inversion import InversionMethod, for_guidance
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory

CEILING = "autoencoder alone"
KEY = ("method", "steps", "item")
"""What tells results apart."""
Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to measure. methods: names of `INVERSIONS`; steps: values of T; guidance: of an edit; batch: images at once."""

    methods: tuple[str, ...]
    steps: tuple[int, ...]
    guidance: float
    batch: int

    def method(self, name: str) -> InversionMethod:
        """A method with its defaults, for edits at the plan's guidance."""
        return for_guidance(name, self.guidance)


def run(pipe: EditPipeline, items: Sequence[Item], plan: Plan, ledger: Ledger, report: Report) -> None:
    """Measure what the ledger does not hold yet: every method at every T on every item, a row each.

    All methods take their turn on the same few pictures, so that a machine that slows down slows all of them.
    """
    parts = chunks(items, plan.batch)
    _warm_up(pipe, parts[0])
    for number, part in enumerate(parts):
        if not ledger.holds(method=CEILING, item=part[-1].name):
            ledger.add(_ceiling(pipe, part))
        for steps in plan.steps:
            for name in plan.methods:
                if not ledger.holds(method=name, steps=steps, item=part[-1].name):
                    report(f"pictures {number * plan.batch + 1}-{number * plan.batch + len(part)}, T = {steps}: {name}")
                    ledger.add(_measure(pipe, part, number * plan.batch, name, steps, plan))


def _warm_up(pipe: EditPipeline, part: Sequence[Item]) -> None:
    """The first calls of a process are slow and belong to no method."""
    pipe.invert_batch([i.picture for i in part], [i.prompt for i in part], "ddim", num_inference_steps=2)


def _invert(pipe: EditPipeline, part: Sequence[Item], first: int, method: InversionMethod, steps: int) -> list[Trajectory]:
    generators = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
    pictures, prompts = [item.picture for item in part], [item.prompt for item in part]
    return pipe.invert_batch(pictures, prompts, method, num_inference_steps=steps, generator=generators)


def _measure(pipe: EditPipeline, part: Sequence[Item], first: int, name: str, steps: int, plan: Plan) -> list[dict[str, Any]]:
    made = _invert(pipe, part, first, plan.method(name), steps)
    free, free_cost = pipe.reconstruct(made, guidance_scale=1.0)
    guided, _ = pipe.reconstruct(made, guidance_scale=plan.guidance)
    rows = []
    for r, (item, trajectory) in enumerate(zip(part, made, strict=True)):
        row: dict[str, Any] = {"method": name, "steps": steps, "item": item.name, "group": item.group}
        row |= {"settings": describe(plan.method(name)), "noise_deviation": trajectory.noise.std().item()}
        row |= _costs(trajectory.cost, free_cost, len(part))
        for label, z in (("", free[r : r + 1]), ("_guided", guided[r : r + 1])):
            row[f"latent_error{label}"] = ((z - trajectory.clean).norm() / trajectory.clean.norm()).item()
            row |= {f"{key}{label}": value for key, value in _quality(pipe, z, trajectory).items()}
        rows.append(row)
    return rows


def _costs(invert: Cost, sampled: Cost, rows: int) -> dict[str, float]:
    return {
        "evaluations": invert.evaluations,
        "seconds": invert.seconds,
        "sampling_evaluations": sampled.evaluations / rows,
    }


def _ceiling(pipe: EditPipeline, part: Sequence[Item]) -> list[dict[str, Any]]:
    trajectories = [pipe.invert(item.picture, item.prompt, "ddim", num_inference_steps=1) for item in part]
    rows = zip(part, trajectories, strict=True)
    return [{"method": CEILING, "item": i.name, "group": i.group, **_quality(pipe, t.clean, t)} for i, t in rows]


def _quality(pipe: EditPipeline, z: Tensor, trajectory: Trajectory) -> dict[str, float]:
    """PSNR and SSIM of decoded latents against the picture that was encoded."""
    assert trajectory.source is not None
    truth = trajectory.source.permute(2, 0, 1)[None].cpu().double() / 255
    picture = to_unit(pipe.backbone.decode(z).double())
    return {"psnr": psnr(picture, truth), "ssim": ssim(picture, truth)}


MEASURES = (
    "latent_error",
    "psnr",
    "ssim",
    "latent_error_guided",
    "psnr_guided",
    "ssim_guided",
    "noise_deviation",
    "evaluations",
    "sampling_evaluations",
    "seconds",
)


def summary(rows: Sequence[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Means per group of pictures ("all" first), T and method; `relative_seconds` is against DDIM inversion in the same run."""
    groups = ["all", *sorted({row["group"] for row in rows} - {""})]
    table = []
    for group in groups:
        chosen = [row for row in rows if group in ("all", row["group"])]
        table.append(_mean(chosen, group, CEILING, None))
        for steps in plan.steps:
            lines = [_mean(chosen, group, name, steps) for name in plan.methods]
            pace = next((line["seconds"] for line in lines if line["method"] == "ddim"), None)
            table += [line | {"relative_seconds": line["seconds"] / pace if pace else None} for line in lines]
    return table


def _mean(rows: Sequence[dict[str, Any]], group: str, method: str, steps: int | None) -> dict[str, Any]:
    own = [row for row in rows if row["method"] == method and row.get("steps") == steps]
    means = {key: statistics.fmean(row[key] for row in own) if own and key in own[0] else None for key in MEASURES}
    return {"group": group, "steps": steps, "method": method, "pictures": len(own), **means}


@torch.no_grad()
def figure(pipe: EditPipeline, item: Item, number: int, plan: Plan, report: Report) -> Image.Image:
    """One picture at the largest T: a row per method with the source, the latent of the middle level decoded, and the
    reconstruction at guidance 1 and at the edit's."""
    rows, steps = [], max(plan.steps)
    for name in plan.methods:
        report(f"figure: {name}")
        (trajectory,) = _invert(pipe, [item], number, plan.method(name), steps)
        latents = [trajectory.clean, trajectory.latents[steps // 2]]
        latents += [pipe.reconstruct(trajectory, guidance_scale=scale)[0] for scale in (1.0, plan.guidance)]
        cells = [item.picture, *to_pil(pipe.backbone.decode(torch.cat([z.to(latents[-1]) for z in latents[1:]])))]
        labels = [name, f"level {steps // 2} of {steps}", "sampled back", f"at guidance {plan.guidance:g}"]
        rows.append(strip([cell.resize(cells[1].size) for cell in cells], labels))
    return stack(rows)
