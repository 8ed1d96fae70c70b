"""What users load beside a tiny pipeline of `tests.models`, with random weights: ControlNets, IP-Adapters, LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from easyinv_edit.pipeline import EditPipeline
from tests import models

SIDE = 32
"""Of the pictures, pixels: what the tiny models were made for."""
SOURCE, TARGET, OTHER = "a red ball", "a blue cube", "a green cone"
MASACTRL = {"name": "masactrl", "start_step": 0}
"""MasaCtrl that acts from the first of so few steps."""


def photo(seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """An RGB picture of (width, height) with structure of its own per seed."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize(size, Image.Resampling.BICUBIC)


def wrapped(pipe: Any) -> EditPipeline:
    """The facade over a pipeline, without progress bars on either."""
    pipe.set_progress_bar_config(disable=True)
    edit = EditPipeline.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    return edit


def with_ddim(pipe: Any) -> Any:
    """The pipeline with Stable Diffusion's DDIM scheduler, which diffusers then samples as we do."""
    pipe.scheduler = DDIMScheduler(**models.BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return pipe


def controlnet(unet: UNet2DConditionModel, seed: int = 0) -> ControlNetModel:
    """A ControlNet of the UNet whose residuals are not zero, as they would be fresh."""
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8))
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        nn.init.normal_(layer.weight, std=0.5)
    return net.eval()


def with_controlnets(family: str, count: int = 1) -> Any:
    """diffusers' own ControlNet pipeline of the family, with DDIM's scheduler."""
    plain = models.FAMILIES[family]()
    nets = [controlnet(plain.unet, seed) for seed in range(count)]
    net = nets[0] if count == 1 else MultiControlNetModel(nets)
    if family == "sdxl":
        zeros = plain.config.force_zeros_for_empty_prompt
        made = StableDiffusionXLControlNetPipeline(
            **_parts(plain), controlnet=net, force_zeros_for_empty_prompt=zeros, add_watermarker=False
        )
    else:
        made = StableDiffusionControlNetPipeline(**_parts(plain), controlnet=net, requires_safety_checker=False)
    return with_ddim(made)


def _parts(pipe: Any) -> dict[str, Any]:
    return dict(pipe.components)


IMAGE_WIDTH, IMAGE_PROJECTION = 12, 10
"""Of the image encoder's hidden states and of its output."""


def image_encoder(seed: int = 0) -> CLIPVisionModelWithProjection:
    """A CLIP image encoder for pictures of `SIDE` pixels."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": IMAGE_WIDTH, "intermediate_size": 16, "projection_dim": IMAGE_PROJECTION}
    config = CLIPVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=16)
    return CLIPVisionModelWithProjection(config).eval()


def ip_adapter(unet: UNet2DConditionModel, seed: int = 0, kind: str = "plain") -> dict[str, dict[str, Tensor]]:
    """An IP-Adapter's weights under its authors' names. kind: "plain", or "plus", which reads the encoder's hidden states."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    width = unet.config.cross_attention_dim
    layers: dict[str, Tensor] = {}
    for number, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            layers |= {f"{number}.to_k_ip.weight": random(hidden, width), f"{number}.to_v_ip.weight": random(hidden, width)}
    if kind == "plus":
        return {"image_proj": _resampler(random, width), "ip_adapter": layers}
    projection = {"proj.weight": random(4 * width, IMAGE_PROJECTION), "proj.bias": random(4 * width)}
    projection |= {"norm.weight": 1 + random(width), "norm.bias": random(width)}
    return {"image_proj": projection, "ip_adapter": layers}


def _resampler(random: Callable[..., Tensor], width: int, inner: int = 64, tokens: int = 3) -> dict[str, Tensor]:
    """IP-Adapter Plus: four blocks of a perceiver with one head of 64."""
    made = {"latents": random(1, tokens, inner), "proj_in.weight": random(inner, IMAGE_WIDTH), "proj_in.bias": random(inner)}
    made |= {"proj_out.weight": random(width, inner), "proj_out.bias": random(width)}
    made |= {"norm_out.weight": 1 + random(width), "norm_out.bias": random(width)}
    for block in (f"layers.{number}" for number in range(4)):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            made |= {f"{block}.{norm}.weight": 1 + random(inner), f"{block}.{norm}.bias": random(inner)}
        made |= {f"{block}.0.to_q.weight": random(inner, inner), f"{block}.0.to_kv.weight": random(2 * inner, inner)}
        made |= {f"{block}.0.to_out.weight": random(inner, inner)}
        made |= {f"{block}.1.1.weight": random(4 * inner, inner), f"{block}.1.3.weight": random(inner, 4 * inner)}
    return made


def load_ip_adapters(pipe: Any, *kinds: str) -> Any:
    """The pipeline with an IP-Adapter of each kind loaded by diffusers itself, and an image encoder for them."""
    preprocess = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    pipe.register_modules(image_encoder=image_encoder(), feature_extractor=preprocess)
    weights = [ip_adapter(pipe.unet, seed, kind) for seed, kind in enumerate(kinds)]
    pipe.load_ip_adapter(weights, subfolder=[""] * len(kinds), weight_name=["unused"] * len(kinds), image_encoder_folder=None)
    return pipe


def lora(
    pipe: Any, seed: int = 0, rank: int = 2, layers: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
) -> dict[str, Tensor]:
    """A LoRA of the UNet's attention and the first text encoder's, under peft's names."""
    generator = torch.Generator().manual_seed(seed)
    found = {f"unet.{name}": module for name, module in pipe.unet.named_modules() if name.endswith(tuple(layers))}
    text = {f"text_encoder.{name}": module for name, module in pipe.text_encoder.named_modules() if name.endswith("q_proj")}
    made = {}
    for name, module in (found | text).items():
        made[f"{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator)
        made[f"{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) / 2
    return made
