"""LoRAs loaded by diffusers itself: attention control works beside them, and what they do not change stays, up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_control import Route, RoutedProcessor
from easyinv_edit.backbones.sd import same_model
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory
from tests import models
from tests.adapters import MASACTRL, SOURCE, TARGET, lora, photo, wrapped
from tests.attention_control.reference import Routing

pytest.importorskip("peft")

T = 2
CLEAR = 1e-2
"""Far above rounding, which is below 1e-4 in float32 here."""
EXACT = 1e-9
"""Rounding in float64."""
IDENTITY = Routing([Route("own", "own", "own", "0-")])
"""Every self-attention site routed, each row to itself: what the default processors compute, computed by ours."""

FAMILIES = pytest.mark.parametrize("family", ["sd", "sdxl"])


def opened(family: str, dtype: torch.dtype = torch.float32) -> EditPipeline:
    """A fresh pipeline of the family."""
    return wrapped(models.FAMILIES[family]().to(dtype))


def inverted(pipe: EditPipeline, prompt: str = SOURCE) -> Trajectory:
    """The picture, inverted."""
    return pipe.invert(photo(), prompt, "ddim", num_inference_steps=T)


def edited(pipe: EditPipeline, trajectory: Trajectory, control: Any = MASACTRL, **options: Any) -> Tensor:
    """The target's latents."""
    return pipe.edit(trajectory, TARGET, control=control, output_type="latent", **options).images


def load(pipe: EditPipeline, name: str = "one", seed: int = 0) -> None:
    """Load a random LoRA of the UNet and the text encoder."""
    inner = pipe.backbone.pipe
    inner.load_lora_weights(lora(inner, seed), adapter_name=name)


@FAMILIES
def test_a_lora_changes_a_controlled_edit_and_at_scale_0_nothing(family: str) -> None:
    """Nothing but rounding: adding 0 is exact, but where a tensor lies in memory can change a processor's matrix product."""
    pipe = opened(family, torch.float64)
    source = inverted(pipe)
    before = edited(pipe, source)
    load(pipe)
    assert (edited(pipe, source) - before).abs().max() > CLEAR
    pipe.backbone.pipe.set_adapters("one", 0.0)
    assert (edited(pipe, source) - before).abs().max() <= EXACT
    assert (inverted(pipe).latents - source.latents).abs().max() <= EXACT


def test_every_projection_of_the_routed_sites_is_the_loras() -> None:
    """Only the self-attention sites that MasaCtrl routes have this LoRA; their queries, keys, values and outputs all count."""
    pipe = opened("sd", torch.float64)
    inner, source = pipe.backbone.pipe, inverted(pipe)
    before = edited(pipe, source)
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        only = {name: part for name, part in lora(inner).items() if f"attn1.{layer}.lora" in name and "unet.up_blocks" in name}
        inner.load_lora_weights(only, adapter_name="only")
        assert (edited(pipe, source) - before).abs().max() > 1e-4
        inner.delete_adapters("only")
    assert (edited(pipe, source) - before).abs().max() <= EXACT


@FAMILIES
def test_our_processors_compute_what_diffusers_own_do(family: str) -> None:
    pipe = opened(family, torch.float64)
    source = inverted(pipe)
    plain = edited(pipe, source, "none")
    load(pipe)
    own, routed = edited(pipe, source, "none"), edited(pipe, source, IDENTITY)
    assert (own - plain).abs().max() > CLEAR
    assert (routed - own).abs().max() <= EXACT


@FAMILIES
def test_a_fused_lora_edits_as_a_loaded_one_and_can_be_taken_out_again(family: str) -> None:
    pipe = opened(family, torch.float64)
    inner, source = pipe.backbone.pipe, inverted(pipe)
    before = edited(pipe, source)
    load(pipe)
    loaded = edited(pipe, source)
    inner.fuse_lora()
    fused = edited(pipe, source)
    assert (fused - loaded).abs().max() <= EXACT
    assert (fused - before).abs().max() > CLEAR
    inner.unfuse_lora()
    assert (edited(pipe, source) - loaded).abs().max() <= EXACT
    inner.unload_lora_weights()
    assert (edited(pipe, source) - before).abs().max() <= EXACT


@FAMILIES
def test_a_model_keeps_its_identity_with_a_lora(family: str) -> None:
    """So an inversion made before loading one is accepted after it, and the other way round."""
    pipe = opened(family)
    identity, before = pipe.backbone.identity(), inverted(pipe)
    load(pipe)
    assert same_model(identity, pipe.backbone.identity())
    during = inverted(pipe)
    assert (during.latents - before.latents).abs().max() > CLEAR
    assert torch.isfinite(edited(pipe, before)).all()
    pipe.backbone.pipe.fuse_lora()
    assert same_model(identity, pipe.backbone.identity())
    pipe.backbone.pipe.unfuse_lora()
    pipe.backbone.pipe.unload_lora_weights()
    assert torch.isfinite(edited(pipe, during)).all()


def test_two_loras_weigh_as_the_user_says() -> None:
    pipe = opened("sd")
    inner, source = pipe.backbone.pipe, inverted(pipe)
    load(pipe, "one", 0)
    one = edited(pipe, source)
    load(pipe, "two", 1)
    inner.set_adapters(["one", "two"], [1.0, 0.5])
    both = edited(pipe, source)
    assert (both - one).abs().max() > CLEAR
    inner.set_adapters(["one", "two"], [1.0, 0.0])
    assert torch.equal(edited(pipe, source), one)
    assert inner.get_active_adapters() == ["one", "two"]


def test_a_lora_of_the_text_encoder_alone_changes_what_prompts_say() -> None:
    pipe = opened("sd")
    inner = pipe.backbone.pipe
    before = pipe.backbone.embed([TARGET]).embeddings
    inner.load_lora_weights({name: part for name, part in lora(inner).items() if name.startswith("text_encoder.")})
    expected = inner.encode_prompt(TARGET, torch.device("cpu"), 1, False)[0]
    assert torch.equal(pipe.backbone.embed([TARGET]).embeddings, expected)
    assert not torch.equal(expected, before)


@pytest.mark.parametrize(("family", "fails"), [("sd", False), ("sd", True), ("sdxl", False)])
def test_our_processors_go_and_the_lora_stays(family: str, fails: bool) -> None:
    pipe = opened(family)
    inner, source = pipe.backbone.pipe, inverted(pipe)
    load(pipe)
    before = dict(inner.unet.attn_processors)
    weights = {name: part.clone() for name, part in inner.unet.state_dict().items()}
    during: list[bool] = []

    def watch(*_: Any) -> None:
        during.append(any(isinstance(p, RoutedProcessor) for p in inner.unet.attn_processors.values()))
        if fails:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            edited(pipe, source, callback_on_step_end=watch)
    else:
        edited(pipe, source, callback_on_step_end=watch)
    assert during == [True] * (1 if fails else T)
    after = inner.unet.attn_processors
    assert all(after[name] is processor for name, processor in before.items())
    assert inner.get_active_adapters() == ["one"]
    state = inner.unet.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], part) for name, part in weights.items())
