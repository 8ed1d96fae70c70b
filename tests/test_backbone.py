"""The Stable Diffusion adapter: nothing cast, nothing copied, prompts and schedules as diffusers has them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from easyinv_edit.backbones.sd import StableDiffusion, same_model
from easyinv_edit.backbones.text import fitting
from easyinv_edit.errors import EasyInvError, EasyInvWarning, ModelError
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.schedule import NoiseSchedule

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def backbone(untrained: EditPipeline) -> StableDiffusion:
    """The adapter over the untrained model, float32."""
    return untrained.backbone


@pytest.fixture
def pixels() -> Tensor:
    """A smooth batch of one, in [-1, 1]."""
    line = torch.linspace(-1, 1, 64)
    return torch.stack([line.expand(64, 64), line[:, None].expand(64, 64), torch.zeros(64, 64)])[None]


# The autoencoder


@torch.no_grad()
def test_encoding_takes_the_mode_of_the_posterior(backbone: StableDiffusion, pixels: Tensor) -> None:
    vae = backbone.pipe.vae
    vae.register_to_config(scaling_factor=0.18215)
    z = backbone.encode(pixels)
    assert torch.equal(z, vae.encode(pixels).latent_dist.mode() * 0.18215)
    assert torch.equal(z, backbone.encode(pixels))
    assert torch.equal(backbone.decode(z), vae.decode(z / 0.18215).sample)


@torch.no_grad()
def test_a_half_precision_autoencoder_works_in_float32_and_is_half_again(backbone: StableDiffusion, pixels: Tensor) -> None:
    vae = backbone.pipe.vae.to(torch.float16)
    exact = vae.float().encode(pixels).latent_dist.mode()
    vae.half()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    seen = []
    vae.encoder.register_forward_hook(lambda _m, given, _out: seen.append(given[0].dtype))
    z = backbone.encode(pixels)
    assert (seen, z.dtype) == ([torch.float32], torch.float32)
    assert torch.allclose(z, exact, atol=1e-5)
    assert backbone.decode(z).dtype == torch.float32
    assert vae.dtype == torch.float16
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_a_half_precision_autoencoder_is_half_again_after_an_error(backbone: StableDiffusion) -> None:
    vae = backbone.pipe.vae.to(torch.float16)
    with pytest.raises(RuntimeError):
        backbone.encode(torch.zeros(1, 5, 64, 64))
    with pytest.raises(RuntimeError):
        backbone.decode(torch.zeros(1, 5, 16, 16))
    assert vae.dtype == torch.float16


# The user's pipeline stays the user's


def test_wrapping_casts_and_replaces_nothing(backbone: StableDiffusion, picture: Image.Image) -> None:
    pipe = backbone.pipe.to(torch.bfloat16)
    parts = {name: getattr(pipe, name) for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler")}
    config = dict(pipe.scheduler.config)
    edit = EditPipeline.from_pipe(pipe)
    edit.set_progress_bar_config(disable=True)
    edit(picture, "a red cube", inversion="ddim", num_inference_steps=2)
    assert edit.backbone.pipe is pipe
    assert all(getattr(pipe, name) is part for name, part in parts.items())
    assert dict(pipe.scheduler.config) == config
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_edits_are_finite(untrained_folder: Path, picture: Image.Image, dtype: torch.dtype) -> None:
    pipe = EditPipeline.from_pretrained(untrained_folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    result = pipe(picture, "a red cube", inversion="ddim", num_inference_steps=2, output_type="latent")
    assert pipe.backbone.network.dtype == dtype
    assert result.images.dtype == result.trajectory.latents.dtype == torch.float32
    assert torch.isfinite(result.images).all()


def test_sizes_come_from_the_model(backbone: StableDiffusion) -> None:
    assert (backbone.native_size, backbone.downscale, backbone.size_multiple) == ((64, 64), 4, 32)
    assert (backbone.dtype, backbone.device, backbone.family) == (torch.float32, torch.device("cpu"), "sd")


class Checker:
    """A safety checker that flags every picture, as diffusers' own would: by blackening it."""

    def __call__(self, images: Any, clip_input: Any) -> tuple[Any, list[bool]]:
        assert len(clip_input) == len(images)
        return np.zeros_like(images), [True] * len(images)


def test_a_safety_checker_is_kept_and_obeyed(untrained: EditPipeline, picture: Image.Image) -> None:
    pipe, checker = untrained.backbone.pipe, Checker()
    inputs = SimpleNamespace(pixel_values=torch.zeros(2, 3, 8, 8))
    inputs.to = lambda _device: inputs
    pipe.safety_checker, pipe.feature_extractor = checker, lambda _images, return_tensors: inputs
    result = untrained(picture, ["a cube", "a ball"], inversion="ddim", num_inference_steps=1, control="none")
    assert result.flagged == [True, True]
    assert result.summary()["flagged"] == [True, True]
    assert not any(np.asarray(image).any() for image in (*result.images, *result.edited))
    assert np.asarray(result.reconstruction).any()
    assert pipe.safety_checker is checker


# Prompts


@torch.no_grad()
def test_prompts_are_embedded_as_the_pipeline_does(backbone: StableDiffusion) -> None:
    prompts = ["a red cube", "", "an UNKNOWN word, here"]
    expected, _ = backbone.pipe.encode_prompt(prompts, torch.device("cpu"), 1, do_classifier_free_guidance=False)
    assert torch.equal(backbone.embed(prompts).embeddings, expected)


@pytest.mark.parametrize("space", [" ", "\n", "\t"])
@torch.no_grad()
def test_a_long_prompt_is_cut_after_a_whole_word_and_says_so(backbone: StableDiffusion, space: str) -> None:
    room = backbone.pipe.tokenizer.model_max_length - 2
    words = ["red", "cube"] * (room // 2)
    with pytest.warns(EasyInvWarning) as caught:
        cut = backbone.embed([space.join([*words, "blue", "ball"])])
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(f"the prompt has {room + 2} tokens and the model reads {room}")
    assert message.endswith(f"dropped: {space.join(['blue', 'ball'])!r}")
    assert len(message.splitlines()) == 1
    assert torch.equal(cut.embeddings, backbone.embed([" ".join(words)]).embeddings)


@torch.no_grad()
def test_a_word_that_only_half_fits_is_dropped_whole(backbone: StableDiffusion) -> None:
    words = ["red"] * (backbone.pipe.tokenizer.model_max_length - 4)
    with pytest.warns(EasyInvWarning, match="dropped: 'zyxwvut ball'"):
        cut = backbone.embed([" ".join([*words, "zyxwvut", "ball"])])
    assert torch.equal(cut.embeddings, backbone.embed([" ".join(words)]).embeddings)


def test_a_prompt_without_spaces_is_cut_where_the_room_ends(backbone: StableDiffusion) -> None:
    with pytest.warns(EasyInvWarning, match="dropped"):
        kept = fitting(backbone.pipe, "红" * 40)
    assert 0 < len(kept) < 40


def test_a_prompt_that_just_fits_is_silent(backbone: StableDiffusion) -> None:
    room = backbone.pipe.tokenizer.model_max_length - 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.embed([" ".join(["red"] * room)])


# The schedule


def reference(config: dict[str, Any], steps: int) -> NoiseSchedule:
    """The schedule of diffusers' DDIM built from a configuration, with what is for pixels turned off."""
    said = {key: value for key, value in config.items() if key != "_use_default_values"}
    s = diffusers.DDIMScheduler.from_config({"set_alpha_to_one": False, **said, "clip_sample": False, "thresholding": False})
    s.set_timesteps(steps)
    return NoiseSchedule.from_alphas(
        s.alphas_cumprod, s.timesteps.tolist(), float(s.final_alpha_cumprod), config["prediction_type"]
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
        ("EulerDiscreteScheduler", {"steps_offset": 1, "timestep_spacing": "leading"}),
        ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
        ("DDIMScheduler", {"clip_sample": True, "timestep_spacing": "trailing"}),
    ],
)
def test_any_scheduler_of_the_family_gives_the_ddim_schedule(
    backbone: StableDiffusion, name: str, settings: dict[str, Any], prediction_type: str
) -> None:
    scheduler = getattr(diffusers, name)(**SD_BETAS, prediction_type=prediction_type, **settings)
    backbone.pipe.scheduler = scheduler
    for steps in (50, 7):
        schedule = backbone.schedule(steps)
        assert schedule == reference(dict(scheduler.config), steps)
        assert (len(schedule), schedule.prediction_type) == (steps, prediction_type)


def test_a_v_prediction_model_edits(untrained: EditPipeline, picture: Image.Image) -> None:
    untrained.backbone.pipe.scheduler.register_to_config(prediction_type="v_prediction")
    result = untrained(picture, "a cube", inversion="ddim", num_inference_steps=2, output_type="latent")
    assert result.trajectory.schedule.prediction_type == "v_prediction"
    assert torch.isfinite(result.images).all()


def sample_scheduler() -> Any:
    """A scheduler that predicts the picture itself."""
    return diffusers.DDIMScheduler(**SD_BETAS, prediction_type="sample")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler, "FlowMatchEulerDiscreteScheduler has no betas; .* e.g. DDIM"),
        (sample_scheduler, "prediction type is 'sample'; this sampler serves epsilon and v_prediction"),
    ],
)
def test_a_scheduler_of_another_family_is_refused(backbone: StableDiffusion, make: Callable[[], Any], says: str) -> None:
    backbone.pipe.scheduler = make()
    with pytest.raises(EasyInvError, match=says) as caught:
        backbone.schedule(10)
    assert len(str(caught.value).splitlines()) == 1


def test_more_steps_than_the_model_has_levels_are_refused(backbone: StableDiffusion) -> None:
    for steps in (1000, 1001, 5000):  # at 1000 the labels of the "leading" spacing run over the end
        with pytest.raises(ModelError, match=f"num_inference_steps is {steps}; this model was trained with 1000 levels"):
            backbone.schedule(steps)
    assert len(backbone.schedule(500)) == 500


# Which model it is


def test_a_model_keeps_its_identity_in_half_precision(backbone: StableDiffusion) -> None:
    identity = backbone.identity()
    assert json.loads(json.dumps(identity)) == identity
    for dtype in (torch.bfloat16, torch.float16):
        backbone.pipe.unet.to(dtype)
        assert same_model(identity, backbone.identity())


def test_another_model_has_another_identity(backbone: StableDiffusion) -> None:
    identity = backbone.identity()
    assert not same_model(identity, {**identity, "family": "sdxl"})
    assert not same_model(identity, {**identity, "probe": identity["probe"][:-1]})
    with torch.no_grad():
        backbone.pipe.unet.conv_out.weight.add_(0.01)
    assert not same_model(identity, backbone.identity())
