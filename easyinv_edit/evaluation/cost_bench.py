"""What one edit and many edits cost: the authors' four-row layout against rows that are needed, and features kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attention_control import CONTROLLERS, MasaCtrl, StreamRow, Streams, controlled
from easyinv_edit.choices import build
from easyinv_edit.cost import measured
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.images import ImageInput, to_unit
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.rows import streams_of, words_of
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory

FOUR_ROWS = "four rows, a prompt at a time"
LAYOUTS: dict[str, dict[str, Any]] = {
    "rows that are needed, all prompts at once": {"source_features": "live"},
    "exact features, a prompt at a time": {"source_features": "exact", "batch_size": 1},
    "features from the inversion": {"source_features": "inversion"},
}
"""Options of `EditPipeline.edit`, by what they are called in tables."""


def measure(
    pipe: EditPipeline, image: ImageInput, prompts: Sequence[str], *, steps: int, guidance: float, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Evaluations and seconds, inversion included, of editing one image to all prompts with MasaCtrl, by layout.

    The source prompt is empty, as in the authors' recipe for real images. `difference` is the largest one of latents against
    the four-row layout, `psnr` that of the decoded pictures in dB.
    """
    pipe.invert(image, "", "easyinv", num_inference_steps=2)  # the first calls of a process are slow
    report(FOUR_ROWS)
    trajectory = pipe.invert(image, "", "easyinv", num_inference_steps=steps, keep_features="masactrl")
    invert = trajectory.cost
    began = time.perf_counter()
    with measured(pipe.backbone.network) as cost:
        reference = torch.cat([_four_rows(pipe, trajectory, prompt, guidance) for prompt in prompts])
    rows = [_row(FOUR_ROWS, len(prompts), invert.evaluations + cost.evaluations, invert.seconds + time.perf_counter() - began)]
    for layout, options in LAYOUTS.items():
        report(layout)
        made = pipe.edit(trajectory, list(prompts), guidance_scale=guidance, output_type="latent", **options)
        spent = made.cost["edit"]
        row = _row(layout, len(prompts), invert.evaluations + spent.evaluations, invert.seconds + spent.seconds)
        rows.append(row | _distance(pipe, made.images, reference))
    first = rows[0]["seconds"]
    return [row | {"relative_seconds": row["seconds"] / first} for row in rows]


def _row(layout: str, prompts: int, evaluations: int, seconds: float) -> dict[str, Any]:
    return {
        "layout": layout,
        "prompts": prompts,
        "evaluations": evaluations,
        "seconds": seconds,
        "difference": 0.0,
        "psnr": None,
    }


@torch.no_grad()
def _distance(pipe: EditPipeline, z: Tensor, reference: Tensor) -> dict[str, float]:
    mine, theirs = (to_unit(pipe.backbone.decode(x)) for x in (z, reference))
    return {"difference": (z - reference).abs().max().item(), "psnr": psnr(mine, theirs)}


@torch.no_grad()
def _four_rows(pipe: EditPipeline, trajectory: Trajectory, prompt: str, guidance: float) -> Tensor:
    """The authors' layout: source and target, each with its unconditional half, at every step."""
    embedded = pipe.backbone.embed([trajectory.prompt, prompt, ""])
    scales, negative = (guidance, guidance), embedded.select([2, 2])
    denoiser = Denoiser(pipe.backbone, trajectory.schedule, embedded.select([0, 1]), scales, negative, twins=(True, True))
    start = trajectory.noise.to(pipe.backbone.device).repeat(2, 1, 1, 1)
    size = start.shape[-2], start.shape[-1]
    steps = len(trajectory.schedule)
    with controlled(pipe.backbone.network, MasaCtrl(), num_steps=steps, latent_size=size) as session:
        z = sample(denoiser, start, pin=trajectory, control=lambda step, batch: session.step(step, streams_of(batch)))
    return z[1:]


CONTROLS: dict[str, dict[str, Any]] = {
    **{name: {"name": name, **getattr(made, "example", {})} for name, made in CONTROLLERS.items() if name != "none"},
    "masactrl, words": {"name": "masactrl", "source_words": "ball", "target_words": "ball"},
    "prompt_to_prompt, blend": {"name": "prompt_to_prompt", "blend_source": "ball", "blend_target": "ball"},
}
"""Whose memory is measured, by what they are called in tables."""
MEMORY_STEPS = (10, 40)
"""Of 50: every route, edit and feature acts at one of them, and maps are kept by then."""


def step_memory(pipe: EditPipeline, size: int) -> list[dict[str, Any]]:
    """Peak bytes that a step of sources and a guided target allocates, plain and under each of `CONTROLS`; on the CPU, at a
    latent side. extra: the share by which control exceeds the plain step of the same rows."""
    return [{"control": name, **_memory(pipe, size, build(CONTROLLERS, given, "control"))} for name, given in CONTROLS.items()]


@torch.no_grad()
def _memory(pipe: EditPipeline, size: int, controller: Any) -> dict[str, Any]:
    backbone, sources, prompts = pipe.backbone, getattr(controller, "sources", 1), ["a small ball", "a large ball"]
    targets = [StreamRow("target", 0, "unconditional"), StreamRow("target", 0, "conditional")]
    streams = Streams((*(StreamRow("source", i, "conditional") for i in range(sources)), *targets))
    conditioning = backbone.embed([*prompts[:1] * sources, "", prompts[1]])
    shape = len(streams), backbone.network.config.in_channels, size, size
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(backbone.device)

    def evaluate() -> None:
        backbone.predict(z, 500, conditioning)

    plain, peaks, words = _peak(evaluate), [], words_of(backbone, prompts)
    with controlled(backbone.network, controller, num_steps=50, latent_size=(size, size), words=words) as session:
        for step in MEMORY_STEPS:
            with session.step(step, streams):
                peaks.append(_peak(evaluate))
    return {"rows": len(streams), "plain": plain, "controlled": max(peaks), "extra": max(peaks) / plain - 1}


def _peak(work: Callable[[], Any]) -> int:
    """The largest sum of bytes allocated and not yet freed while `work` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
