"""One recipe for UNets of several families: selectors "of N", strengths, every controller's default sites, copied features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from attention_control import (
    CONTROLLERS,
    ControlError,
    MasaCtrl,
    PlugAndPlay,
    Program,
    Run,
    Words,
    controlled,
    list_sites,
    select_sites,
)
from attention_control.features import FeatureCopy
from attention_control.sites import ALLOWED, STRENGTHS, check_selector
from attention_control.streams import layout
from easyinv_edit.choices import build
from easyinv_edit.errors import InputError
from tests.models import WIDTH, sd_unet, sdxl_unet

NATIVE = {16: (64, 64), 32: (64, 64), 70: (128, 128)}
"""The latents of 512 and of 1024 pixels, for which selectors by size are documented."""
SMALL = (8, 8)
ROWS = layout([("source", 0, "conditional"), ("source", 1, "conditional"), ("target", 0, "conditional")])
WORDS = [Words(("a", "ball"), ((1,), (2,)), 5)] * 2
ROUTING = [name for name in CONTROLLERS if name not in ("none", "object_add", "compose")]
ON_BOTH = pytest.mark.parametrize("count", [16, 70])


@cache
def unet(count: int) -> UNet2DConditionModel:
    """Of so many self-attention sites: Stable Diffusion's, XL's, and one with two layers in each of Stable Diffusion's."""
    torch.manual_seed(0)
    made = {16: sd_unet, 32: lambda: sd_unet(transformer_layers_per_block=2), 70: sdxl_unet}[count]()
    return made.requires_grad_(False)


def indices(count: int, selector: str, size: tuple[int, int] | None = None) -> list[int]:
    return [site.index for site in select_sites(list_sites(unet(count)), selector, size or NATIVE[count])]


def controller(name: str, **settings: Any) -> Any:
    return build(CONTROLLERS, {"name": name, **getattr(CONTROLLERS[name], "example", {}), **settings}, "controller")


def program(name: str, count: int) -> Program:
    return controller(name).program(Run(50, NATIVE[count], words=WORDS))


def evaluate(count: int, control: Any, *, step: int = 10, watched: str = "") -> Tensor:
    """What a module gives for three rows, source, style and target, under a controller at a step of 50; by default the UNet."""
    network, generator, seen = unet(count), torch.Generator().manual_seed(1), list[Any]()
    z, text = (
        torch.randn(3, 4, *SMALL, generator=generator),
        torch.randn(3, 5, WIDTH * (1 + (count == 70)), generator=generator),
    )
    added = {"text_embeds": torch.zeros(3, WIDTH), "time_ids": torch.zeros(3, 6)}
    with controlled(network, control, num_steps=50, latent_size=SMALL, words=WORDS) as session, session.step(step, ROWS):
        hook = network.get_submodule(watched).register_forward_hook(lambda _m, _args, out: seen.append(out))  # after ours
        network(z, 500, text, added_cond_kwargs=added, return_dict=False)
        hook.remove()
    return seen[0] if watched else seen[0][0]


# Selectors for UNets of N sites alone


@pytest.mark.parametrize(
    ("selector", "of_16", "of_70"),
    [
        ("10-15 of 16, 44-69 of 70", range(10, 16), range(44, 70)),
        ("10-15 of 16", range(10, 16), []),
        ("44-69 of 70", [], range(44, 70)),
        ("3 of 16, 5", [3, 5], [5]),
        ("10- of 70, 0-1", [0, 1], [0, 1, *range(10, 70)]),
        ("mid_block of 70", [], range(24, 34)),
        ("up_blocks.1-2 of 16, down_blocks.1 of 70", range(7, 13), range(4)),
        ("up_blocks.1 of 16,up_blocks.1 of 70", range(7, 10), range(64, 70)),
        ("tokens<=256 of 16", [4, 5, *range(6, 10)], []),
        ("tokens<=1024 of 70", [], range(4, 64)),
        ("0 of 17, 0 of 0, 0 of 160", [], []),
        (" 10-11  of\t16 ,  2 of 70", [10, 11], [2]),
        ("90-95 of 70, 3 of 16", [3], []),
    ],
)
def test_a_part_with_a_number_is_for_unets_of_that_number(selector: str, of_16: Sequence[int], of_70: Sequence[int]) -> None:
    assert indices(16, selector) == list(of_16)
    assert indices(70, selector) == list(of_70)


@pytest.mark.parametrize(
    "part", ["10", "10-15", "10-", "mid_block", "up_blocks", "up_blocks.1-2", "down_blocks.0-", "tokens<=1024"]
)
@ON_BOTH
def test_of_the_unets_own_number_changes_nothing_and_of_another_leaves_nothing(count: int, part: str) -> None:
    assert indices(count, f"{part} of {count}") == indices(count, part) != []
    assert indices(count, f"{part} of {count + 1}") == []


# Strengths


@pytest.mark.parametrize(("strength", "of_16", "of_70"), [("strong", 10, 44), ("medium", 12, 54), ("light", 13, 64)])
def test_a_strength_begins_where_it_says_and_ends_with_the_decoder(strength: str, of_16: int, of_70: int) -> None:
    assert indices(16, strength) == list(range(of_16, 16))
    assert indices(70, strength) == list(range(of_70, 70))
    assert indices(32, strength) == []


def test_a_lighter_strength_controls_less() -> None:
    for count in (16, 70):
        strong, medium, light = (set(indices(count, strength)) for strength in ("strong", "medium", "light"))
        assert light < medium < strong
    assert list(STRENGTHS) == ["strong", "medium", "light"]


@pytest.mark.parametrize(("strength", "group"), [("medium", "up_blocks.0.attentions.2"), ("light", "up_blocks.1.attentions.0")])
def test_the_strengths_of_xl_begin_with_a_whole_transformer(strength: str, group: str) -> None:
    first = select_sites(list_sites(unet(70)), strength, NATIVE[70])[0]
    assert first.path == f"{group}.transformer_blocks.0.attn1"


def test_a_strength_joins_with_other_parts() -> None:
    assert indices(16, "light, 0,mid_block") == [0, 6, 13, 14, 15]
    assert indices(70, "0-1 of 16, light ,3") == [3, *range(64, 70)]
    assert indices(16, "strong,light") == indices(16, "strong")


@pytest.mark.parametrize("strength", STRENGTHS)
@ON_BOTH
def test_masactrl_of_a_strength_is_masactrl_of_its_sites(count: int, strength: str) -> None:
    first = indices(count, strength)[0]
    assert torch.equal(evaluate(count, MasaCtrl(sites=strength)), evaluate(count, MasaCtrl(sites=f"{first}-")))
    assert not torch.equal(evaluate(count, MasaCtrl(sites=strength)), evaluate(count, MasaCtrl(sites=f"{first + 1}-")))


UNREADABLE = [
    "10 of",
    "of 16",
    "10 of x",
    "10 of -1",
    "10 of 1.5",
    "10of16",
    "10 of 16 of 70",
    "10 OF 16",
    "10 16",
    "strong of 16",
    "strong light",
    "STRONG",
    "stronger",
    "weak",
    "strong,",
    "15-10 of 16",
    "ten of 16",
    "10 of 16;3",
    "10, 44-69 off 70",
]


@pytest.mark.parametrize("selector", UNREADABLE)
def test_what_cannot_be_read_is_refused_with_what_is_allowed(selector: str) -> None:
    for read in (check_selector, lambda text: indices(16, text)):
        with pytest.raises(ControlError) as refusal:
            read(selector)
        message = str(refusal.value)
        assert message.endswith(f"; write {ALLOWED}")
        assert message.startswith("sites: cannot read ")
        quoted = message.removeprefix("sites: cannot read ").partition("; write")[0]
        assert quoted in [repr(part.strip()) for part in selector.split(",")]
        assert "\n" not in message


@pytest.mark.parametrize("name", ROUTING)
def test_a_controller_refuses_it_when_it_is_made(name: str) -> None:
    with pytest.raises(InputError, match="cannot read '10 of x'"):
        controller(name, sites="10 of x")


# Every controller's own choice


@pytest.mark.parametrize("name", ROUTING)
@ON_BOTH
def test_the_default_sites_of_a_controller_are_some_and_not_others(name: str, count: int) -> None:
    """StyleAligned shares attention everywhere, and XL's coarse grids are all of them."""
    routes = program(name, count).routes
    assert routes
    for route in routes:
        found = indices(count, route.sites)
        assert found
        assert (len(found) == count) == (name == "style_aligned" or (name == "structure" and count == 70))


@pytest.mark.parametrize(
    ("name", "of_16", "of_70"),
    [
        ("masactrl", range(10, 16), range(44, 70)),
        ("portrait", range(10, 16), range(44, 70)),
        ("structure", range(2, 13), range(70)),
        ("plug_and_play", range(8, 16), range(44, 70)),
        ("prompt_to_prompt", range(4, 10), range(4, 64)),
        ("style_aligned", range(16), range(70)),
    ],
)
def test_the_default_sites_at_the_models_own_size(name: str, of_16: Sequence[int], of_70: Sequence[int]) -> None:
    expected = {16: list(of_16), 70: list(of_70)}
    assert {count: indices(count, program(name, count).routes[0].sites) for count in (16, 70)} == expected


def test_these_are_all_controllers_with_sites() -> None:
    assert {name for name in CONTROLLERS if program(name, 16).routes} == {*ROUTING, "compose"}


@pytest.mark.parametrize("name", CONTROLLERS)
@ON_BOTH
def test_every_controller_acts_on_both_unets_as_it_comes(name: str, count: int) -> None:
    plain, controlled_rows = evaluate(count, controller("none")), evaluate(count, controller(name))
    assert controlled_rows.isfinite().all()
    assert torch.equal(controlled_rows[2], plain[2]) == (name == "none")


# Plug-and-Play's features


@pytest.mark.parametrize(("count", "path"), [(16, "up_blocks.1.resnets.1.conv2"), (70, "up_blocks.0.resnets.1.conv2")])
def test_plug_and_play_copies_one_convolution_of_each_unet(count: int, path: str) -> None:
    (copy,) = program("plug_and_play", count).features
    assert copy.module(count) == path
    assert isinstance(unet(count).get_submodule(path), nn.Conv2d)
    copied, own = (evaluate(count, control, watched=path) for control in (PlugAndPlay(stop_step=0), controller("none")))
    assert torch.equal(copied[2], own[0]), "the target has the source's"
    assert torch.equal(copied[:2], own[:2]), "the sources their own"
    assert not torch.equal(own[2], own[0])


@pytest.mark.parametrize(
    ("path", "of_16", "of_70"),
    [
        ("mid_block", "mid_block", "mid_block"),
        ("a.b of 16, c.d of 70", "a.b", "c.d"),
        ("c.d of 70,a.b of 16", "a.b", "c.d"),
        ("a of 16, rest", "a", "rest"),
        (" a \tof  16 ,c  of 70", "a", "c"),
    ],
)
def test_a_feature_has_a_path_for_each_unet(path: str, of_16: str, of_70: str) -> None:
    assert [FeatureCopy(path).module(count) for count in (16, 70)] == [of_16, of_70]


def test_a_feature_without_a_path_for_this_unet_is_refused() -> None:
    says = r"^feature 'a of 16, b of 70' names no module for a UNet of 32 self-attention sites; give its path$"
    with pytest.raises(ControlError, match=says):
        FeatureCopy("a of 16, b of 70").module(32)


@pytest.mark.parametrize("path", [" ", "a of 16,", "a of 16, ", "a of x", "a of 16 of 70", "of 70", "a b"])
def test_a_feature_that_cannot_be_read_is_refused(path: str) -> None:
    """An empty path would be the whole UNet."""
    with pytest.raises(ControlError, match="write a module's path, or 'path of N'"):
        FeatureCopy(path).module(70)


# A UNet of another number of sites


@pytest.mark.parametrize("name", ["masactrl", "portrait", "structure", "plug_and_play"])
def test_a_default_that_is_for_other_unets_is_refused_with_what_to_do(name: str) -> None:
    own = dict(unet(32).attn_processors)
    with pytest.raises(ControlError) as refusal:
        evaluate(32, controller(name))
    sites = program(name, 32).routes[0].sites
    assert str(refusal.value) == f"sites {sites!r} match none of the UNet's 32 self-attention sites; write {ALLOWED}"
    assert all(unet(32).attn_processors[path] is processor for path, processor in own.items())


@pytest.mark.parametrize("name", ["style_aligned", "prompt_to_prompt"])
def test_defaults_that_are_for_every_unet_act(name: str) -> None:
    assert not torch.equal(evaluate(32, controller(name))[2], evaluate(32, controller("none"))[2])


@pytest.mark.parametrize(("sites", "expected"), [("20-31", range(20, 32)), ("up_blocks.2-", range(20, 32)), ("5 of 32", [5])])
def test_sites_that_are_said_act(sites: str, expected: Sequence[int]) -> None:
    assert indices(32, sites) == list(expected)
    for name in ("masactrl", "portrait", "structure"):
        assert not torch.equal(evaluate(32, controller(name, sites=sites))[2], evaluate(32, controller("none"))[2])


def test_plug_and_play_also_needs_a_path() -> None:
    with pytest.raises(ControlError, match="names no module for a UNet of 32 self-attention sites; give its path"):
        evaluate(32, PlugAndPlay(sites="16-31"))
    path = "up_blocks.1.resnets.1.conv2"
    copied = evaluate(32, PlugAndPlay(sites="16-31", feature=path))
    assert torch.equal(copied, evaluate(32, PlugAndPlay(sites="16-31", feature=f"mid_block of 16, {path} of 32")))
    assert not torch.equal(copied, evaluate(32, PlugAndPlay(sites="16-31", feature="")))
