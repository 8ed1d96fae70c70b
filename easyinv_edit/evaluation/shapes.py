"""The UNets of published models by their configurations alone: true size, random weights, nothing to download.

What an evaluation costs depends on shapes and dtype, not on what the weights hold, so speed and memory can be measured, and
attention sites counted, without any checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from easyinv_edit.conditioning import Conditioning
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.schedule import NoiseSchedule

DOWNSCALE = 8
"""Pixels per latent cell and side, of every model here."""
TOKENS = 77
TIME_IDS = 6


@dataclass(frozen=True)
class Shape:
    """A UNet's configuration.

    config: the fields of diffusers' UNet2DConditionModel that differ from its defaults (`attention_head_dim` is the number of
    heads, as in the published files); sites: where MasaCtrl controls it, by self-attention number; prediction_type: "epsilon"
    or "v_prediction".
    """

    config: Mapping[str, Any]
    sites: str
    prediction_type: str = "epsilon"

    @property
    def native_size(self) -> int:
        """Side in pixels of the square pictures the model was trained on."""
        return int(self.config["sample_size"]) * DOWNSCALE

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled text embedding, None where the UNet takes none."""
        if "projection_class_embeddings_input_dim" not in self.config:
            return None
        return int(self.config["projection_class_embeddings_input_dim"] - TIME_IDS * self.config["addition_time_embed_dim"])


SHAPES: dict[str, Shape] = {
    "sd14": Shape({"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}, sites="10-15"),
    "sd21": Shape(
        {
            "sample_size": 96,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        sites="10-15",
        prediction_type="v_prediction",
    ),
    "sdxl": Shape(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        sites="44-69",
    ),
}
"""Stable Diffusion 1.4 (1.5 has the same shape), 2.1 at 768 pixels (v prediction), and SDXL base 1.0."""


def on_meta(shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
    """The UNet without memory for its weights: shapes only, evaluation mode."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape.config)
    return nn.Module.to(unet, dtype).eval()  # diffusers' own `to` logs a notice about the cast


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """The UNet with random weights, evaluation mode, no gradients; never more memory than its weights in `dtype` take.

    Weights are uniform with deviation 1 / sqrt(3 fan-in), as torch's own layers begin, norms 1 and biases 0, so that
    activations stay finite in every dtype. On CPU and CUDA images are laid out channels last, which both compute fastest.
    """
    unet = on_meta(shape, dtype)
    if device.type in ("cpu", "cuda"):
        unet = unet.to(memory_format=torch.channels_last)
    unet = nn.Module.to_empty(unet, device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            bound = 1 / math.sqrt(parameter[0].numel())
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return unet


def parameters(shape: Shape) -> int:
    """How many parameters the UNet has."""
    return sum(p.numel() for p in on_meta(shape).parameters())


MAPS_PER_ROW = 64
"""Working memory of one row, in feature maps of the first block's width at the latent's size."""


def needed_bytes(shape: Shape, size: int, rows: int, dtype: torch.dtype) -> int:
    """Estimated memory of the weights and of one UNet call on `rows` rows at `size` x `size` pixels."""
    width = shape.config.get("block_out_channels", (320,))[0]
    maps = rows * MAPS_PER_ROW * width * (size // DOWNSCALE) ** 2
    return (parameters(shape) + maps) * dtype.itemsize


@torch.no_grad()
def evaluation_flops(shape: Shape, size: int) -> int:
    """Floating-point operations of one evaluation at `size` x `size` pixels, two per multiplication and addition.

    Counted on shapes: convolutions, linear layers and attention.
    """
    model = RandomModel(on_meta(shape), shape, size, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        model.predict(model.latents(), 1, model.conditioning(1))
    return counter.get_total_flops()


@dataclass(frozen=True)
class RandomModel:
    """As much of a backbone as inverting and sampling need, around a UNet of random weights.

    size: side of the pictures in pixels; generator: where latents and conditioning come from, on the CPU.
    """

    network: Any
    shape: Shape
    size: int
    device: torch.device
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    family: str = "random"

    def latents(self) -> Tensor:
        """Unit noise (1, C, H, W), float32."""
        side = self.size // DOWNSCALE
        return self._draw(1, self.network.config.in_channels, side, side)

    def conditioning(self, rows: int) -> Conditioning:
        """Random conditioning, float32."""
        embeddings = self._draw(rows, TOKENS, int(self.shape.config["cross_attention_dim"]))
        if self.shape.pooled_width is None:
            return Conditioning(embeddings)
        ids = torch.tensor([[self.size, self.size, 0, 0, self.size, self.size]] * rows, dtype=torch.float32)
        return Conditioning(embeddings, self._draw(rows, self.shape.pooled_width), ids.to(self.device))

    def _draw(self, *of: int) -> Tensor:
        return torch.randn(*of, generator=self.generator).to(self.device)

    def predict(self, z: Tensor, timestep: int | Tensor, conditioning: Conditioning) -> Tensor:
        """Raw UNet output (rows, C, H, W) in the latents' dtype; cost: one evaluation a row."""
        dtype, pooled = self.network.dtype, conditioning.pooled
        added = None if pooled is None else {"text_embeds": pooled.to(dtype), "time_ids": conditioning.time_ids}
        label = torch.as_tensor(timestep, device=z.device)
        text = conditioning.embeddings.to(dtype)
        out = self.network(z.to(dtype), label, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]
        return out.to(z.dtype)

    def denoiser(self, steps: int, targets: int, guidance: float) -> Denoiser:
        """The source, not guided, and guided targets on the schedule all these models were trained on."""
        given, negative = self.conditioning(1 + targets), self.conditioning(1 + targets)
        backbone: Any = self  # it neither encodes nor decodes, which no solver asks for
        schedule = noise_schedule(steps, self.shape.prediction_type)
        return Denoiser(backbone, schedule, given, (1.0, *[guidance] * targets), negative)


def noise_schedule(steps: int, prediction_type: str) -> NoiseSchedule:
    """Betas from 0.00085 to 0.012, linear in their roots; labels from 1 on in equal strides; steps: up to 999."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    labels = [1 + i * (1000 // steps) for i in range(steps)]
    return NoiseSchedule.from_alphas(alphas, labels, float(alphas[0]), prediction_type)
