"""What attention control and whole edits cost at the true size of published models, with random weights.

Rates are counted against what the machine's own matrix product reaches in the same dtype, measured beside them. A step under
MasaCtrl is held against a plain one of the same rows, in turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention_control import Controller, MasaCtrl, NoControl, controlled
from easyinv_edit.cost import Cost, measured
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import InputError
from easyinv_edit.evaluation import shapes
from easyinv_edit.evaluation.environment import machine
from easyinv_edit.evaluation.shapes import RandomModel, Shape
from easyinv_edit.inversion import INVERSIONS
from easyinv_edit.rows import streams_of
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory

Report = Callable[[str], None]
PLAIN, CONTROLLED = "plain", "MasaCtrl"
GUIDANCE = 7.5
SEED = 0


@dataclass(frozen=True)
class Plan:
    """What to measure.

    shapes: by name; size: side of the pictures in pixels, a multiple of 64, 0 for each model's own; steps: T; targets: how
    many prompts are edited at once, each guided, so that a UNet call has 1 + 2 * targets rows; edit: whole edits too, not steps
    alone; repeats: of a step, the median is told.
    """

    shapes: Mapping[str, Shape]
    size: int = 0
    steps: int = 50
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    targets: int = 1
    edit: bool = False
    repeats: int = 3

    @property
    def rows(self) -> int:
        """Rows of a UNet call: the source, and both halves of every target."""
        return 1 + 2 * self.targets

    def size_of(self, shape: Shape) -> int:
        """Side of a shape's pictures in pixels."""
        return self.size or shape.native_size


@torch.no_grad()
def measure(plan: Plan, report: Report) -> Iterator[dict[str, Any]]:
    """A row of the table after another, as they are measured. Raises InputError before any work where memory will not do."""
    for name, shape in plan.shapes.items():
        require_memory(plan, name, shape)
    for name, shape in plan.shapes.items():
        yield from _measure(plan, name, shape, report)


def _measure(plan: Plan, name: str, shape: Shape, report: Report) -> Iterator[dict[str, Any]]:
    size = plan.size_of(shape)
    flops = shapes.evaluation_flops(shape, size)
    report(f"{name} at {size} x {size}: {flops / 1e12:.3f} TFLOP an evaluation")
    model = RandomModel(shapes.build(shape, plan.dtype, plan.device), shape, size, plan.device)
    side, rate = matrix_rate(plan.dtype, plan.device)
    report(f"{name}: a product of two matrices of side {side} runs at {rate / 1e12:.3f} TFLOP/s")
    facts = {"shape": name, "size": size, "tflop_per_evaluation": flops / 1e12}
    facts |= {"matrix_side": side, "matrix_tflop_per_second": rate / 1e12}
    for work in (_steps, _edits) if plan.edit else (_steps,):
        for row in work(plan, model, report):
            if not row["finite"]:
                report(f"{name}: {row['work']}: the result is not finite")
            yield facts | row | rates(row["evaluations"], row["seconds"], flops, rate)


def rates(evaluations: int, seconds: float, flops: int, matrix_rate: float) -> dict[str, float]:
    """Evaluations and TFLOP a second, and the fraction of a matrix product's FLOP/s; flops: of one evaluation."""
    pace = evaluations / seconds
    return {
        "evaluations_per_second": pace,
        "tflop_per_second": pace * flops / 1e12,
        "fraction": pace * flops / matrix_rate,
    }


def _steps(plan: Plan, model: RandomModel, report: Report) -> Iterator[dict[str, Any]]:
    """One step of all rows, without and with control, in turns."""
    denoiser = model.denoiser(plan.steps, plan.targets, GUIDANCE)
    z = model.latents().repeat(1 + plan.targets, 1, 1, 1)
    controls: dict[str, Controller] = {PLAIN: NoControl(), CONTROLLED: MasaCtrl(start_step=0, sites=model.shape.sites)}
    for kind, control in controls.items():
        report(f"step, {kind}: warm-up")
        _step(model, denoiser, z, control)
    taken: dict[str, list[tuple[Tensor, Cost]]] = {kind: [] for kind in controls}
    for number in range(plan.repeats):
        for kind, control in controls.items():
            report(f"step, {kind}: {number + 1} of {plan.repeats}")
            taken[kind].append(_step(model, denoiser, z, control))
    plain = statistics.median(cost.seconds for _, cost in taken[PLAIN])
    for kind, made in taken.items():
        seconds = statistics.median(cost.seconds for _, cost in made)
        row = _row(f"step, {kind}", len(denoiser.batch), made[-1][0], made[-1][1], seconds)
        yield row | {"relative_seconds": seconds / plain}


def _step(model: RandomModel, denoiser: Denoiser, z: Tensor, control: Controller) -> tuple[Tensor, Cost]:
    size = z.shape[-2], z.shape[-1]
    with (
        controlled(model.network, control, num_steps=1, latent_size=size) as session,
        measured(model.network) as cost,
        session.step(0, streams_of(denoiser.batch)),
    ):
        out = denoiser(z, len(denoiser.schedule))
        _finish(model.device)
    return out, cost


def _edits(plan: Plan, model: RandomModel, report: Report) -> Iterator[dict[str, Any]]:
    """DDIM inversion of one picture, then its edit from the pinned source: without control and under MasaCtrl's defaults."""
    denoiser = model.denoiser(plan.steps, plan.targets, GUIDANCE)
    report(f"edit: inversion, T = {plan.steps}")
    with measured(model.network) as cost:
        trajectory = INVERSIONS["ddim"]().invert(denoiser.select([0]), model.latents())
        _finish(model.device)
    yield _row("DDIM inversion", 1, trajectory.noise, cost, cost.seconds)
    plain = None
    for kind, control in ((PLAIN, NoControl()), (CONTROLLED, MasaCtrl(sites=model.shape.sites))):
        report(f"edit: {kind}, T = {plan.steps}")
        z, cost = _edit(model, denoiser, trajectory, control)
        plain = plain or cost.seconds
        row = _row(f"edit, {kind}", len(denoiser.batch), z, cost, cost.seconds)
        yield row | {"relative_seconds": cost.seconds / plain}


def _edit(model: RandomModel, denoiser: Denoiser, trajectory: Trajectory, control: Controller) -> tuple[Tensor, Cost]:
    start = trajectory.noise.repeat(len(denoiser.guidance), 1, 1, 1)
    size = start.shape[-2], start.shape[-1]
    with (
        controlled(model.network, control, num_steps=len(denoiser.schedule), latent_size=size) as session,
        measured(model.network) as cost,
    ):
        z = sample(
            denoiser,
            start,
            pin=trajectory,
            reads_source=session.reads_source,
            control=lambda step, batch: session.step(step, streams_of(batch)),
        )
        _finish(model.device)
    return z, cost


def _row(work: str, rows: int, made: Tensor, cost: Cost, seconds: float) -> dict[str, Any]:
    return {
        "work": work,
        "rows": rows,
        "evaluations": cost.evaluations,
        "seconds": seconds,
        "relative_seconds": None,
        "peak_gigabytes": cost.peak_memory_bytes / 1e9,
        "finite": bool(torch.isfinite(made).all()),
    }


def _finish(device: torch.device) -> None:
    """Wait for the device, where it works on by itself and `measured` does not wait."""
    if device.type == "mps":
        torch.mps.synchronize()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(dtype: torch.dtype, device: torch.device, side: int | None = None) -> tuple[int, float]:
    """(side, FLOP/s) of the fastest of several products of two square matrices, by default as large as the device is worth."""
    side = side or (2048 if device.type == "cpu" else 8192)
    generator = torch.Generator().manual_seed(SEED)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    best, began, runs = float("inf"), time.perf_counter(), 0
    while runs < 2 or (runs < 20 and time.perf_counter() - began < 2):
        _finish(device)
        start = time.perf_counter()
        a @ b
        _finish(device)
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return side, 2 * side**3 / best


def free_bytes(device: torch.device) -> int | None:
    """Memory the device has free now, None where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = Path("/proc/meminfo")
    if device.type != "cpu" or not told.exists():
        return None
    lines = dict(line.split(":") for line in told.read_text(encoding="utf-8").splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def require_memory(plan: Plan, name: str, shape: Shape) -> None:
    """Raise InputError where the device has less free memory than the shape is estimated to need."""
    needed, free = shapes.needed_bytes(shape, plan.size_of(shape), plan.rows, plan.dtype), free_bytes(plan.device)
    if free is not None and free < needed:
        raise InputError(
            f"{name} needs about {needed / 1e9:.1f} GB at this size and dtype, and {plan.device} has {free / 1e9:.1f} GB free; "
            "choose a smaller shape, size or dtype, or fewer targets"
        )


def environment(plan: Plan) -> dict[str, Any]:
    """The machine and the software the numbers are of, and what memory means there."""
    cuda = plan.device.type == "cuda"
    memory = "peak of the CUDA allocator" if cuda else "largest resident size of the process so far"
    return {**machine(plan.device), "dtype": str(plan.dtype).removeprefix("torch."), "memory": memory}
