"""SDXL: what the network is told of a picture's size, what guidance moves away from, and whose pipelines are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch import Tensor

from attention_control import MasaCtrl
from easyinv_edit.backbones import wrap
from easyinv_edit.conditioning import Framing
from easyinv_edit.errors import ModelError
from easyinv_edit.images import Policy, fit
from easyinv_edit.inversion import EasyInv
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory
from tests.models import sd, sd_unet, sdxl, sdxl_unet

T = 2
SOURCE, TARGETS = "a red cube", ["a blue ball", "a green cone"]
CONTROL = MasaCtrl(start_step=0)


@cache
def edit_pipeline(name: str = "sdxl") -> EditPipeline:
    """Made once; nothing that is done with it stays."""
    made = {"sdxl": sdxl, "sd": sd, "zeros off": lambda: sdxl(zeros=False)}[name]()
    pipe = EditPipeline.from_pipe(made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gradient(size: tuple[int, int]) -> Image.Image:
    """A picture (width, height) whose red says how far right a pixel is, its green how far down."""
    width, height = size
    red, green = np.linspace(0, 255, width)[None].repeat(height, 0), np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([red, green, 0 * red], -1).round().astype(np.uint8))


@contextmanager
def told() -> Iterator[list[dict[str, Tensor]]]:
    """What the UNet is told beside the text in each call made inside."""
    calls: list[dict[str, Tensor]] = []

    def record(_module: Any, _args: Any, options: dict[str, Any]) -> None:
        calls.append(options["added_cond_kwargs"])

    hook = edit_pipeline().backbone.network.register_forward_pre_hook(record, with_kwargs=True)
    yield calls
    hook.remove()


def ids(calls: Sequence[dict[str, Tensor]]) -> list[list[list[float]]]:
    return [call["time_ids"].tolist() for call in calls]


# The framing of a fitted picture, in closed form


@pytest.mark.parametrize(
    ("original", "size", "policy", "crop"),
    [
        ((64, 64), (64, 64), "crop", (0, 0)),
        ((200, 100), (32, 32), "crop", (0, 16)),
        ((100, 200), (32, 32), "crop", (16, 0)),
        ((1920, 1080), (1024, 1024), "crop", (0, 398)),
        ((3000, 2000), (1024, 1024), "crop", (0, 256)),
        ((512, 768), (1024, 1024), "crop", (256, 0)),
        ((600, 600), (32, 64), "crop", (16, 0)),
        ((600, 600), (64, 32), "crop", (0, 16)),
        ((10, 1000), (64, 64), "crop", (3168, 0)),
        ((200, 100), (32, 32), "pad", (0, 0)),
        ((200, 100), (32, 32), "stretch", (0, 0)),
        ((100, 300), (64, 32), "pad", (0, 0)),
        ((100, 300), (64, 32), "stretch", (0, 0)),
    ],
)
def test_framing(original: tuple[int, int], size: tuple[int, int], policy: Policy, crop: tuple[int, int]) -> None:
    """Original and model's size are (height, width); a crop begins at half of what hangs over once the picture is scaled."""
    _, record = fit(Image.new("RGB", original), size, policy)
    assert record.framing == Framing(original[::-1], crop, size)
    assert type(record).from_dict(record.as_dict()).framing == record.framing


@pytest.mark.parametrize("original", [(64, 64), (97, 61), (61, 97), (333, 128), (40, 250), (1000, 999)])
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 64), (128, 32)])
def test_the_crop_is_where_the_models_picture_lies_in_the_scaled_one(original: tuple[int, int], size: tuple[int, int]) -> None:
    """So that cutting the scaled picture there gives the model's picture again."""
    fitted, record = fit(gradient(original), size, "crop")
    scale = max(size[1] / original[0], size[0] / original[1])
    scaled = gradient(original).resize(tuple(round(side * scale) for side in original), Image.Resampling.LANCZOS)
    top, left = record.framing.crop
    cut = scaled.crop((left, top, left + size[1], top + size[0]))
    step = 255 / min(original) * max(1, 1 / scale)  # red or green of one pixel of either picture
    inner = (slice(1, -1), slice(1, -1))
    off = np.abs(np.asarray(fitted, float)[inner] - np.asarray(cut, float)[inner]).mean((0, 1))
    assert off.max() <= 1.5 * step + 1


# What the network is told


@pytest.mark.parametrize(
    ("original", "options", "expected"),
    [
        ((64, 48), {}, [48, 64, 0, 5, 32, 32]),
        ((48, 64), {}, [64, 48, 5, 0, 32, 32]),
        ((64, 48), {"fit": "pad"}, [48, 64, 0, 0, 32, 32]),
        ((64, 48), {"fit": "stretch"}, [48, 64, 0, 0, 32, 32]),
        ((64, 48), {"size": (32, 64)}, [48, 64, 8, 0, 32, 64]),
        ((64, 48), {"size": (64, 32)}, [48, 64, 0, 27, 64, 32]),
    ],
)
def test_source_targets_and_negatives_are_told_the_same(
    original: tuple[int, int], options: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    pipe = edit_pipeline()
    with told() as inverting:
        inverted = pipe.invert(gradient(original), SOURCE, "ddim", num_inference_steps=T, **options)
    inverted.save(tmp_path / "a.safetensors")
    with told() as editing:
        pipe.edit(Trajectory.load(tmp_path / "a.safetensors"), TARGETS, control=CONTROL, output_type="latent")
    with told() as sampling:
        pipe.reconstruct(inverted)
    assert ids(inverting) == ids(sampling) == [[expected]] * T
    assert ids(editing) == [[expected] * 6] * T


def test_pictures_of_a_batch_are_told_their_own_sizes() -> None:
    pictures = [gradient((64, 48)), gradient((40, 80))]
    with told() as together:
        inverted = edit_pipeline().invert_batch(pictures, [SOURCE, ""], "ddim", num_inference_steps=T)
    own = [[48, 64, 0, 5, 32, 32], [80, 40, 16, 0, 32, 32]]
    assert ids(together) == [own] * T
    with told() as again:
        edit_pipeline().reconstruct(inverted)
    assert ids(again) == [own] * T
    alone = edit_pipeline().invert(pictures[1], "", "ddim", num_inference_steps=T)
    assert (inverted[1].latents - alone.latents).abs().max() < 1e-4


def test_a_guided_batch_moves_each_row_away_from_its_own_size() -> None:
    pictures = [gradient((64, 48)), gradient((40, 80))]
    with told() as calls, pytest.warns(match="guidance 2"):
        edit_pipeline().invert_batch(pictures, [SOURCE, ""], "ddim", num_inference_steps=T, guidance_scale=2.0)
    own = [[48, 64, 0, 5, 32, 32], [80, 40, 16, 0, 32, 32]]
    assert ids(calls) == [own * 2] * T


def test_a_style_picture_is_told_its_own_size() -> None:
    pipe = edit_pipeline()
    content, style = (pipe.invert(gradient(size), SOURCE, "ddim", num_inference_steps=T) for size in ((64, 48), (40, 80)))
    with told() as calls:
        pipe.edit(content, TARGETS[0], style=style, control="portrait", guidance_scale=1.0, output_type="latent")
    first, second = [48, 64, 0, 5, 32, 32], [80, 40, 16, 0, 32, 32]
    assert ids(calls) == [[first, second, first]] * T


def test_sizes_matter() -> None:
    """The same pixels, said to come from pictures of other sizes."""
    backbone = edit_pipeline().backbone
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    framings = [Framing((512, 512), (0, 0), (32, 32)), Framing((512, 512), (0, 9), (32, 32))]
    with torch.no_grad():
        first, second = backbone.predict(z, 500, backbone.embed([SOURCE] * 2, framings))
    assert (first - second).abs().max() > 1e-4


def test_without_a_framing_the_picture_is_whole_and_of_the_models_size() -> None:
    embedded = edit_pipeline().backbone.embed(["", SOURCE], [None, Framing((1, 2), (3, 4), (5, 6))])
    assert embedded.time_ids is not None
    assert embedded.time_ids.tolist() == [[32, 32, 0, 0, 32, 32], [1, 2, 3, 4, 5, 6]]
    bare = edit_pipeline().backbone.embed([""]).time_ids
    assert bare is not None
    assert torch.equal(bare, embedded.time_ids[:1])


# Text


@torch.no_grad()
def test_text_is_both_encoders_penultimate_layers_and_the_seconds_projection() -> None:
    pipe = sdxl()
    prompts = [SOURCE, "", "A green Ring."]
    embedded = wrap(pipe).embed(prompts)
    assert embedded.pooled is not None
    read = {"padding": "max_length", "max_length": pipe.tokenizer.model_max_length, "return_tensors": "pt"}
    outputs = [
        encoder(tokenizer(prompts, **read).input_ids, output_hidden_states=True)
        for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
    ]
    assert torch.equal(embedded.embeddings, torch.cat([output.hidden_states[-2] for output in outputs], -1))
    assert torch.equal(embedded.pooled, outputs[1].text_embeds)
    assert embedded.embeddings.shape == (3, pipe.tokenizer.model_max_length, 32)
    theirs, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.equal(embedded.embeddings, theirs)
    assert torch.equal(embedded.pooled, pooled)


def test_no_prompt_is_zeros_and_the_empty_prompt_is_text() -> None:
    embedded = edit_pipeline().backbone.embed([SOURCE, None, ""])
    assert embedded.pooled is not None
    sizes = [
        (text.abs().max() > 0, pooled.abs().max() > 0)
        for text, pooled in zip(embedded.embeddings, embedded.pooled, strict=True)
    ]
    assert sizes == [(True, True), (False, False), (True, True)]
    off = edit_pipeline("zeros off").backbone.embed([None, ""])
    assert off.select([0]).equals(off.select([1]))


# What guidance moves away from, and what that costs


@pytest.mark.parametrize(
    ("name", "source", "negative", "rows"),
    [
        ("sdxl", "", None, 4),
        ("sdxl", "", "", 3),
        ("sdxl", "", "a ring", 4),
        ("sdxl", SOURCE, None, 4),
        ("sdxl", SOURCE, SOURCE, 3),
        ("zeros off", "", None, 3),
        ("zeros off", "", "", 3),
        ("sd", "", None, 3),
        ("sd", "", "a ring", 4),
    ],
)
def test_where_the_source_keeps_a_twin(name: str, source: str, negative: str | None, rows: int) -> None:
    """Where its prompt is not what guidance moves away from: SDXL moves away from zeros, and "" is text."""
    result = edit_pipeline(name)(
        gradient((48, 48)),
        TARGETS[0],
        source,
        inversion="ddim",
        num_inference_steps=T,
        control=CONTROL,
        negative_prompt=negative,
        output_type="latent",
    )
    assert result.cost["edit"].evaluations == rows * T
    assert result.cost["edit"].calls == T


def test_the_negative_rows_are_zeros_unless_they_are_said() -> None:
    pipe = edit_pipeline()
    inverted = pipe.invert(gradient((48, 48)), "", "ddim", num_inference_steps=T)
    silent: dict[Any, list[bool]] = {}
    for negative in (None, ""):
        with told() as calls:
            pipe.edit(inverted, TARGETS[0], control=CONTROL, negative_prompt=negative, output_type="latent")
        silent[negative] = [not row.any() for row in calls[0]["text_embeds"]]
    assert silent == {None: [True, True, False, False], "": [False, False, False]}


def test_the_two_meanings_of_no_negative_prompt_are_different_edits() -> None:
    pipe = edit_pipeline()
    inverted = pipe.invert(gradient((48, 48)), "", "ddim", num_inference_steps=T)
    zeros, text = (
        pipe.edit(inverted, TARGETS[0], control=CONTROL, negative_prompt=n, output_type="latent").images for n in (None, "")
    )
    assert (zeros - text).abs().max() > 1e-3


# EasyInv's settings of the family


@pytest.mark.parametrize(("name", "other"), [("sdxl", "sd"), ("sd", "sdxl")])
def test_easyinv_takes_the_settings_of_the_family(name: Any, other: Any) -> None:
    steps, picture = 10, gradient((32, 32))
    hits = {"sd": [1, 2], "sdxl": [9]}  # between 0.05 and 0.25, and between 0.85 and 0.95 of them
    assert EasyInv().hit_steps(steps, name) == hits[name]
    auto, own, others, plain = (
        edit_pipeline(name).invert(picture, SOURCE, method, num_inference_steps=steps).latents
        for method in ("easyinv", EasyInv(preset=name), EasyInv(preset=other), "ddim")
    )
    assert torch.equal(auto, own)
    assert not torch.equal(auto, others)
    first = 1 + hits[name][0]  # the level the first blend leads to
    assert torch.equal(auto[:first], plain[:first])
    assert not torch.equal(auto[first], plain[first])


# The autoencoder's factor


@torch.no_grad()
def test_the_autoencoders_factor_is_xls_own_in_both_directions() -> None:
    backbone = edit_pipeline().backbone
    vae = backbone.pipe.vae
    assert (vae.config.scaling_factor, vae.config.force_upcast) == (0.13025, True)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = backbone.encode(pixels)
    assert torch.equal(z, vae.encode(pixels).latent_dist.mode() * 0.13025)
    assert torch.allclose(backbone.decode(z), vae(pixels).sample, atol=1e-5)
    assert not torch.allclose(vae.decode(z / 0.18215).sample, vae(pixels).sample, atol=1e-3)


# Whose pipelines are refused


def refiner() -> Any:
    return StableDiffusionXLPipeline(**{**sdxl().components, "text_encoder": None, "tokenizer": None}, add_watermarker=False)


def refiner_as_published() -> Any:
    parts = {**sdxl().components, "text_encoder": None, "tokenizer": None}
    return StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False)


def inpainting() -> Any:
    return StableDiffusionXLInpaintPipeline(**{**sdxl().components, "unet": sdxl_unet(in_channels=9)}, add_watermarker=False)


def sd_inpainting() -> Any:
    parts = {**sd().components, "unet": sd_unet(in_channels=9)}
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def sizeless() -> Any:
    return StableDiffusionXLPipeline(**{**sdxl().components, "unet": sd_unet(cross_attention_dim=32)}, add_watermarker=False)


def textless() -> Any:
    return StableDiffusionPipeline(**{**sd().components, "text_encoder": None}, requires_safety_checker=False)


@pytest.mark.parametrize("make", [refiner, refiner_as_published, inpainting, sd_inpainting, sizeless, textless, object])
def test_other_pipelines_are_refused_in_one_line(make: Any) -> None:
    pipe = make()
    with pytest.raises(ModelError) as refusal:
        EditPipeline.from_pipe(pipe)
    says = f"{type(pipe).__name__} is of no known family (sd, sdxl); load a text-to-image pipeline of Stable Diffusion"
    assert str(refusal.value).startswith(says)
    assert str(refusal.value).endswith("no inpainting model and no refiner")
    assert "\n" not in str(refusal.value)


def test_a_refiners_folder_is_refused(tmp_path: Path) -> None:
    refiner().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no inpainting model and no refiner$"):
        EditPipeline.from_pretrained(tmp_path)


def test_a_picture_to_picture_pipeline_of_the_base_model_is_served() -> None:
    """The same parts, whatever the pipeline does with them."""
    parts = sdxl().components
    pipe = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    assert EditPipeline.from_pipe(pipe).backbone.family == "sdxl"
