"""ControlNets beside control: the targets sample as in diffusers' own pipelines, and no row sees what is another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from torch import Tensor

from easyinv_edit.errors import ImageError, InputError
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory
from tests import models
from tests.adapters import MASACTRL, OTHER, SIDE, SOURCE, TARGET, photo, with_controlnets, wrapped

T = 2
GUIDANCE = 5.0
EXACT = 1e-9
"""Rounding in float64."""
HINT, SECOND = photo(5), photo(6)
FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl"])


def inverted(pipe: EditPipeline, **conditions: Any) -> Trajectory:
    """The picture, inverted."""
    return pipe.invert(photo(), SOURCE, "ddim", num_inference_steps=T, **conditions)


def edited(pipe: EditPipeline, trajectory: Trajectory, prompt: Any = TARGET, control: Any = "none", **options: Any) -> Tensor:
    """The targets' latents."""
    return pipe.edit(trajectory, prompt, control=control, guidance_scale=GUIDANCE, output_type="latent", **options).images


def source_branch(pipe: EditPipeline, trajectory: Trajectory, control: Any = "none", **options: Any) -> Tensor:
    """The source's latents after each step where it is not pinned."""
    seen: list[Tensor] = []

    def watch(_pipe: Any, _step: int, _timestep: int, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"][:1].clone())

    edited(pipe, trajectory, control=control, pin_source=False, callback_on_step_end=watch, **options)
    return torch.cat(seen)


@contextmanager
def watched(net: ControlNetModel) -> Iterator[list[dict[str, Any]]]:
    """What each call of the net was given."""
    calls: list[dict[str, Any]] = []

    def note(_net: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({"sample": args[0], "timestep": args[1], **kwargs})

    hook = net.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


# As diffusers


@FAMILIES
@pytest.mark.parametrize(
    ("count", "pictures", "scale"),
    [(1, HINT, 1.0), (1, [HINT], 0.6), (2, (HINT, SECOND), [0.7, 0.4]), (2, [HINT, SECOND], [0.0, 0.8])],
)
def test_a_target_is_sampled_as_diffusers_own_pipeline_does(family: str, count: int, pictures: Any, scale: Any) -> None:
    inner = with_controlnets(family, count)
    pipe = wrapped(inner)
    source = inverted(pipe)
    ours = edited(pipe, source, control_image=pictures, controlnet_conditioning_scale=scale)
    given = pictures if isinstance(pictures, Image.Image) else list(pictures)
    theirs = inner(
        TARGET,
        image=given if count > 1 else HINT,
        latents=source.noise.clone(),
        num_inference_steps=T,
        guidance_scale=GUIDANCE,
        controlnet_conditioning_scale=scale,
        height=SIDE,
        width=SIDE,
        output_type="latent",
    ).images
    assert (ours - theirs).abs().max() <= 1e-4
    assert (ours - edited(pipe, source)).abs().max() > 1e-2


@FAMILIES
def test_every_target_is_told_its_own_prompt(family: str) -> None:
    """One batch of two targets: each is what diffusers samples for it alone."""
    inner = with_controlnets(family)
    pipe = wrapped(inner)
    source = inverted(pipe)
    ours = edited(pipe, source, [TARGET, OTHER], negative_prompt="a dark ring", control_image=HINT)
    options = {"num_inference_steps": T, "guidance_scale": GUIDANCE, "height": SIDE, "width": SIDE, "output_type": "latent"}
    for row, prompt in enumerate((TARGET, OTHER)):
        latents = source.noise.clone()
        theirs = inner(prompt, image=HINT, negative_prompt="a dark ring", latents=latents, **options).images
        assert (ours[row : row + 1] - theirs).abs().max() <= 1e-4


def test_a_picture_of_another_size_is_stretched_as_diffusers_does() -> None:
    inner = with_controlnets("sd")
    pipe, wide = wrapped(inner), photo(5, (90, 40))
    expected = inner.prepare_image(wide, 64, 32, 1, 1, torch.device("cpu"), torch.float32)
    with watched(inner.controlnet) as calls:
        source = pipe.invert(photo(), SOURCE, "ddim", num_inference_steps=1, size=(32, 64))
        edited(pipe, source, control_image=wide)
    assert torch.allclose(calls[0]["controlnet_cond"][:1], expected, atol=1e-6)


@pytest.mark.parametrize("make", [np.asarray, lambda picture: torch.from_numpy(np.array(picture)).permute(2, 0, 1)])
def test_a_control_image_is_whatever_an_image_may_be(make: Callable[[Image.Image], Any], tmp_path: Path) -> None:
    pipe = wrapped(with_controlnets("sd"))
    source = inverted(pipe)
    expected = edited(pipe, source, control_image=HINT)
    assert torch.equal(edited(pipe, source, control_image=make(HINT)), expected)
    HINT.save(tmp_path / "edges.png")
    assert torch.equal(edited(pipe, source, control_image=tmp_path / "edges.png"), expected)


@pytest.mark.parametrize("net", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unet", [torch.float32, torch.bfloat16])
def test_net_and_unet_keep_their_own_dtypes(net: torch.dtype, unet: torch.dtype) -> None:
    inner = with_controlnets("sd")
    inner.controlnet.to(net)
    inner.unet.to(unet)
    pipe = wrapped(inner)
    source = inverted(pipe)
    latents = edited(pipe, source, control_image=HINT)
    assert (latents - edited(pipe, source)).abs().max() > 1e-2
    assert torch.isfinite(latents).all()
    assert (latents.dtype, inner.controlnet.dtype, inner.unet.dtype) == (torch.float32, net, unet)


# Whose picture it is


@FAMILIES
@pytest.mark.parametrize("control", ["none", MASACTRL], ids=["none", "masactrl"])
def test_the_source_does_not_see_the_targets_picture(family: str, control: Any) -> None:
    """Bit for bit, and but for rounding in another batch its branch is what the inversion gives when it is sampled alone."""
    pipe = wrapped(with_controlnets(family).to(torch.float64))
    source = inverted(pipe)
    without, seen = source_branch(pipe, source, control), source_branch(pipe, source, control, control_image=HINT)
    assert torch.equal(seen, without)
    assert (seen[-1:] - pipe.reconstruct(source)[0]).abs().max() <= EXACT


@FAMILIES
def test_the_sources_own_picture_is_kept_and_used(family: str, tmp_path: Path) -> None:
    pipe = wrapped(with_controlnets(family).to(torch.float64))
    plain, shown = inverted(pipe), inverted(pipe, control_image=SECOND, controlnet_conditioning_scale=0.5)
    assert (shown.latents - plain.latents).abs().max() > 1e-2
    shown.save(tmp_path / "source.safetensors")
    loaded = Trajectory.load(tmp_path / "source.safetensors")
    assert set(loaded.given) == {"hints", "hint_scales"}
    assert all(torch.equal(loaded.given[name], part) for name, part in shown.given.items())
    reconstruction = pipe.reconstruct(loaded)[0]
    assert torch.equal(reconstruction, pipe.reconstruct(shown)[0])
    for conditions in ({}, {"control_image": HINT}):
        assert (source_branch(pipe, loaded, **conditions)[-1:] - reconstruction).abs().max() <= EXACT
    assert torch.equal(edited(pipe, loaded, control=MASACTRL), edited(pipe, shown, control=MASACTRL))


def test_each_row_is_shown_its_own_picture_at_its_own_scale() -> None:
    inner = with_controlnets("sd")
    pipe = wrapped(inner)
    source = inverted(pipe, control_image=SECOND)
    expected = {
        name: inner.prepare_image(p, SIDE, SIDE, 1, 1, "cpu", torch.float32)[0] for name, p in (("s", SECOND), ("t", HINT))
    }
    with watched(inner.controlnet) as calls:
        edited(pipe, source, control=MASACTRL, control_image=HINT)
    assert len(calls) == T
    for call in calls:
        rows = call["controlnet_cond"]
        own = [[name for name, hint in expected.items() if torch.allclose(row, hint, atol=1e-6)] for row in rows]
        assert sorted(own) == [["s"], ["s"], ["t"], ["t"]]  # an unconditional and a conditional row of each


def test_exact_source_features_are_those_with_the_sources_picture() -> None:
    pipe = wrapped(with_controlnets("sd"))
    source = inverted(pipe, control_image=SECOND)
    options = {"control": MASACTRL, "control_image": HINT}
    live = edited(pipe, source, **options)
    assert (edited(pipe, source, source_features="exact", **options) - live).abs().max() <= 1e-4
    assert (edited(pipe, inverted(pipe), **options) - live).abs().max() > 1e-2


# What it costs


@FAMILIES
def test_rows_without_a_picture_are_not_evaluated_by_the_net(family: str) -> None:
    inner = with_controlnets(family)
    pipe = wrapped(inner)
    source = inverted(pipe)
    with watched(inner.controlnet) as calls:
        inverted(pipe)
        edited(pipe, source, control=MASACTRL)
        edited(pipe, source, control=MASACTRL, control_image=HINT, controlnet_conditioning_scale=0.0)
        assert calls == []
        edited(pipe, source, [TARGET, OTHER], MASACTRL, control_image=HINT)
        assert [len(call["sample"]) for call in calls] == [4] * T
        calls.clear()
        inverted(pipe, control_image=HINT)
        assert [len(call["sample"]) for call in calls] == [1] * T


def test_a_net_of_scale_0_is_not_evaluated() -> None:
    inner = with_controlnets("sd", 2)
    pipe, (first, second) = wrapped(inner), inner.controlnet.nets
    source = inverted(pipe)
    with watched(first) as idle, watched(second) as busy:
        edited(pipe, source, control_image=[HINT, SECOND], controlnet_conditioning_scale=[0.0, 1.0])
    assert (len(idle), len(busy)) == (0, T)


def test_only_the_unet_is_counted_and_controlled() -> None:
    inner = with_controlnets("sd")
    pipe = wrapped(inner)
    source, before = inverted(pipe), inner.controlnet.attn_processors
    during: list[bool] = []

    def watch(*_: Any) -> None:
        own = inner.controlnet.attn_processors
        during.append(own.keys() == before.keys() and all(own[name] is processor for name, processor in before.items()))

    result = pipe.edit(source, TARGET, control=MASACTRL, control_image=HINT, callback_on_step_end=watch, output_type="latent")
    assert during == [True] * T
    assert result.cost["edit"].calls == T


@pytest.mark.parametrize("count", [1, 2])
def test_an_offloaded_net_is_fetched_before_it_is_called(count: int) -> None:
    """The hook of several lies on the whole of them, while each is called by itself."""
    inner = with_controlnets("sd", count)
    pipe = wrapped(inner)
    source = inverted(pipe)
    pictures = [HINT, SECOND][:count]
    plain = edited(pipe, source, control_image=pictures)
    inner.enable_model_cpu_offload(device="cpu")
    order: list[str] = []
    hook = inner.controlnet._hf_hook
    fetch = hook.pre_forward
    hook.pre_forward = lambda *args, **kwargs: (order.append("fetched"), fetch(*args, **kwargs))[1]
    nets = [inner.controlnet] if count == 1 else inner.controlnet.nets
    nets[-1].conv_in.register_forward_pre_hook(lambda *_: order.append("called"))
    assert torch.equal(edited(pipe, source, control_image=pictures), plain)
    assert order[0] == "fetched"
    assert order.count("called") == T


# What is refused


@pytest.mark.parametrize(
    ("count", "conditions", "says"),
    [
        (0, {"control_image": HINT}, "the pipeline has no ControlNet; load one of diffusers' ControlNet pipelines"),
        (1, {"control_image": [HINT, HINT]}, "control_image: 2 given for 1 ControlNets"),
        (1, {"control_image": []}, "control_image: 0 given for 1 ControlNets"),
        (2, {"control_image": HINT}, "control_image: 1 given for 2 ControlNets; give a list with one for each"),
        (
            2,
            {"control_image": [HINT, HINT], "controlnet_conditioning_scale": [1.0]},
            "controlnet_conditioning_scale: 1 given for 2 ControlNets",
        ),
        (1, {"controlnet_conditioning_scale": 0.5}, "there is no control_image; give one, or leave the scale out"),
        (1, {"control_image": HINT, "controlnet_conditioning_scale": "strong"}, "scale is 'strong'; give a number"),
        (1, {"control_image": HINT, "controlnet_conditioning_scale": float("nan")}, "scale is nan; give a number"),
    ],
)
def test_what_does_not_fit_is_refused(count: int, conditions: dict[str, Any], says: str) -> None:
    pipe = wrapped(models.sd() if count == 0 else with_controlnets("sd", count))
    source = inverted(pipe)
    for work in (lambda: inverted(pipe, **conditions), lambda: edited(pipe, source, **conditions)):
        with pytest.raises(InputError, match=says) as refusal:
            work()
        assert len(str(refusal.value).splitlines()) == 1


def test_what_is_no_picture_is_refused() -> None:
    pipe = wrapped(with_controlnets("sd"))
    with pytest.raises(ImageError, match="image of type int: is no picture"):
        inverted(pipe, control_image=5)


@pytest.mark.parametrize("work", ["invert", "edit"])
def test_an_unknown_argument_is_a_type_error_with_a_suggestion(work: str) -> None:
    pipe = wrapped(with_controlnets("sd"))
    source: Any = photo() if work == "invert" else inverted(pipe)
    with pytest.raises(TypeError, match=r"unknown argument 'control_imge' - did you mean 'control_image'\?"):
        getattr(pipe, work)(source, TARGET, control_imge=HINT)


def test_an_inversion_with_other_nets_is_refused() -> None:
    one, two, none = (wrapped(inner) for inner in (with_controlnets("sd"), with_controlnets("sd", 2), models.sd()))
    source = inverted(one, control_image=HINT)
    for conditions in ({}, {"control_image": [HINT, SECOND]}):
        with pytest.raises(InputError, match="load the same ones, or invert the image again"):
            edited(two, source, control=MASACTRL, **conditions)
    with pytest.raises(InputError, match="the pipeline has no ControlNet"):
        edited(none, source, control=MASACTRL)


def test_nets_that_work_otherwise_are_refused() -> None:
    inner = with_controlnets("sd")
    pipe = wrapped(inner)
    inner.controlnet.register_to_config(global_pool_conditions=True)
    with pytest.raises(InputError, match="global_pool_conditions"):
        inverted(pipe, control_image=HINT)
    inner.controlnet.register_to_config(global_pool_conditions=False)
    kind = type("ControlNetUnionModel", (ControlNetModel,), {})
    inner.controlnet.__class__ = kind
    with pytest.raises(InputError, match="ControlNetUnionModel is not served; use a plain ControlNetModel"):
        inverted(pipe, control_image=HINT)
