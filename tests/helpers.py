"""What the tests share: toy backbones with closed forms, a tiny UNet with SD's topology, and recorders.

No weights and no network: everything here is made in milliseconds from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from easyinv_edit.conditioning import Conditioning
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.schedule import NoiseSchedule

Output = Callable[[Tensor, int, Tensor], Tensor]
"""(latents, timestep, embeddings (rows, tokens, dim)) -> raw model output."""
Command = Callable[..., tuple[int, str, str]]
"""Arguments of the command line -> (exit code, stdout, stderr)."""


def ddim_scheduler(steps: int = 50, prediction_type: str = "epsilon", **changes: object) -> DDIMScheduler:
    """SD 1.x's scheduler with everything explicit, ready at `steps`."""
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    scheduler = DDIMScheduler(**{**settings, **changes})
    scheduler.set_timesteps(steps)
    return scheduler


def make_schedule(steps: int = 50, prediction_type: str = "epsilon", **changes: object) -> NoiseSchedule:
    """The NoiseSchedule of `ddim_scheduler`."""
    s = ddim_scheduler(steps, prediction_type, **changes)
    return NoiseSchedule.from_alphas(s.alphas_cumprod, s.timesteps.tolist(), float(s.final_alpha_cumprod), prediction_type)


class _Network(nn.Module):
    """A callable as a module, so that cost hooks and devices work as on a UNet."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: int, embeddings: Tensor) -> Tensor:
        return self.output(sample, timestep, embeddings)


@dataclass
class ToyBackbone:
    """A backbone whose output is a plain function; it records (timestep, latents) of every call."""

    output: Output
    family: str = "sd"
    calls: list[tuple[int, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = _Network(self.output)
        self.device = torch.device("cpu")

    def predict(self, z: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
        self.calls.append((timestep, z.clone()))
        return self.network(z, timestep, conditioning.embeddings.to(z))


def embeddings(*values: float) -> Conditioning:
    """One row per value: a (1, 1) embedding filled with it, enough to tell rows apart."""
    return Conditioning(torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1))


def constant(value: Tensor) -> Output:
    """The same output whatever comes in."""
    return lambda z, _t, _e: value.expand_as(z)


def gaussian(schedule: NoiseSchedule, variance: float = 0.81) -> Output:
    """The optimal output for data ~ N(0, variance): epsilon or v, in closed form."""
    level = {t: i for i, t in enumerate(schedule.timesteps)}

    def output(z: Tensor, t: int, _e: Tensor) -> Tensor:
        a, g = schedule.signal[level[t]], schedule.noise[level[t]]
        total = variance * a * a + g * g
        if schedule.prediction_type == "epsilon":
            return g / total * z
        return (a * g - a * g * variance) / total * z

    return output


def denoiser_like(schedule: NoiseSchedule, strength: float = 0.1, seed: int = 0) -> Output:
    """`gaussian` plus a smooth nonlinear field: something an inverter cannot get exactly right."""
    exact = gaussian(schedule)
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(4, 4, 3, 3, generator=generator, dtype=torch.float64) / 6

    def output(z: Tensor, t: int, e: Tensor) -> Tensor:
        bent = torch.tanh(nn.functional.conv2d(z, kernel.to(z), padding=1) + 0.1 * e.mean((1, 2))[:, None, None, None])
        return exact(z, t, e) + strength * bent

    return output


def toy_denoiser(output: Output, schedule: NoiseSchedule, rows: int = 1, guidance: Sequence[float] | None = None) -> Denoiser:
    """A denoiser over a toy backbone; row r is conditioned on the number r + 1, its negative on 0."""
    scales = tuple(guidance or [1.0] * rows)
    return Denoiser(
        backbone=ToyBackbone(output),
        schedule=schedule,
        conditioning=embeddings(*(float(r + 1) for r in range(rows))),
        guidance=scales,
        negative=embeddings(*([0.0] * rows)),
    )


def smooth_latent(seed: int = 0, size: tuple[int, int] = (8, 8), rows: int = 1) -> Tensor:
    """A smooth float64 latent (rows, 4, H, W) with deviation about 0.9."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(rows, 4, 4, 4, generator=generator, dtype=torch.float64)
    z = nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return 0.9 * z / z.std()


def tiny_unet(seed: int = 0, dtype: torch.dtype = torch.float64) -> UNet2DConditionModel:
    """SD 1.x's block structure at 8 channels a head: 16 self-attention sites, random weights, evaluation mode."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=2,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    return unet.to(dtype).eval()


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


def seeded(*seeds: int) -> list[torch.Generator]:
    """A generator per row."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]
