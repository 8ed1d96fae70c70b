"""The embedded model's parts are ordinary Stable Diffusion parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from attention_control import list_sites
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.sampling import sample
from easyinv_edit.tabletop import networks
from easyinv_edit.tabletop.captions import vocabulary


@pytest.mark.parametrize("word", vocabulary())
def test_every_caption_word_is_one_token(word: str) -> None:
    tokenizer = networks.build_tokenizer()
    assert len(tokenizer(f"a {word} a").input_ids) == 5


def test_other_words_fall_back_to_bytes() -> None:
    tokenizer = networks.build_tokenizer()
    ids = tokenizer("football").input_ids
    assert len(ids) > 3
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "football"


def test_the_unet_has_the_sixteen_sites_of_sd() -> None:
    sites = list_sites(networks.build_unet())
    assert [site.tokens((16, 16)) for site in sites] == [256] * 2 + [64] * 2 + [16] * 2 + [4] + [16] * 3 + [64] * 3 + [256] * 3


def test_a_pipeline_gets_diffusers_own_attention_back(untrained: EditPipeline) -> None:
    processors = untrained.backbone.pipe.unet.attn_processors.values()
    assert {type(p) for p in processors} == {AttnProcessor2_0}


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
