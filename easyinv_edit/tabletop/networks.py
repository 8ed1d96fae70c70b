"""The networks of the embedded model, in exactly SD 1.x's structure, and their export as an ordinary diffusers folder.

AutoencoderKL (factor 8), CLIPTextModel with a vocabulary of its own, and a
UNet2DConditionModel with SD's block types: 16 self-attention sites in the places where SD 1.x has them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from itertools import chain
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from easyinv_edit.tabletop.captions import vocabulary

PICTURE_SIZE = 128
"""Side of the pictures the model is trained on, pixels."""
LATENT_SIZE = 16
TOKENS = 24
"""Longest prompt in tokens, start and end included."""
TEXT_WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order: what CLIP's tokenizer splits words into."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which every caption word is one token and any other word falls back to bytes."""
    merges: dict[tuple[str, str], None] = {}
    words: list[str] = []
    for word in vocabulary():
        tail = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            merges.setdefault((letter, tail))
            tail = letter + tail
            words.append(tail)
    symbols = _byte_symbols()
    entries = dict.fromkeys([*symbols, *(s + "</w>" for s in symbols), *words, START, END])
    with tempfile.TemporaryDirectory() as folder:
        vocabulary_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary_file.write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
        merges_file.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
        return CLIPTokenizer.from_pretrained(
            folder, model_max_length=TOKENS, bos_token=START, eos_token=END, unk_token=END, pad_token=END
        )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A two-layer CLIP text model, 128 wide, with embeddings large enough to be learnt from scratch in an hour."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    embeddings = getattr(model, "text_model", model).embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.1)
    return model


def build_autoencoder() -> AutoencoderKL:
    """AutoencoderKL for 128-pixel pictures: 16 x 16 x 4 latents, 3.4 M parameters; whitened later, so scaling_factor is 1."""
    model = AutoencoderKL(
        block_out_channels=(32, 64, 96, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PICTURE_SIZE,
        scaling_factor=1.0,
    )
    use_plain_attention(model)
    return model


def build_unet() -> UNet2DConditionModel:
    """SD 1.x's UNet at (64, 96, 128, 96) channels and two heads: 9.9 M parameters, 0.96 GFLOP an evaluation.

    Trained with plain softmax attention: on a CPU the backward pass of fused attention takes half of a training step.
    """
    model = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(64, 96, 128, 96),
        layers_per_block=2,
        attention_head_dim=2,  # as in SD 1.x's configuration, this is the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )
    use_plain_attention(model)
    return model


def weights_digest(*models: nn.Module) -> str:
    """SHA-256 of all weights in float32, in hexadecimal digits: the same wherever and in whatever dtype they were kept."""
    digest = hashlib.sha256()
    for value in chain.from_iterable(model.state_dict().values() for model in models):
        digest.update(value.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def use_plain_attention(*models: AutoencoderKL | UNet2DConditionModel) -> None:
    """Softmax attention for training; see `build_unet`. `build_pipeline` puts back the fused one of a loaded model."""
    for model in models:
        model.set_attn_processor(AttnProcessor())


def build_scheduler() -> DDIMScheduler:
    """SD 1.x's noise schedule with every field that matters to inversion said explicitly."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as one stock StableDiffusionPipeline. It has no safety checker: it can only draw solids on a table."""
    for model in (vae, unet):  # diffusers' `set_default_attn_processor` would set the plain one
        model.set_attn_processor(AttnProcessor2_0())
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write `pipe` to `folder` as safetensors, UNet and VAE in float16 (29 MB).

    The text encoder stays float32: transformers loads it in the dtype it was saved in and diffusers the others in float32, so
    that a stock pipeline loaded without a dtype would else be mixed. The folder does not say where networks came from.
    """
    for network in (pipe.unet, pipe.vae):
        network.register_to_config(_name_or_path="")
    pipe.unet.half()
    pipe.vae.half()
    pipe.text_encoder.float()
    pipe.save_pretrained(folder, safe_serialization=True)
