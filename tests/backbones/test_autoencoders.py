"""Autoencoders of every kind a pipeline may hold: the UNet's units, their own dtype, and theirs again whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from easyinv_edit.backbones import autoencoder
from easyinv_edit.images import to_tensor
from easyinv_edit.pipeline import EditPipeline
from tests import models
from tests.adapters import MASACTRL, SIDE, SOURCE, TARGET, photo, with_ddim, wrapped

T = 2
PIXELS = torch.cat([to_tensor(photo()), to_tensor(photo(1))])
MEAN, DEVIATION = [0.3, -1.0, 0.0, 2.0], [0.5, 2.0, 1.0, 4.0]


def tiny() -> AutoencoderTiny:
    """TAESD's kind: deterministic, in the UNet's units itself, factor 4."""
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    channels = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    return AutoencoderTiny(**channels, **blocks).eval()


def centred() -> AutoencoderKL:
    """With statistics of its latents, as SDXL's derivatives have."""
    return models.autoencoder(latents_mean=MEAN, latents_std=DEVIATION, scaling_factor=0.13)


KINDS: dict[str, Callable[[], Any]] = {"kl": models.autoencoder, "tiny": tiny, "centred": centred}


@pytest.fixture(params=KINDS)
def vae(request: pytest.FixtureRequest) -> Any:
    """An autoencoder of every kind."""
    torch.manual_seed(0)
    return KINDS[request.param]()


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    """As in every pipeline."""
    with torch.no_grad():
        yield


def own_latents(vae: Any, pixels: Tensor) -> Tensor:
    """The posterior's mode in the autoencoder's units."""
    encoded = vae.encode(pixels)
    return encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mode()


def pipeline(vae: Any) -> EditPipeline:
    """Stable Diffusion with this autoencoder."""
    return wrapped(models.sd(vae=vae))


# Units


def test_decoding_what_was_encoded_is_the_autoencoders_own_round_trip(vae: Any) -> None:
    ours = autoencoder.decode(vae, autoencoder.encode(vae, PIXELS))
    theirs = vae.decode(own_latents(vae, PIXELS)).sample
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours.shape, ours.dtype) == (PIXELS.shape, torch.float32)


def test_the_unets_units_are_scaled_and_centred() -> None:
    torch.manual_seed(0)
    vae = centred()
    z = autoencoder.encode(vae, PIXELS)
    mean, deviation = (torch.tensor(values).reshape(1, 4, 1, 1) for values in (MEAN, DEVIATION))
    assert torch.allclose(z, (own_latents(vae, PIXELS) - mean) / deviation * 0.13, atol=1e-6)
    assert torch.allclose(autoencoder.decode(vae, z), vae.decode(z / 0.13 * deviation + mean).sample, atol=1e-5)


def test_a_centred_autoencoder_decodes_as_the_sdxl_pipeline_does() -> None:
    pipe = with_ddim(models.sdxl())
    pipe.vae = centred()
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(TARGET, latents=z, num_inference_steps=1, guidance_scale=1.0, height=SIDE, width=SIDE, output_type="latent")
    seen: list[Tensor] = []
    pipe.vae.decoder.register_forward_hook(lambda _m, _given, out: seen.append(out.clone()))
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": SIDE, "width": SIDE, "output_type": "pt"}
    pipe(TARGET, latents=z, **options)
    autoencoder.decode(pipe.vae, theirs.images)
    assert torch.allclose(seen[0], seen[1], atol=1e-5)


def test_only_half_of_the_statistics_are_none() -> None:
    torch.manual_seed(0)
    vae = models.autoencoder(latents_mean=MEAN)
    z = autoencoder.encode(vae, PIXELS)
    assert torch.allclose(z, own_latents(vae, PIXELS) * vae.config.scaling_factor)


# Editing with them


def test_an_edit_works_and_shows_what_the_autoencoder_decodes(vae: Any) -> None:
    pipe = pipeline(vae)
    source = pipe.invert(photo(), SOURCE, "ddim", num_inference_steps=T)
    assert torch.allclose(source.clean, autoencoder.encode(vae, PIXELS[:1]))
    result = pipe.edit(source, TARGET, control=MASACTRL, output_type="np")
    latents = pipe.edit(source, TARGET, control=MASACTRL, output_type="latent").images
    theirs = pipe.backbone.pipe.image_processor.postprocess(autoencoder.decode(vae, latents), "np", [True])
    assert np.abs(result.images - theirs).max() <= 1e-4
    assert result.quality["psnr"] == pytest.approx(result.quality["vae_psnr"])


# Dtypes


def halves(vae: Any) -> dict[str, Tensor]:
    """The weights in half precision, which the module keeps."""
    nn.Module.to(vae, torch.float16)
    return {name: part.clone() for name, part in vae.state_dict().items()}


def seen_dtypes(vae: Any) -> list[torch.dtype]:
    """Grows by the dtype of whatever enters the encoder and the decoder."""
    seen: list[torch.dtype] = []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda _m, given: seen.append(given[0].dtype))
    return seen


@pytest.mark.parametrize("upcast", [True, False])
def test_float16_is_worked_in_float32_only_where_the_configuration_wants_it(upcast: bool) -> None:
    torch.manual_seed(0)
    vae = models.autoencoder(force_upcast=upcast)
    before, seen = halves(vae), seen_dtypes(vae)
    pixels = autoencoder.decode(vae, autoencoder.encode(vae, PIXELS))
    assert seen == [torch.float32 if upcast else torch.float16] * 2
    assert pixels.dtype == torch.float32
    state = vae.state_dict()
    assert all(state[name].dtype == torch.float16 and torch.equal(state[name], part) for name, part in before.items())


def test_the_small_autoencoder_stays_in_float16() -> None:
    torch.manual_seed(0)
    vae = tiny()
    halves(vae)
    seen = seen_dtypes(vae)
    autoencoder.decode(vae, autoencoder.encode(vae, PIXELS))
    assert seen == [torch.float16] * 2
    assert vae.dtype == torch.float16


def test_bfloat16_has_the_range_and_stays() -> None:
    torch.manual_seed(0)
    vae = models.autoencoder(force_upcast=True).to(torch.bfloat16)
    seen = seen_dtypes(vae)
    autoencoder.decode(vae, autoencoder.encode(vae, PIXELS))
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_dtype_is_back_when_the_work_fails(upcast: bool, part: str) -> None:
    torch.manual_seed(0)
    vae = models.autoencoder(force_upcast=upcast)
    before = halves(vae)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    getattr(vae, part).register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        autoencoder.decode(vae, autoencoder.encode(vae, PIXELS))
    assert all(torch.equal(now, before[name]) and now.dtype == torch.float16 for name, now in vae.state_dict().items())


def test_an_autoencoder_of_several_dtypes_is_left_alone() -> None:
    """Layerwise casting keeps weights in 8 bits and some layers in their own precision: nothing to cast them back to."""
    torch.manual_seed(0)
    vae = models.autoencoder(force_upcast=True)
    vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float16)
    before = {name: part.dtype for name, part in vae.state_dict().items()}
    assert len(set(before.values())) == 2
    pixels = autoencoder.decode(vae, autoencoder.encode(vae, PIXELS))
    assert pixels.isfinite().all()
    assert {name: part.dtype for name, part in vae.state_dict().items()} == before


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_half_precision_pipeline_edits_and_keeps_every_dtype(family: str) -> None:
    pipe = wrapped(models.FAMILIES[family]().to(torch.float16))
    inner = pipe.backbone.pipe
    before = {
        name: [p.dtype for p in part.parameters()] for name, part in inner.components.items() if isinstance(part, nn.Module)
    }
    result = pipe(photo(), TARGET, SOURCE, inversion="ddim", num_inference_steps=T, control=MASACTRL, output_type="pt")
    assert torch.isfinite(result.images).all()
    assert before == {name: [p.dtype for p in getattr(inner, name).parameters()] for name in before}
