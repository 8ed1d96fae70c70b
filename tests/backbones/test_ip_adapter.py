"""IP-Adapters loaded by diffusers itself: they keep cross-attention, control keeps self-attention, and each row its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_control import CONTROLLERS, ControlError, RoutedProcessor
from easyinv_edit.errors import InputError
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory
from tests import models
from tests.adapters import MASACTRL, OTHER, SIDE, SOURCE, TARGET, load_ip_adapters, photo, with_ddim, wrapped

T = 2
GUIDANCE = 5.0
EXACT = 1e-9
"""Rounding in float64."""
LOOK, SECOND = photo(5), photo(6)
FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl"])
KINDS = pytest.mark.parametrize("kinds", [("plain",), ("plus",), ("plain", "plus")], ids="-".join)


def opened(family: str = "sd", *kinds: str) -> EditPipeline:
    """A fresh pipeline of the family with IP-Adapters of these kinds."""
    return wrapped(load_ip_adapters(models.FAMILIES[family](), *(kinds or ("plain",))))


def inverted(pipe: EditPipeline, **conditions: Any) -> Trajectory:
    """The picture, inverted."""
    return pipe.invert(photo(), SOURCE, "ddim", num_inference_steps=T, **conditions)


def edited(pipe: EditPipeline, trajectory: Trajectory, control: Any = "none", prompt: Any = TARGET, **options: Any) -> Tensor:
    """The targets' latents."""
    return pipe.edit(trajectory, prompt, control=control, guidance_scale=GUIDANCE, output_type="latent", **options).images


def source_branch(pipe: EditPipeline, trajectory: Trajectory, control: Any, **options: Any) -> Tensor:
    """The source's latents after each step where it is not pinned."""
    seen: list[Tensor] = []

    def watch(_pipe: Any, _step: int, _timestep: int, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"][:1].clone())

    edited(pipe, trajectory, control, pin_source=False, callback_on_step_end=watch, **options)
    return torch.cat(seen)


# As diffusers


@FAMILIES
@KINDS
def test_a_target_is_sampled_as_diffusers_own_pipeline_does(family: str, kinds: tuple[str, ...]) -> None:
    pipe = opened(family, *kinds)
    inner, source = pipe.backbone.pipe, inverted(pipe)
    pictures = [LOOK, SECOND][: len(kinds)]
    ours = edited(pipe, source, ip_adapter_image=pictures)
    theirs = with_ddim(inner)(
        TARGET,
        ip_adapter_image=pictures,
        latents=source.noise.clone(),
        num_inference_steps=T,
        guidance_scale=GUIDANCE,
        height=SIDE,
        width=SIDE,
        output_type="latent",
    ).images
    assert (ours - theirs).abs().max() <= 1e-4
    assert (ours - edited(pipe, source)).abs().max() > 1e-2


@FAMILIES
def test_no_picture_is_what_diffusers_takes_for_the_unconditional_half(family: str) -> None:
    pipe = opened(family, "plain", "plus")
    pairs = pipe.backbone.pipe.prepare_ip_adapter_image_embeds([LOOK, SECOND], None, torch.device("cpu"), 1, True)
    blank = pipe.backbone.embed([SOURCE, TARGET]).images
    assert len(blank) == 2
    for ours, theirs in zip(blank, pairs, strict=True):
        assert torch.allclose(ours, theirs[:1].expand_as(ours), atol=1e-6)


def test_the_users_scale_counts_and_at_0_the_adapter_is_as_good_as_gone() -> None:
    pipe = opened()
    inner, source = pipe.backbone.pipe, inverted(pipe)
    full = edited(pipe, source, MASACTRL, ip_adapter_image=LOOK)
    inner.set_ip_adapter_scale(0.5)
    assert (edited(pipe, source, MASACTRL, ip_adapter_image=LOOK) - full).abs().max() > 1e-3
    inner.set_ip_adapter_scale(0.0)
    silent = edited(pipe, source, MASACTRL, ip_adapter_image=LOOK)
    inner.unload_ip_adapter()
    assert (edited(pipe, source, MASACTRL) - silent).abs().max() <= 1e-4


# Beside control


@pytest.mark.parametrize(("family", "fails"), [("sd", False), ("sd", True), ("sdxl", False)])
def test_masactrl_leaves_the_adapters_processors_in_their_places(family: str, fails: bool) -> None:
    pipe = opened(family)
    unet, source = pipe.backbone.network, inverted(pipe)
    before = dict(unet.attn_processors)
    during: list[dict[str, Any]] = []

    def watch(*_: Any) -> None:
        during.append(dict(unet.attn_processors))
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            edited(pipe, source, MASACTRL, ip_adapter_image=LOOK, callback_on_step_end=watch)
    else:
        edited(pipe, source, MASACTRL, ip_adapter_image=LOOK, callback_on_step_end=watch)
    assert len(during) == (1 if fails else T)
    for seen in during:
        assert any(isinstance(processor, RoutedProcessor) for name, processor in seen.items() if ".attn1." in name)
        assert all(seen[name] is before[name] for name in before if ".attn2." in name)
    after = unet.attn_processors
    assert after.keys() == before.keys()
    assert all(after[name] is processor for name, processor in before.items())


@FAMILIES
def test_masactrl_and_the_picture_both_act(family: str) -> None:
    pipe = opened(family)
    source = inverted(pipe)
    both = edited(pipe, source, MASACTRL, ip_adapter_image=LOOK)
    assert (both - edited(pipe, source, ip_adapter_image=LOOK)).abs().max() > 1e-3
    assert (both - edited(pipe, source, MASACTRL)).abs().max() > 1e-2


CROSS = ("prompt_to_prompt", "object_add")
"""The controllers that change cross-attention."""


@pytest.mark.parametrize("name", list(CONTROLLERS))
def test_controllers_of_cross_attention_say_that_the_adapter_holds_it(name: str) -> None:
    pipe = opened()
    source, unet = inverted(pipe), pipe.backbone.network
    before = dict(unet.attn_processors)
    control = {"name": name, **getattr(CONTROLLERS[name], "example", {})}
    options: dict[str, Any] = {"style": inverted(pipe)} if name == "portrait" else {}
    options |= {"ip_adapter_image": LOOK, "prompt": "a blue ball"}
    if name in CROSS:
        with pytest.raises(
            ControlError, match="changes cross-attention, which an IP-Adapter holds; unload it, or use masactrl"
        ):
            edited(pipe, source, control, **options)
        assert all(unet.attn_processors[at] is processor for at, processor in before.items())
        pipe.backbone.pipe.unload_ip_adapter()
        options.pop("ip_adapter_image")
    assert torch.isfinite(edited(pipe, source, control, **options)).all()


def test_self_attention_is_followed_beside_an_adapter_where_no_maps_are() -> None:
    """Prompt-to-Prompt's self-attention alone touches no cross-attention."""
    pipe = opened()
    source = inverted(pipe)
    control = {"name": "prompt_to_prompt", "cross_steps": 0, "self_steps": 1.0}
    followed = edited(pipe, source, control, ip_adapter_image=LOOK)
    assert (followed - edited(pipe, source, ip_adapter_image=LOOK)).abs().max() > 1e-3


# Whose picture it is


@FAMILIES
@pytest.mark.parametrize("control", ["none", MASACTRL], ids=["none", "masactrl"])
def test_the_source_does_not_see_the_targets_picture(family: str, control: Any) -> None:
    """Bit for bit, and but for rounding in another batch its branch is what the inversion gives when it is sampled alone."""
    pipe = wrapped(load_ip_adapters(models.FAMILIES[family]().to(torch.float64), "plain"))
    source = inverted(pipe)
    without, seen = source_branch(pipe, source, control), source_branch(pipe, source, control, ip_adapter_image=LOOK)
    assert torch.equal(seen, without)
    assert (seen[-1:] - pipe.reconstruct(source)[0]).abs().max() <= EXACT


def test_every_target_sees_the_picture() -> None:
    pipe = opened()
    source = inverted(pipe)
    both = edited(pipe, source, prompt=[TARGET, OTHER], ip_adapter_image=LOOK)
    for row, prompt in enumerate((TARGET, OTHER)):
        assert (both[row : row + 1] - edited(pipe, source, prompt=prompt, ip_adapter_image=LOOK)).abs().max() <= 1e-4


@FAMILIES
def test_the_sources_own_picture_is_kept_and_used(family: str, tmp_path: Path) -> None:
    pipe = wrapped(load_ip_adapters(models.FAMILIES[family]().to(torch.float64), "plain", "plus"))
    plain, shown = inverted(pipe), inverted(pipe, ip_adapter_image=[SECOND, LOOK])
    assert (shown.latents - plain.latents).abs().max() > 1e-2
    shown.save(tmp_path / "source.safetensors")
    loaded = Trajectory.load(tmp_path / "source.safetensors")
    assert set(loaded.given) == {"image.0", "image.1"}
    assert all(torch.equal(loaded.given[name], part) for name, part in shown.given.items())
    reconstruction = pipe.reconstruct(loaded)[0]
    assert torch.equal(reconstruction, pipe.reconstruct(shown)[0])
    assert (reconstruction - pipe.reconstruct(plain)[0]).abs().max() > 1e-2
    for conditions in ({}, {"ip_adapter_image": [LOOK, SECOND]}):
        assert (source_branch(pipe, loaded, "none", **conditions)[-1:] - reconstruction).abs().max() <= EXACT
    assert torch.equal(edited(pipe, loaded, MASACTRL), edited(pipe, shown, MASACTRL))


def test_a_source_with_a_picture_keeps_its_twin() -> None:
    """Its conditional half differs from the unconditional one by the picture alone, the prompt being empty."""
    pipe = opened()
    plain, shown = (
        pipe.invert(photo(), "", "ddim", num_inference_steps=T, **conditions) for conditions in ({}, {"ip_adapter_image": LOOK})
    )
    costs = [pipe.edit(s, TARGET, control=MASACTRL, output_type="latent").cost["edit"] for s in (plain, shown)]
    assert [cost.evaluations for cost in costs] == [3 * T, 4 * T]


def test_several_images_of_a_batch_see_the_same_picture() -> None:
    pipe = opened()
    batch = pipe.invert_batch([photo(), photo(1)], [SOURCE, OTHER], "ddim", num_inference_steps=T, ip_adapter_image=LOOK)
    for number, prompt in enumerate((SOURCE, OTHER)):
        alone = pipe.invert(photo(number), prompt, "ddim", num_inference_steps=T, ip_adapter_image=LOOK)
        assert (batch[number].latents - alone.latents).abs().max() <= 1e-4
        assert torch.equal(batch[number].given["image.0"], alone.given["image.0"])


# What is refused


@pytest.mark.parametrize(
    ("kinds", "pictures", "says"),
    [
        (("plain",), [LOOK, SECOND], "ip_adapter_image: 2 pictures for 1 IP-Adapters; give a list with one for each"),
        (("plain", "plus"), LOOK, "ip_adapter_image: 1 pictures for 2 IP-Adapters; give a list with one for each"),
        (("plain",), [], "ip_adapter_image: 0 pictures for 1 IP-Adapters"),
    ],
)
def test_a_wrong_number_of_pictures_is_refused(kinds: tuple[str, ...], pictures: Any, says: str) -> None:
    pipe = opened("sd", *kinds)
    source = inverted(pipe)
    for work in (lambda: inverted(pipe, ip_adapter_image=pictures), lambda: edited(pipe, source, ip_adapter_image=pictures)):
        with pytest.raises(InputError, match=says) as refusal:
            work()
        assert len(str(refusal.value).splitlines()) == 1


def test_a_picture_without_an_adapter_is_refused() -> None:
    pipe = wrapped(models.sd())
    source = inverted(pipe)
    with pytest.raises(InputError, match="the pipeline has no IP-Adapter; call its load_ip_adapter"):
        edited(pipe, source, ip_adapter_image=LOOK)
    pipe = opened()
    pipe.backbone.pipe.unload_ip_adapter()
    with pytest.raises(InputError, match="the pipeline has no IP-Adapter; call its load_ip_adapter"):
        inverted(pipe, ip_adapter_image=LOOK)


def test_an_adapter_without_an_image_encoder_is_refused() -> None:
    pipe = opened()
    pipe.backbone.pipe.image_encoder = None
    with pytest.raises(InputError, match="came without an image encoder; load one with load_ip_adapter"):
        inverted(pipe)


def test_an_inversion_with_other_adapters_is_refused() -> None:
    pipe = opened()
    source = inverted(pipe, ip_adapter_image=LOOK)
    other = opened("sd", "plus")
    pipe.backbone.pipe.unload_ip_adapter()
    for now in (pipe, other):
        with pytest.raises(InputError, match="the inversion was made with other IP-Adapters than are loaded now"):
            edited(now, source, MASACTRL)


def test_an_adapter_may_be_loaded_after_the_inversion() -> None:
    pipe = wrapped(models.sd())
    source = inverted(pipe)
    load_ip_adapters(pipe.backbone.pipe, "plain")
    assert (edited(pipe, source, MASACTRL, ip_adapter_image=LOOK) - edited(pipe, source, MASACTRL)).abs().max() > 1e-2
