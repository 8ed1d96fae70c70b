"""Fit one network: the resumable training loop all tabletop networks share.

AdamW with warm-up, a constant phase and a cosine tail; gradient clipping; an exponential moving average of the weights,
which is what `fit` leaves in the model. Every random choice of step n comes from a generator seeded with (seed, n), so a
run that was interrupted and resumed ends bit for bit where an uninterrupted one would.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CHECKPOINT_SECONDS = 120.0
LOG_STEPS = 100

Loss = Callable[[torch.Generator, float], tuple[Tensor, dict[str, float]]]
"""(generator of this step, progress in [0, 1]) -> (scalar loss, figures to log)."""


@dataclass(frozen=True)
class Fit:
    """How long and how fast to train one network.

    samples: pictures seen in all; minutes: stop sooner on a slow machine, with the same schedule squeezed into that time
    (None: never; with a limit the result depends on the machine's speed); batch: pictures a step; rate: peak learning
    rate; warmup: steps; constant_until: progress at which the cosine tail begins; ema: upper bound of the averaging decay.
    """

    samples: int
    minutes: float | None = None
    batch: int = 32
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 300
    constant_until: float = 0.4
    ema: float = 0.9995
    clip: float = 1.0
    seed: int = 0

    def progress(self, samples: int, seconds: float) -> float:
        """Share of the budget used: of the pictures or of the minutes, whichever is further."""
        timed = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(1.0, max(samples / self.samples, timed))

    def rate_at(self, step: int, progress: float) -> float:
        """Learning rate of a step: linear warm-up, constant, cosine down to 2 % of the peak."""
        tail = max(0.0, (progress - self.constant_until) / (1 - self.constant_until))
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * tail))
        return self.rate * cosine * min(1.0, (step + 1) / self.warmup)


@dataclass
class _State:
    step: int = 0
    samples: int = 0
    seconds: float = 0.0


def fit(name: str, model: nn.Module, loss: Loss, settings: Fit, folder: Path) -> dict[str, Any]:
    """Train `model` in place and leave the averaged weights in it; returns the training record.

    Resumes from `folder/name.checkpoint` where that exists and appends to `folder/log.jsonl`. Raises FloatingPointError on
    a loss that is not finite.
    """
    checkpoint = folder / f"{name}.checkpoint"
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate, betas=settings.betas, weight_decay=1e-2)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    state = _resume(checkpoint, model, optimizer, average)
    saved, sums, began = time.monotonic(), {}, time.monotonic() - state.seconds
    while (progress := settings.progress(state.samples, state.seconds)) < 1:
        generator = torch.Generator().manual_seed(settings.seed * 10_000_019 + state.step)
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_at(state.step, progress)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value, figures = loss(generator, progress)
        if not torch.isfinite(value):
            raise FloatingPointError(f"{name}: loss is {value.item()} at step {state.step}; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        decay = min(settings.ema, (1 + state.step) / (20 + state.step))
        _average(average, model, decay)
        state.step += 1
        state.samples += settings.batch
        state.seconds = time.monotonic() - began
        for key, figure in {"loss": value.item(), **figures}.items():
            sums.setdefault(key, []).append(figure)
        if state.step % LOG_STEPS == 0:
            _log(folder, name, state, progress, sums)
            sums = {}
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            _save(checkpoint, model, optimizer, average, state)
            saved = time.monotonic()
    _save(checkpoint, model, optimizer, average, state)
    model.load_state_dict(average)
    return {"steps": state.step, "samples": state.samples, "seconds": round(state.seconds, 1), "seed": settings.seed}


@torch.no_grad()
def _average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)


def _log(folder: Path, name: str, state: _State, progress: float, sums: dict[str, list[float]]) -> None:
    finite = {key: [v for v in values if not math.isnan(v)] for key, values in sums.items()}
    means = {key: round(sum(values) / len(values), 6) for key, values in finite.items() if values}
    line = {"network": name, **vars(state), "seconds": round(state.seconds, 1), "progress": round(progress, 4), **means}
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], state: _State) -> None:
    partial = path.with_suffix(".partial")
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "state": vars(state)}
    torch.save(content, partial)
    os.replace(partial, path)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> _State:
    if not path.exists():
        return _State()
    content = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    for key, value in content["average"].items():
        average[key].copy_(value)
    return _State(**content["state"])
