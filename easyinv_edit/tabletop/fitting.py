"""Fit one network: the resumable training loop all tabletop networks share.

AdamW, or Muon beside it, with warm-up, a constant phase and a cosine tail; gradient clipping; an exponential moving average
of the weights, which is what `fit` leaves in the model. Every random choice of step n comes from a generator seeded with
(seed, n), so a run that was interrupted and resumed ends bit for bit where an uninterrupted one would.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor, nn

from easyinv_edit.errors import EasyInvError, first_line
from easyinv_edit.tabletop.muon import Muon
from easyinv_edit.tabletop.precision import autocast

CHECKPOINT_SECONDS = 120.0
LOG_STEPS = 100
WEIGHT_DECAY = 1e-2
LEAST_OUTPUTS = 16
"""A matrix of fewer outputs, such as that of a last convolution, is left to AdamW."""

Loss = Callable[[torch.Generator, float], tuple[Tensor, dict[str, float]]]
"""(generator of this step, progress in [0, 1]) -> (scalar loss, figures to log)."""


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Fit:
    """How long and how fast to train one network.

    samples: pictures seen in all; minutes: stop sooner on a slow machine, with the same schedule squeezed into that time
    (None: never; with a limit the result depends on the machine's speed); batch: pictures a step; rate: peak learning
    rate of AdamW; muon_rate: of Muon, which then trains the matrices of linear layers and convolutions (None: AdamW trains
    them too); warmup: steps; constant_until: progress at which the cosine tail begins; ema: upper bound of the averaging decay.
    """

    samples: PositiveInt
    minutes: PositiveFloat | None = None
    batch: PositiveInt = 32
    rate: PositiveFloat = 1e-3
    muon_rate: PositiveFloat | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: PositiveInt = 300
    constant_until: Annotated[float, Field(ge=0, lt=1)] = 0.4
    ema: float = 0.9995
    clip: float = 1.0
    seed: int = 0

    def progress(self, samples: int, seconds: float) -> float:
        """Share of the budget used: of the pictures or of the minutes, whichever is further."""
        timed = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(1.0, max(samples / self.samples, timed))

    def pace(self, step: int, progress: float) -> float:
        """Share of the peak learning rate at a step: linear warm-up, constant, cosine down to 2 %."""
        tail = max(0.0, (progress - self.constant_until) / (1 - self.constant_until))
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * tail))
        return cosine * min(1.0, (step + 1) / self.warmup)


@dataclass
class _Run:
    """A fit under way: everything a checkpoint holds."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: dict[str, Tensor]
    path: Path
    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers; "initial_lr" is a group's peak rate."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def position(self) -> dict[str, Any]:
        return {"step": self.step, "samples": self.samples, "seconds": self.seconds}


def fit(
    name: str, model: nn.Module, loss: Loss, settings: Fit, folder: Path, on_save: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Train `model` in place and leave the averaged weights in it; returns the training record.

    Resumes from `folder/name.checkpoint` where that exists and appends to `folder/log.jsonl`. on_save: called with the step at
    every checkpoint, the model holding the averaged weights meanwhile. Raises FloatingPointError on a loss that is not finite,
    EasyInvError where the checkpoint is damaged or another model's or another optimizer's.
    """
    run = _start(model, settings, folder / f"{name}.checkpoint")
    began = saved = time.monotonic()
    began -= run.seconds
    while (progress := settings.progress(run.samples, run.seconds)) < 1:
        _step(name, run, loss, settings, progress)
        run.seconds = time.monotonic() - began
        if run.step % LOG_STEPS == 0:
            _log(folder, name, run, progress)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            _save(run, on_save)
            saved = time.monotonic()
    _save(run, on_save)
    model.load_state_dict(run.average)
    return {**run.position(), "seconds": round(run.seconds, 1), "seed": settings.seed}


def _start(model: nn.Module, settings: Fit, path: Path) -> _Run:
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    run = _Run(model, _optimizers(model, settings), average, path)
    for group in run.groups:
        group["initial_lr"] = group["lr"]
    if path.exists():
        try:
            _resume(run)
        except (KeyError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
            raise EasyInvError(
                f"{path}: is damaged or of another recipe or version ({first_line(error)}); "
                "remove it to begin this stage again, or give another folder"
            ) from error
    return run


def _resume(run: _Run) -> None:
    content = torch.load(run.path, map_location="cpu", weights_only=True)
    run.model.load_state_dict(content["model"])
    for optimizer, state in zip(run.optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    for key, value in content["average"].items():
        run.average[key].copy_(value)
    run.step, run.samples, run.seconds = (content["position"][key] for key in ("step", "samples", "seconds"))


def _optimizers(model: nn.Module, settings: Fit) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or for what Muon is not for."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[0] >= LEAST_OUTPUTS]
    matrices = [] if settings.muon_rate is None else [layer.weight for layer in layers]
    apart = {id(weight) for weight in matrices}
    others = [p for p in model.parameters() if id(p) not in apart]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=settings.rate, betas=settings.betas, weight_decay=WEIGHT_DECAY, fused=True)
    ]
    if settings.muon_rate is not None and matrices:
        optimizers.append(Muon(matrices, lr=settings.muon_rate, weight_decay=WEIGHT_DECAY))
    return optimizers


def _step(name: str, run: _Run, loss: Loss, settings: Fit, progress: float) -> None:
    generator = torch.Generator().manual_seed(settings.seed * 10_000_019 + run.step)
    for group in run.groups:
        group["lr"] = group["initial_lr"] * settings.pace(run.step, progress)
    with autocast(next(run.model.parameters()).device):
        value, figures = loss(generator, progress)
    if not torch.isfinite(value):
        raise FloatingPointError(f"{name}: loss is {value.item()} at step {run.step}; lower the learning rate")
    run.model.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip)
    for optimizer in run.optimizers:
        optimizer.step()
    _average(run.average, run.model, min(settings.ema, (1 + run.step) / (20 + run.step)))
    run.step += 1
    run.samples += settings.batch
    for key, figure in {"loss": value.item(), **figures}.items():
        run.sums.setdefault(key, []).append(figure)


@torch.no_grad()
def _average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)


def _log(folder: Path, name: str, run: _Run, progress: float) -> None:
    kept = {key: [v for v in values if not math.isnan(v)] for key, values in run.sums.items()}
    means = {key: round(sum(values) / len(values), 6) for key, values in kept.items() if values}
    line = {"network": name, **run.position(), "seconds": round(run.seconds, 1), "progress": round(progress, 4), **means}
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    run.sums.clear()


def _save(run: _Run, on_save: Callable[[int], None] | None) -> None:
    partial = run.path.with_suffix(".partial")
    content = {"model": run.model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in run.optimizers]}
    torch.save({**content, "average": run.average, "position": run.position()}, partial)
    partial.replace(run.path)
    if on_save is not None:
        current = {key: value.detach().clone() for key, value in run.model.state_dict().items()}
        run.model.load_state_dict(run.average)
        on_save(run.step)
        run.model.load_state_dict(current)
