"""The noise schedule: one line per level, evaluated to sample and solved to invert.

Every deterministic first-order sampler is, per level, linear in the latent and the raw model output:

    z[i-1] = keep[i] * z[i] + push[i] * output(z[i], timesteps[i])

Sampling evaluates the line (`denoise`); inversion solves it for z[i] (`renoise`). Level 0 is the clean latent, level T is
noise. DDIM with eta = 0 (Song et al., arXiv 2010.02502, eq. 12) for epsilon and v prediction is served here; a scheduler's
own `step` is never called. This module knows neither networks nor prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyinv_edit.errors import NonFiniteError, ScheduleError

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class NoiseSchedule:
    """Coefficients of T steps, Python floats (float64), each a tuple of length T + 1 indexed by level.

    timesteps: the label the UNet is given at each level, ascending; entry 0 is unused (-1).
    signal, noise: a latent of level i is `signal[i] * clean + noise[i] * gaussian`.
    keep, push: the line above; entry 0 is unused (nan).
    """

    timesteps: tuple[int, ...]
    signal: tuple[float, ...]
    noise: tuple[float, ...]
    keep: tuple[float, ...]
    push: tuple[float, ...]
    prediction_type: str

    @classmethod
    def from_alphas(
        cls, alphas_cumprod: Sequence[float] | Tensor, timesteps: Sequence[int], final_alpha: float, prediction_type: str
    ) -> NoiseSchedule:
        """Build the schedule of a variance-preserving diffusion model.

        alphas_cumprod: cumulative alphas of all training timesteps; timesteps: the T labels to visit, any order;
        final_alpha: cumulative alpha of the clean latent (diffusers' `final_alpha_cumprod`); prediction_type: "epsilon" or
        "v_prediction". Raises ScheduleError for any other type, for repeated labels (multistep schedulers such as PNDM), and
        for a last level without signal under epsilon prediction (zero terminal SNR), where the line cannot be solved.
        """
        if prediction_type not in PREDICTION_TYPES:
            raise ScheduleError(f"prediction type is {prediction_type!r}; this sampler serves {' and '.join(PREDICTION_TYPES)}")
        labels = sorted(int(t) for t in timesteps)
        if not labels or len(set(labels)) != len(labels):
            raise ScheduleError("the timesteps are empty or repeat; use a first-order schedule such as DDIM's")
        alphas = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        levels = [float(final_alpha), *(float(alphas[t]) for t in labels)]
        if prediction_type == "epsilon" and levels[-1] <= 0:
            raise ScheduleError("zero terminal SNR with epsilon prediction has no inverse; use a v-prediction model or "
                                "timestep_spacing='leading'")  # fmt: skip
        signal = [math.sqrt(a) for a in levels]
        noise = [math.sqrt(1 - a) for a in levels]
        return cls._from_levels(labels, signal, noise, prediction_type)

    def __len__(self) -> int:
        """T, the number of steps."""
        return len(self.timesteps) - 1

    def denoise(self, z: Tensor, output: Tensor, level: int, deviation: float = 0.0) -> Tensor:
        """One sampling step: latents of `level` (rows, C, H, W) and the raw model output there -> latents of `level - 1`.

        deviation: of the fresh noise the caller adds afterwards (sigma in DDIM's eq. 12); the predicted noise gives way to it,
        so that the level keeps its variance.
        """
        keep, push = self._coefficients(level, deviation)
        return keep * z + push * output

    def renoise(self, z: Tensor, output: Tensor, level: int, deviation: float = 0.0) -> Tensor:
        """The same line solved for its start: latents of `level - 1`, fresh noise taken off, and an output -> those of `level`.

        Exact where `output` is the one the sampler will see at `level`; using any other is the whole error of inversion. For
        epsilon prediction this equals diffusers' DDIMInverseScheduler; for v prediction it does not: theirs reads v at the
        cleaner level, this solves the sampler's own step.
        """
        keep, push = self._coefficients(level, deviation)
        return (z - push * output) / keep

    def _coefficients(self, level: int, deviation: float) -> tuple[float, float]:
        if not deviation:
            return self.keep[level], self.push[level]
        left = math.sqrt(self.noise[level - 1] ** 2 - deviation**2)
        return _line(self.signal[level - 1], left, self.signal[level], self.noise[level], self.prediction_type)

    def epsilon(self, z: Tensor, output: Tensor, level: int) -> Tensor:
        """The noise that `output`, made on latents z of `level`, predicts."""
        if self.prediction_type == "epsilon":
            return output
        return self.signal[level] * output + self.noise[level] * z

    def with_epsilon(self, output: Tensor, change: Tensor, level: int) -> Tensor:
        """The output whose predicted noise differs by `change`; the same output where a level without signal predicts none."""
        if self.prediction_type == "epsilon":
            return output + change
        return output + change / self.signal[level] if self.signal[level] else output

    def move(self, z: Tensor, epsilon: Tensor, start: int, end: int) -> Tensor:
        """Latents of level `start`, which must have signal, -> of level `end`, up or down, along a predicted noise.

        For one level down or up and epsilon prediction this is `denoise` and `renoise`.
        """
        ratio = self.signal[end] / self.signal[start]
        return ratio * z + (self.noise[end] - ratio * self.noise[start]) * epsilon

    def deviation(self, level: int, eta: float) -> float:
        """DDIM's sigma of the step from `level` down (eq. 16): eta 0 is deterministic, 1 is DDPM's ancestral sampling."""
        clean, noisy = (self.signal[i] ** 2 for i in (level - 1, level))
        return eta * math.sqrt((1 - clean) / (1 - noisy) * (1 - noisy / clean))

    def add_noise(self, clean: Tensor, noise: Tensor, level: int) -> Tensor:
        """A latent of `level`: the clean one and unit noise in the level's own proportions."""
        return self.signal[level] * clean + self.noise[level] * noise

    def as_dict(self) -> dict[str, Any]:
        """What identifies the schedule, JSON-able; `==` on two schedules compares the same things."""
        return {
            "timesteps": list(self.timesteps),
            "signal": list(self.signal),
            "noise": list(self.noise),
            "prediction_type": self.prediction_type,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> NoiseSchedule:
        """The inverse of `as_dict`, bit-exact."""
        return cls._from_levels(content["timesteps"][1:], content["signal"], content["noise"], content["prediction_type"])

    @classmethod
    def _from_levels(
        cls, labels: Sequence[int], signal: Sequence[float], noise: Sequence[float], prediction_type: str
    ) -> NoiseSchedule:
        """labels of levels 1 .. T; signal and noise of levels 0 .. T."""
        pairs = [_line(signal[i - 1], noise[i - 1], signal[i], noise[i], prediction_type) for i in range(1, len(signal))]
        keep, push = zip((math.nan, math.nan), *pairs, strict=True)
        return cls((-1, *labels), tuple(signal), tuple(noise), keep, push, prediction_type)


def _line(signal0: float, noise0: float, signal1: float, noise1: float, prediction_type: str) -> tuple[float, float]:
    """(keep, push) of the step from a level with (signal1, noise1) down to one with (signal0, noise0)."""
    if prediction_type == "epsilon":
        return signal0 / signal1, noise0 - signal0 * noise1 / signal1
    return signal0 * signal1 + noise0 * noise1, noise0 * signal1 - signal0 * noise1


def require_finite(z: Tensor, method: str, level: int) -> Tensor:
    """Return `z`, or raise NonFiniteError naming the method, the level and what to do."""
    if not torch.isfinite(z).all():
        raise NonFiniteError(
            f"{method}: the latent of level {level} is not finite; use dtype float32 (or bfloat16), or a lower guidance scale"
        )
    return z
