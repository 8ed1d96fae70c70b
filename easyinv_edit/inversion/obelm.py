"""O-BELM: the bidirectional explicit linear multistep sampler of least local error, an exact inverse at DDIM's cost.

Wang, Yin, Dong, Qian, Zhang, Zhao and Qian, "BELM: Bidirectional Explicit Linear Multi-step Sampler for Exact Inversion in
Diffusion Models", arXiv 2410.07273. In the coordinates x = z / signal and h = noise / signal it is the leapfrog rule for
unequal steps H_i = h_i - h_{i-1}:

    x_{i+1} = r^2 x_{i-1} + (1 - r^2) x_i + H_{i+1} (1 + r) e_i,    r = H_{i+1} / H_i

read upward to invert and solved for x_{i-1} to sample: exact for any network and guidance. Going up, r^2 > 1 amplifies
rounding; going down damps it. The authors' code adds a term at its first step that is not multiplied by the prediction; ours
starts with DDIM's step.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import ScheduleError
from easyinv_edit.inversion.base import SETTINGS, Generators, InversionMethod, OnLevel
from easyinv_edit.inversion.two_latents import climb_pairs, pair_sampler
from easyinv_edit.sampling import Sampler
from easyinv_edit.schedule import NoiseSchedule
from easyinv_edit.trajectory import Trajectory


@dataclass(frozen=True, config=SETTINGS)
class OBELM(InversionMethod):
    """O-BELM (arXiv 2410.07273). Has no settings.

    Its sampler is its own. Extra: one latent, `extras["correction"]` (1, rows, C, H, W). With few steps the ratio of the first
    steps is large and z_T far from unit deviation. Raises ScheduleError on schedules with zero terminal SNR, whose last step is
    infinitely long in its coordinates, or with a first step of no length. Cost: one evaluation per level and one more. With a
    half-precision network it is exact only until a latent, kept in float32, rounds to another value than on the way up: from
    there on the network's rounding adds up, to some per cent in bfloat16.
    """

    name: ClassVar[str] = "obelm"
    paper: ClassVar[str] = "arXiv 2410.07273"
    fewest_steps: ClassVar[int] = 10

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Invert clean latents z0 (rows, C, H, W)."""
        if denoiser.schedule.signal[-1] <= 0:
            raise ScheduleError("obelm: this schedule ends without signal (zero terminal SNR); use bdia or fixed_point")
        rising = [n / s for n, s in zip(denoiser.schedule.noise, denoiser.schedule.signal, strict=True)]
        if any(later <= earlier for earlier, later in pairwise(rising)):
            raise ScheduleError("obelm: two levels of this schedule have the same noise; set steps_offset=1, or use bdia")
        return climb_pairs(self, denoiser, z0, self._up, on_level)

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """One per level and one for the correction at the top."""
        return (num_inference_steps + 1) * (1 + guided)

    def sampler(self, trajectory: Trajectory) -> Sampler:
        """O-BELM's own step on pairs of latents."""
        return pair_sampler(trajectory, self._down)

    @staticmethod
    def _up(schedule: NoiseSchedule, below: Tensor, z: Tensor, epsilon: Tensor, level: int) -> Tensor:
        square, push = _leapfrog(schedule, level)
        s = schedule.signal
        x = square * (below / s[level - 1]) + (1 - square) * (z / s[level]) + push * epsilon
        return s[level + 1] * x

    @staticmethod
    def _down(schedule: NoiseSchedule, above: Tensor, z: Tensor, epsilon: Tensor, level: int) -> Tensor:
        square, push = _leapfrog(schedule, level)
        s = schedule.signal
        x = (above / s[level + 1] - (1 - square) * (z / s[level]) - push * epsilon) / square
        return s[level - 1] * x


def _leapfrog(schedule: NoiseSchedule, level: int) -> tuple[float, float]:
    """(r^2, H_{i+1} (1 + r)) at a level with neighbours on both sides."""
    below, here, above = (schedule.noise[i] / schedule.signal[i] for i in (level - 1, level, level + 1))
    ratio = (above - here) / (here - below)
    return ratio**2, (above - here) * (1 + ratio)
