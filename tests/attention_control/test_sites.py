"""Sites: their order, their sizes, and how they are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from attention_control import ControlError, list_sites, select_sites
from attention_control.sites import ALLOWED, check_selector, resolve_step
from tests.attention_control.reference import SELF_PATHS, evaluate, make_scene, unguided_rows

SD = (64, 64)
"""The latent of a 512x512 picture, for which selectors by size are documented."""


def _indices(unet: UNet2DConditionModel, selector: str, latent_size: tuple[int, int] = SD) -> list[int]:
    return [site.index for site in select_sites(list_sites(unet), selector, latent_size)]


def _met_in_forward(unet: UNet2DConditionModel, suffix: str, size: tuple[int, int]) -> list[tuple[str, int]]:
    """(path, queries) of every attention layer of that name, in the order a forward pass really meets them."""
    met: list[tuple[str, int]] = []

    def record(path: str) -> Callable[[nn.Module, Sequence[Tensor]], None]:
        def hook(_: nn.Module, args: Sequence[Tensor]) -> None:
            met.append((path, args[0].shape[1]))

        return hook

    handles = [m.register_forward_pre_hook(record(path)) for path, m in unet.named_modules() if path.endswith(suffix)]
    evaluate(unet, make_scene(size=size), unguided_rows())
    for handle in handles:
        handle.remove()
    return met


def test_self_sites_are_numbered_as_masactrl_numbers_them(unet: UNet2DConditionModel) -> None:
    sites = list_sites(unet)
    assert [site.path for site in sites] == list(SELF_PATHS)
    assert [site.index for site in sites] == list(range(16))


def test_mid_block_is_the_seventh_site_although_diffusers_lists_it_last(unet: UNet2DConditionModel) -> None:
    listed = [name for name in unet.attn_processors if name.endswith("attn1.processor")]
    assert listed[-1].startswith("mid_block"), "diffusers changed its order: the trap this test is about is gone"
    assert list_sites(unet)[6].path.startswith("mid_block")


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_sixteen_sites_of_each_kind_point_at_the_unets_own_layers(unet: UNet2DConditionModel, kind: str) -> None:
    sites = list_sites(unet, kind)
    assert len(sites) == 16
    assert all(site.kind == kind and site.module is unet.get_submodule(site.path) for site in sites)
    assert {site.module.is_cross_attention for site in sites} == {kind == "cross"}


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 16), (18, 10)])
@pytest.mark.parametrize(("kind", "suffix"), [("self", "attn1"), ("cross", "attn2")])
def test_order_and_tokens_are_what_a_forward_pass_meets(
    unet: UNet2DConditionModel, kind: str, suffix: str, size: tuple[int, int]
) -> None:
    assert [(site.path, site.tokens(size)) for site in list_sites(unet, kind)] == _met_in_forward(unet, suffix, size)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_tokens_shrink_by_four_a_block(unet: UNet2DConditionModel, size: tuple[int, int]) -> None:
    full = size[0] * size[1]
    expected = [full // 4**depth for depth in (0, 0, 1, 1, 2, 2, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0)]
    assert [site.tokens(size) for site in list_sites(unet)] == expected


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("0", [0]),
        ("10", [10]),
        ("10-15", range(10, 16)),
        ("6-6", [6]),
        ("10-", range(10, 16)),
        ("0-", range(16)),
        ("14-99", [14, 15]),
        ("mid_block", [6]),
        ("down_blocks", range(6)),
        ("up_blocks", range(7, 16)),
        ("up_blocks.2", [10, 11, 12]),
        ("up_blocks.2-3", range(10, 16)),
        ("up_blocks.2-", range(10, 16)),
        ("down_blocks.0-1", range(4)),
        ("tokens<=1024", [*range(2, 13)]),
        ("tokens<=64", [6]),
        ("0,15", [0, 15]),
        ("15,0", [0, 15]),
        ("10-12,11-13", range(10, 14)),
        ("mid_block,up_blocks.3,1", [1, 6, 13, 14, 15]),
        (" 10-11 ,\t mid_block , tokens<=64 ", [6, 10, 11]),
    ],
)
def test_selectors(unet: UNet2DConditionModel, selector: str, expected: Sequence[int]) -> None:
    assert _indices(unet, selector) == list(expected)


def test_size_selectors_follow_the_latent(unet: UNet2DConditionModel) -> None:
    assert _indices(unet, "tokens<=256", (16, 16)) == list(range(16))
    assert _indices(unet, "tokens<=256", (16, 24)) == list(range(2, 13))


@pytest.mark.parametrize("selector", ["99", "16-20", "up_blocks.0", "up_blocks.7", "down_blocks.3", "tokens<=0"])
def test_nothing_matches_is_an_empty_list(unet: UNet2DConditionModel, selector: str) -> None:
    assert _indices(unet, selector) == []


UNREADABLE = [
    "",
    " ",
    "ten",
    "15-10",
    "-3",
    "10--15",
    "10;11",
    "10,",
    "1.5",
    "up_blocks.",
    "up_blocks.3-2",
    "up_blocks.x",
    "mid_block.0",
    "encoder",
    "tokens<1024",
    "tokens<=",
    "tokens<=-1",
    "10,oops",
]


@pytest.mark.parametrize("selector", UNREADABLE)
def test_unreadable_selector_is_refused_with_what_is_allowed(unet: UNet2DConditionModel, selector: str) -> None:
    for read in (check_selector, lambda text: _indices(unet, text)):
        with pytest.raises(ControlError) as refusal:
            read(selector)
        assert ALLOWED in str(refusal.value)


def test_refusal_quotes_the_part_that_cannot_be_read() -> None:
    with pytest.raises(ControlError, match="'oops'"):
        check_selector("10, oops ,mid_block")


def test_readable_selector_is_returned_as_written() -> None:
    assert check_selector(" 10-12, mid_block") == " 10-12, mid_block"


@pytest.mark.parametrize(
    ("when", "steps", "expected"),
    [
        (4, 50, 4),
        (4, 20, 4),
        (0, 50, 0),
        (1, 50, 1),
        (0.08, 50, 4),
        (0.08, 20, 2),
        (0.08, 25, 2),
        (0.0, 50, 0),
        (1.0, 50, 50),
        (1.0, 1, 1),
        (0.5, 5, 3),
        (0.07, 100, 7),
        (0.29, 100, 29),
    ],
)
def test_steps_are_numbers_or_shares_rounded_up(when: float | int, steps: int, expected: int) -> None:
    assert resolve_step(when, steps) == expected


@pytest.mark.parametrize("when", [-0.01, 1.01, 4.0, float("nan"), float("inf")])
def test_share_out_of_range_is_refused(when: float) -> None:
    with pytest.raises(ControlError, match="share of all steps"):
        resolve_step(when, 50)
