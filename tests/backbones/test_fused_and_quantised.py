"""UNets whose layers are not the ordinary ones: fused projections are refused in words, quantised layers are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_control import CONTROLLERS, ControlError, list_sites
from easyinv_edit.backbones.sd import same_model
from easyinv_edit.inversion import INVERSIONS
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory
from tests import models
from tests.adapters import MASACTRL, OTHER, SOURCE, TARGET, photo, wrapped

T = 2
FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl"])


def inverted(pipe: EditPipeline, method: Any = "ddim") -> Trajectory:
    """The picture, inverted."""
    return pipe.invert(photo(), SOURCE, method, num_inference_steps=T, generator=torch.Generator().manual_seed(0))


# Fused projections


@FAMILIES
def test_fused_projections_are_refused_by_control_and_fine_without(family: str) -> None:
    pipe = wrapped(models.FAMILIES[family]())
    source, unet = inverted(pipe), pipe.backbone.network
    plain = pipe.edit(source, TARGET, control="none", output_type="latent").images
    controlled = pipe.edit(source, TARGET, control=MASACTRL, output_type="latent").images
    unet.fuse_qkv_projections()
    before = unet.attn_processors
    with pytest.raises(ControlError, match=r"projections are fused; call unfuse_qkv_projections\(\) before editing") as refusal:
        pipe.edit(source, TARGET, control=MASACTRL)
    assert len(str(refusal.value).splitlines()) == 1
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())
    assert (pipe.edit(source, TARGET, control="none", output_type="latent").images - plain).abs().max() <= 1e-4
    unet.unfuse_qkv_projections()
    assert torch.equal(pipe.edit(source, TARGET, control=MASACTRL, output_type="latent").images, controlled)


# Quantised layers


class Int8Linear(nn.Module):
    """A linear layer of 8-bit weights with a scale per output: no `weight`, and no floating-point parameter at all."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.codes = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """Computed in the dtype of what comes in."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype), bias)


def attention(name: str) -> bool:
    """What quantisers of UNets usually take: the projections of attention."""
    return (".attn" in name and name.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v")) or name.endswith("to_out.0")


def embedding(name: str) -> bool:
    """The time embedding, whose dtype diffusers used to read."""
    return name.startswith(("time_embedding", "add_embedding"))


def everything(_name: str) -> bool:
    """Every linear layer there is."""
    return True


def quantise(unet: nn.Module, chosen: Callable[[str], bool]) -> int:
    """Replace the chosen linear layers; returns how many."""
    found = [name for name, module in unet.named_modules() if type(module) is nn.Linear and chosen(name)]
    for name in found:
        parent, _, own = name.rpartition(".")
        setattr(unet.get_submodule(parent), own, Int8Linear(unet.get_submodule(name)))
    return len(found)


def contents(unet: nn.Module) -> dict[str, tuple[int, torch.dtype, Tensor]]:
    """Every tensor of the UNet: which object it is, its dtype and a copy."""
    found = dict(unet.named_parameters()) | dict(unet.named_buffers())
    return {name: (id(tensor), tensor.dtype, tensor.detach().clone()) for name, tensor in found.items()}


def opened(family: str, chosen: Callable[[str], bool]) -> EditPipeline:
    """A pipeline with a quantised UNet."""
    inner = models.FAMILIES[family]()
    assert quantise(inner.unet, chosen) > 1
    return wrapped(inner)


@FAMILIES
@pytest.mark.parametrize("chosen", [attention, embedding, everything])
def test_a_quantised_unet_is_left_alone(family: str, chosen: Callable[[str], bool]) -> None:
    inner = models.FAMILIES[family]()
    quantise(inner.unet, chosen)
    before, modules = contents(inner.unet), dict(inner.unet.named_modules())
    pipe = wrapped(inner)
    source = inverted(pipe)
    latents = pipe.edit(source, [TARGET, OTHER], control=MASACTRL, output_type="latent").images
    assert torch.isfinite(latents).all()
    assert latents.dtype == torch.float32
    after = contents(inner.unet)
    assert after.keys() == before.keys()
    for name, (identity, dtype, value) in before.items():
        assert after[name][:2] == (identity, dtype)
        assert torch.equal(after[name][2], value)
    assert all(module is modules[name] for name, module in inner.unet.named_modules())


@FAMILIES
def test_control_acts_through_quantised_projections(family: str) -> None:
    """Self-attention computed by ours from 8-bit projections: MasaCtrl makes a difference, and about the exact model's."""
    exact, pipe = wrapped(models.FAMILIES[family]()), opened(family, attention)
    source, ours = inverted(exact), inverted(pipe)
    assert (source.latents - ours.latents).abs().max() < 0.1
    controlled = pipe.edit(ours, TARGET, control=MASACTRL, output_type="latent").images
    plain = pipe.edit(ours, TARGET, control="none", output_type="latent").images
    expected = exact.edit(source, TARGET, control=MASACTRL, output_type="latent").images
    assert (controlled - plain).abs().max() > 1e-3
    assert (controlled - expected).norm() < 0.2 * expected.norm()


def test_a_quantised_model_keeps_its_identity() -> None:
    """The layers it is told by are convolutions and a norm, which quantisers leave."""
    exact, pipe = wrapped(models.sd()), opened("sd", everything)
    assert same_model(exact.backbone.identity(), pipe.backbone.identity())
    edited = pipe.edit(inverted(exact), TARGET, control=MASACTRL, output_type="latent").images
    assert torch.isfinite(edited).all()


@pytest.mark.parametrize("name", list(CONTROLLERS))
def test_every_controller_works_on_a_quantised_unet(name: str) -> None:
    pipe = opened("sd", everything)
    source = inverted(pipe)
    options: dict[str, Any] = {"style": inverted(pipe)} if name == "portrait" else {}
    control = {"name": name, **getattr(CONTROLLERS[name], "example", {})}
    latents = pipe.edit(source, "a blue ball", control=control, output_type="latent", **options).images
    assert torch.isfinite(latents).all()


@pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")
@pytest.mark.parametrize("name", list(INVERSIONS))
def test_every_inversion_method_works_on_a_quantised_unet(name: str) -> None:
    """Those that fit embeddings differentiate through the 8-bit layers and leave their parameters without gradient."""
    pipe = opened("sd", everything)
    unet = pipe.backbone.network
    wanted = {at: parameter.requires_grad for at, parameter in unet.named_parameters()}
    quick = {"iterations": 1} if name in ("null_text", "prompt_tuning") else {}
    steps = max(T, getattr(INVERSIONS[name], "fewest_steps", 1))
    generator = torch.Generator().manual_seed(0)
    source = pipe.invert(photo(), SOURCE, {"name": name, **quick}, num_inference_steps=steps, generator=generator)
    assert torch.isfinite(source.latents).all()
    assert torch.isfinite(pipe.edit(source, TARGET, control=MASACTRL, output_type="latent").images).all()
    assert {at: parameter.requires_grad for at, parameter in unet.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in unet.parameters())


@pytest.mark.parametrize("method", ["null_text", "prompt_tuning"])
def test_embeddings_are_really_fitted_through_quantised_layers(method: str) -> None:
    pipe = opened("sd", everything)
    source = inverted(pipe, {"name": method, "iterations": 3, "tolerance": 0.0})
    (fitted,) = [extra for extra in source.extras.values() if extra.shape[-1] == models.WIDTH]
    start = pipe.backbone.embed([None if method == "null_text" else SOURCE]).embeddings
    assert all((level - start).abs().max() > 1e-4 for level in fitted)


def test_every_site_is_found_in_a_quantised_unet() -> None:
    unet = opened("sdxl", everything).backbone.network
    assert (len(list_sites(unet, "self")), len(list_sites(unet, "cross"))) == (70, 70)


class Int8Conv(nn.Module):
    """A convolution of 8-bit weights, as quantisers of everything make them."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.scale = weight.abs().max() / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias, self.padding = layer.bias, layer.padding

    def forward(self, x: Tensor) -> Tensor:
        """Computed in the dtype of what comes in."""
        return nn.functional.conv2d(x, self.weight.to(x.dtype) * self.scale, self.bias, padding=self.padding)


@pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")
@pytest.mark.parametrize("method", ["ddim", "null_text", "prompt_tuning"])
def test_a_first_parameter_that_is_no_float_breaks_nothing(method: str) -> None:
    inner = models.sd()
    inner.unet.conv_in = Int8Conv(inner.unet.conv_in)
    assert next(inner.unet.parameters()).dtype == torch.int8
    pipe = wrapped(inner)
    source = inverted(pipe, {"name": method, "iterations": 1} if method != "ddim" else method)
    assert torch.isfinite(pipe.edit(source, TARGET, control=MASACTRL, output_type="latent").images).all()
