"""Tiny diffusers pipelines of every served family with random weights, made in a second from a seed.

Structures are the published ones, widths are not: 16 self-attention sites for Stable Diffusion 1.x and 2.x, 70 for XL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from easyinv_edit.tabletop.networks import build_autoencoder, build_tokenizer, build_unet

WIDTH = 16
"""Of the text embeddings; SDXL's are twice as wide."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def text_encoder(tokenizer: CLIPTokenizer, kind: type[Any] = CLIPTextModel, layers: int = 2) -> Any:
    """A CLIP text encoder `WIDTH` wide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def autoencoder(**changes: Any) -> AutoencoderKL:
    """An AutoencoderKL of factor 4."""
    settings = {"block_out_channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32, **changes}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(latent_channels=4, **blocks, **settings).eval()


def sd_unet(**changes: Any) -> UNet2DConditionModel:
    """Stable Diffusion 1.x's UNet, 16 sites."""
    settings = {"attention_head_dim": 2, "cross_attention_dim": WIDTH, **changes}
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8, 16, 16), layers_per_block=2, norm_num_groups=4, **settings
    ).eval()


def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    """SDXL's UNet, 70 sites."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        **changes,
    ).eval()


def sd(seed: int = 0, *, vae: Any = None, scheduler: Any = None, **unet: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: epsilon prediction, one number of heads."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder() if vae is None else vae,
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=sd_unet(**unet),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        if scheduler is None
        else scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd_v(seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 2.x at 768: v prediction, linear projections, heads that grow with the width."""
    settings = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction"}
    heads = {"attention_head_dim": (1, 1, 2, 2), "use_linear_projection": True}
    return sd(seed, scheduler=DDIMScheduler(**BETAS, **settings), **heads)


def sdxl(seed: int = 0, *, zeros: bool = True, **unet: Any) -> StableDiffusionXLPipeline:
    """SDXL with the Euler scheduler it comes with."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=text_encoder(tokenizer),
        text_encoder_2=text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=sdxl_unet(**unet),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


FAMILIES: dict[str, Callable[[], Any]] = {"sd": sd, "sd-v": sd_v, "sdxl": sdxl}
"""What the contract tests run over."""


def narrow_unet() -> UNet2DConditionModel:
    """The embedded model's UNet at a quarter of its width."""
    config = {**build_unet().config, "block_out_channels": (16, 24, 32, 24)}
    return UNet2DConditionModel.from_config(config)


def narrow_autoencoder() -> AutoencoderKL:
    """The embedded model's autoencoder at a quarter of its width."""
    return AutoencoderKL.from_config({**build_autoencoder().config, "block_out_channels": (8, 16, 24, 32)})


def small_autoencoder() -> AutoencoderKL:
    """64 pixels, 16 x 16 x 4 latents: an autoencoder that tests can run often."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )
