"""The embedded model's parts are ordinary Stable Diffusion parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from safetensors.torch import load_file

from attention_control import list_sites
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.sampling import sample
from easyinv_edit.tabletop import networks
from easyinv_edit.tabletop.captions import vocabulary


@pytest.mark.parametrize("word", vocabulary())
def test_every_caption_word_is_one_token(word: str) -> None:
    tokenizer = networks.build_tokenizer()
    ids = tokenizer(f"a {word} a").input_ids
    assert len(ids) == 5
    assert tokenizer.decode(ids[2]).strip() == word


@pytest.mark.parametrize("text", ["football", "zebra café 7", "ß", "®", "木"])
def test_other_words_fall_back_to_bytes_and_can_be_read_back(text: str) -> None:
    tokenizer = networks.build_tokenizer()
    ids = tokenizer(text).input_ids
    assert len(ids) > len(text.split()) + 2
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_the_unet_has_the_sixteen_sites_of_sd() -> None:
    sites = list_sites(networks.build_unet())
    assert [site.tokens((16, 16)) for site in sites] == [256] * 2 + [64] * 2 + [16] * 2 + [4] + [16] * 3 + [64] * 3 + [256] * 3


def test_training_attends_plainly_and_a_pipeline_gets_diffusers_own_attention_back() -> None:
    tokenizer = networks.build_tokenizer()
    text, vae, unet = networks.build_text_encoder(tokenizer), networks.build_autoencoder(), networks.build_unet()
    parts = (vae, unet)
    assert {type(p) for part in parts for p in part.attn_processors.values()} == {AttnProcessor}
    networks.build_pipeline(vae, text, tokenizer, unet)
    assert {type(p) for part in parts for p in part.attn_processors.values()} == {AttnProcessor2_0}


def test_our_sampling_is_the_stock_pipelines(untrained_folder: Path, untrained: EditPipeline) -> None:
    """The whole of diffusers' own text-to-image path, guidance included, against denoiser and loop: same latents."""
    stock = StableDiffusionPipeline.from_pretrained(untrained_folder, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 10, "guidance_scale": 5.0, "latents": noise, "output_type": "latent"}
    theirs = stock("a red ball", **options).images
    backbone = untrained.backbone
    denoiser = Denoiser(backbone, backbone.schedule(10), backbone.embed(["a red ball"]), (5.0,), backbone.embed([""]))
    with torch.no_grad():
        ours = sample(denoiser, noise)
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4
    picture = stock("a red ball", **options | {"output_type": "pt"}).images
    with torch.no_grad():
        assert (picture - (backbone.decode(ours) / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-3
    assert picture.shape == (1, 3, 64, 64)


def test_the_export_mixes_dtypes_so_that_a_stock_load_does_not(untrained: EditPipeline, tmp_path: Path) -> None:
    """UNet and VAE are written in half precision, the text encoder in single; all of them load as float32."""
    networks.export(untrained.backbone.pipe, tmp_path)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert {part.dtype for part in (stock.unet, stock.vae, stock.text_encoder)} == {torch.float32}
    kept = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert sum(weight.nbytes for weight in kept.values()) == 2 * stock.unet.num_parameters()
