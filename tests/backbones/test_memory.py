"""Everything that saves memory: offload leaves results bit for bit and its hooks in place, the rest says what it changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_control import CONTROLLERS, ControlError
from easyinv_edit.backbones import autoencoder
from easyinv_edit.backbones.sdxl import StableDiffusionXL
from easyinv_edit.errors import InputError
from easyinv_edit.images import to_tensor
from easyinv_edit.low_memory import save_memory
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory
from tests import models
from tests.adapters import MASACTRL, OTHER, SIDE, SOURCE, TARGET, load_ip_adapters, photo, with_controlnets, wrapped

T = 2
CPU = torch.device("cpu")
FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl"])
TARGETS = [TARGET, OTHER]


def inverted(pipe: EditPipeline, **options: Any) -> Trajectory:
    """The picture, inverted."""
    return pipe.invert(photo(), SOURCE, "ddim", num_inference_steps=T, **options)


def whole_edit(pipe: EditPipeline, **options: Any) -> tuple[Tensor, ...]:
    """Inverted latents, the targets' latents and their pixels."""
    source = inverted(pipe)
    latents = pipe.edit(source, TARGETS, **{"control": MASACTRL, "output_type": "latent", **options}).images
    with torch.no_grad():
        return source.latents, latents, pipe.backbone.decode(latents)


@cache
def plain_edit(family: str) -> tuple[Tensor, ...]:
    """`whole_edit` of a pipeline that is left as it comes."""
    return whole_edit(wrapped(models.FAMILIES[family]()))


# Offload


def by_model(pipe: Any) -> None:
    """Whole parts wait their turn."""
    pipe.enable_model_cpu_offload(device="cpu")


def by_leaves(pipe: Any) -> None:
    """Every layer waits its turn."""
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def by_blocks(pipe: Any) -> None:
    """Every block waits its turn."""
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


OFFLOADS: list[Callable[[Any], None]] = [by_model, by_leaves, by_blocks]
EVERY_OFFLOAD = pytest.mark.parametrize("offload", OFFLOADS)


def hooks(pipe: Any) -> dict[str, type[Any]]:
    """What offloads a module, by its name."""
    found: dict[str, type[Any]] = {}
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            for name, each in module.named_modules():
                if hasattr(each, "_hf_hook"):
                    found[f"{part}.{name}"] = type(each._hf_hook)
                elif hasattr(each, "_diffusers_hook") and each._diffusers_hook.get_hook("group_offloading") is not None:
                    found[f"{part}.{name}"] = type(each._diffusers_hook.get_hook("group_offloading"))
    return found


@FAMILIES
@EVERY_OFFLOAD
def test_an_offloaded_pipeline_edits_bit_for_bit_and_stays_offloaded(family: str, offload: Callable[[Any], None]) -> None:
    inner = models.FAMILIES[family]()
    offload(inner)
    before = hooks(inner)
    assert {name.split(".")[0] for name in before} >= {"vae", "text_encoder", "unet"}
    for ours, plain in zip(whole_edit(wrapped(inner)), plain_edit(family), strict=True):
        assert torch.equal(ours, plain)
    assert hooks(inner) == before


@EVERY_OFFLOAD
@pytest.mark.parametrize("guest", ["controlnet", "controlnets", "ip_adapter"])
def test_offloaded_guests_are_served(guest: str, offload: Callable[[Any], None]) -> None:
    pictures = {"controlnet": photo(5), "controlnets": [photo(5), photo(6)], "ip_adapter": photo(5)}

    def make() -> Any:
        if guest == "ip_adapter":
            return load_ip_adapters(models.sd(), "plain")
        return with_controlnets("sd", 1 + (guest == "controlnets"))

    conditions = {"ip_adapter_image" if guest == "ip_adapter" else "control_image": pictures[guest]}
    expected = whole_edit(wrapped(make()), **conditions)
    inner = make()
    offload(inner)
    assert all(torch.equal(a, b) for a, b in zip(whole_edit(wrapped(inner), **conditions), expected, strict=True))


def freed(pipe: EditPipeline) -> list[str]:
    """Grows by "freed" and by the name of every part that works."""
    inner, seen = pipe.backbone.pipe, list[str]()
    free = inner.maybe_free_model_hooks
    inner.maybe_free_model_hooks = lambda: (seen.append("freed"), free())[1]
    watched = {"text": inner.text_encoder, "encode": inner.vae.encoder, "unet": inner.unet, "decode": inner.vae.decoder}
    for name, part in watched.items():
        part.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    return seen


def offloaded() -> EditPipeline:
    """Stable Diffusion, offloaded by parts."""
    inner = models.sd()
    by_model(inner)
    return wrapped(inner)


@pytest.mark.parametrize("work", ["invert", "edit", "reconstruct"])
def test_parts_are_let_go_after_the_work_and_after_an_error(work: str) -> None:
    pipe = offloaded()
    source, seen = inverted(pipe), freed(pipe)
    todo: dict[str, Callable[[], Any]] = {
        "invert": lambda: inverted(pipe),
        "edit": lambda: pipe.edit(source, TARGET, control=MASACTRL, output_type="latent"),
        "reconstruct": lambda: pipe.reconstruct(source),
    }
    todo[work]()
    assert seen[-1] == "freed"
    seen.clear()
    before = dict(pipe.backbone.network.attn_processors)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = pipe.backbone.network.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        todo[work]()
    hook.remove()
    assert seen[-1] == "freed"
    assert all(pipe.backbone.network.attn_processors[name] is processor for name, processor in before.items())
    assert hooks(pipe.backbone.pipe)
    todo[work]()


@pytest.mark.parametrize("fails", ["encoder", "decoder", "nothing"])
def test_the_autoencoder_is_let_go_too(fails: str) -> None:
    pipe = offloaded()
    source, seen = inverted(pipe), freed(pipe)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    if fails == "nothing":
        pipe.edit(source, TARGET, control=MASACTRL)
        assert "decode" in seen
    else:
        getattr(pipe.backbone.pipe.vae, fails).register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            pipe(photo(), TARGET, SOURCE, inversion="ddim", num_inference_steps=T, control="none")
    assert seen[-1] == "freed"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_sequentially_offloaded_model_keeps_its_identity(family: str) -> None:
    """Its weights lie in its hooks' map. diffusers itself cannot run such a pipeline on a CPU, so no edit is tried."""
    plain, inner = models.FAMILIES[family](), models.FAMILIES[family]()
    inner.enable_sequential_cpu_offload(device="cpu")
    assert wrapped(inner).backbone.identity() == wrapped(plain).backbone.identity()


# The autoencoder


@pytest.fixture
def vae() -> Any:
    """An autoencoder whose tile is a picture of `SIDE` pixels."""
    torch.manual_seed(0)
    return models.autoencoder()


@torch.no_grad()
def test_slicing_is_exact(vae: Any) -> None:
    """Each picture is worked on alone: bit for bit what it gives alone, and a batch but for rounding."""
    pixels = torch.cat([to_tensor(photo(seed)) for seed in range(3)])
    batch = autoencoder.encode(vae, pixels)
    alone = torch.cat([autoencoder.encode(vae, each[None]) for each in pixels])
    decoded = torch.cat([autoencoder.decode(vae, each[None]) for each in alone])
    sizes: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _m, given: sizes.append(len(given[0])))
    vae.enable_slicing()
    assert torch.equal(autoencoder.encode(vae, pixels), alone)
    assert torch.equal(autoencoder.decode(vae, alone), decoded)
    assert sizes == [1, 1, 1]
    assert (batch - alone).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("side", [SIDE, 2 * SIDE])
def test_tiling_is_the_autoencoders_own_and_begins_above_one_tile(vae: Any, side: int) -> None:
    """No closeness is claimed above one tile: its normalisations see a tile instead of the picture."""
    pixels = to_tensor(photo(0, (side, side)))
    z = autoencoder.encode(vae, pixels)
    plain = autoencoder.decode(vae, z)
    vae.enable_tiling()
    factor = vae.config.scaling_factor
    assert torch.allclose(autoencoder.encode(vae, pixels), vae.encode(pixels).latent_dist.mode() * factor)
    tiled = autoencoder.decode(vae, z)
    assert torch.allclose(tiled, vae.decode(z / factor).sample)
    assert torch.equal(tiled, plain) is (side == SIDE)
    assert torch.equal(autoencoder.encode(vae, pixels), z) is (side == SIDE)


# Attention slicing


@FAMILIES
def test_attention_slices_are_fine_without_control(family: str) -> None:
    pipe = wrapped(models.FAMILIES[family]())
    source = inverted(pipe)
    plain = pipe.edit(source, TARGET, control="none", output_type="latent").images
    pipe.backbone.pipe.enable_attention_slicing()
    before = pipe.backbone.network.attn_processors
    assert all(type(processor).__name__ == "SlicedAttnProcessor" for processor in before.values())
    assert (inverted(pipe).latents - source.latents).abs().max() <= 1e-4
    assert (pipe.edit(source, TARGET, control="none", output_type="latent").images - plain).abs().max() <= 1e-4
    assert all(pipe.backbone.network.attn_processors[name] is processor for name, processor in before.items())


@pytest.mark.parametrize("name", [name for name in CONTROLLERS if name != "none"])
def test_attention_slices_are_refused_by_every_controller(name: str) -> None:
    pipe = wrapped(models.sd())
    source, inner = inverted(pipe), pipe.backbone.pipe
    options: dict[str, Any] = {"style": inverted(pipe)} if name == "portrait" else {}
    options |= {"control": {"name": name, **getattr(CONTROLLERS[name], "example", {})}, "output_type": "latent"}
    inner.enable_attention_slicing()
    before = inner.unet.attn_processors
    with pytest.raises(ControlError, match=r"call pipe.disable_attention_slicing\(\), .*enable_low_memory") as refusal:
        pipe.edit(source, "a blue ball", **options)
    assert len(str(refusal.value).splitlines()) == 1
    assert all(inner.unet.attn_processors[at] is processor for at, processor in before.items())
    inner.disable_attention_slicing()
    assert torch.isfinite(pipe.edit(source, "a blue ball", **options).images).all()


# The low-memory preset


PRESET = ["the autoencoder works in tiles", "one picture at a time", "prompts edited one at a time", "no source features kept"]


@FAMILIES
def test_the_preset_says_what_it_turned_on_and_leaves_edits_alone(family: str) -> None:
    pipe = wrapped(models.FAMILIES[family]())
    vae, before = pipe.backbone.pipe.vae, dict(pipe.backbone.network.attn_processors)
    assert pipe.enable_low_memory("cpu") == PRESET
    assert (vae.use_tiling, vae.use_slicing) == (True, True)
    assert all(pipe.backbone.network.attn_processors[name] is processor for name, processor in before.items())
    for frugal, plain in zip(whole_edit(pipe), plain_edit(family), strict=True):
        assert (frugal - plain).abs().max() <= 1e-4


def test_the_preset_names_only_what_the_autoencoder_can_do() -> None:
    inner = models.sd()
    inner.vae.__class__ = type("Plain", (type(inner.vae),), {"enable_tiling": property(lambda _self: _missing())})
    assert wrapped(inner).enable_low_memory("cpu") == PRESET[1:]


def _missing() -> None:
    raise AttributeError("enable_tiling")


@pytest.mark.parametrize(
    ("options", "calls", "evaluations"),
    [
        ({}, 2 * T, 2 * (2 * T + 2 * T)),
        ({"batch_size": 2}, T, 2 * T + 2 * 2 * T),
        ({"source_features": "exact"}, 2 * T + 1, 2 * T + 2 * 2 * T),
        ({"batch_size": 2, "source_features": "exact"}, T + 1, 2 * T + 2 * 2 * T),
    ],
)
def test_the_preset_edits_one_prompt_at_a_time_unless_told_otherwise(
    options: dict[str, Any], calls: int, evaluations: int
) -> None:
    """With a source prompt the source has two rows, which guided targets read. "exact" evaluates its levels in one call."""
    pipe = wrapped(models.sd())
    source = inverted(pipe)
    plain = pipe.edit(source, TARGETS, control=MASACTRL, output_type="latent")
    pipe.enable_low_memory("cpu")
    result = pipe.edit(source, TARGETS, control=MASACTRL, output_type="latent", **options)
    assert (result.cost["edit"].calls, result.cost["edit"].evaluations) == (calls, evaluations)
    assert result.recipe["batch_size"] == options.get("batch_size", 1)
    assert result.recipe["source_features"] == options.get("source_features", "live")
    assert (result.images - plain.images).abs().max() <= 1e-4


class Offload:
    """Stands in for `enable_model_cpu_offload`, whose accelerator is not here."""

    def __init__(self, error: Exception | None = None) -> None:
        self.devices: list[torch.device] = []
        self.error = error

    def __call__(self, device: torch.device) -> None:
        self.devices.append(device)
        if self.error is not None:
            raise self.error


def test_the_preset_offloads_to_the_accelerator() -> None:
    inner, offload = models.sd(), Offload()
    inner.enable_model_cpu_offload = offload
    assert wrapped(inner).enable_low_memory("cuda:1")[2] == "parts wait in host memory for their turn"
    assert offload.devices == [torch.device("cuda:1")]


def mapped(pipe: Any) -> None:
    """Placed by a device map."""
    pipe.hf_device_map = {"unet": "cuda:0"}


@pytest.mark.parametrize("already", [*OFFLOADS, mapped])
def test_the_preset_leaves_placed_and_offloaded_parts_where_they_are(already: Callable[[Any], None]) -> None:
    inner, offload = models.sd(), Offload()
    already(inner)
    before = hooks(inner)
    inner.enable_model_cpu_offload = offload
    assert save_memory(inner, torch.device("cuda")) == PRESET[:2]
    assert offload.devices == []
    assert hooks(inner) == before


@pytest.mark.parametrize("error", [ImportError, RuntimeError, ValueError])
def test_an_offload_that_cannot_be_is_one_line(error: type[Exception]) -> None:
    inner = models.sd()
    inner.enable_model_cpu_offload = Offload(error("needs something\nand a long story"))
    with pytest.raises(InputError) as refusal:
        wrapped(inner).enable_low_memory("cuda")
    assert str(refusal.value) == "low memory: needs something"


def test_a_pipeline_with_sequential_offload_is_left_alone_by_the_preset() -> None:
    inner, offload = models.sdxl(), Offload()
    inner.enable_sequential_cpu_offload(device="cpu")
    inner.enable_model_cpu_offload = offload
    assert StableDiffusionXL.serves(inner)
    save_memory(inner, torch.device("cuda"))
    assert offload.devices == []
