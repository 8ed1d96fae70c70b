"""Attention sites of the published UNets, at true size: their tables written by hand, and what a forward pass meets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attention_control import list_sites, select_sites
from easyinv_edit.evaluation.shapes import DOWNSCALE, SHAPES, RandomModel, evaluation_flops, on_meta, parameters

Line = tuple[str, int, int, int]
"""(path of the transformer, tokens, channels, heads)"""


def lines(blocks: Sequence[tuple[str, int]], tokens: int, channels: int, heads: int) -> list[Line]:
    """Sites of one resolution; blocks: (path of the transformer, its layers)."""
    return [(f"{path}.transformer_blocks.{layer}", tokens, channels, heads) for path, depth in blocks for layer in range(depth)]


def attentions(block: str, count: int, depth: int = 1) -> list[tuple[str, int]]:
    return [(f"{block}.attentions.{i}", depth) for i in range(count)]


def stable_diffusion(tokens: int, heads: Sequence[int]) -> list[Line]:
    """Sixteen sites of Stable Diffusion 1.x and 2.x; tokens and heads of the four resolutions, finest first."""
    wide = [tokens, tokens // 4, tokens // 16, tokens // 64]
    return [
        *lines(attentions("down_blocks.0", 2), wide[0], 320, heads[0]),
        *lines(attentions("down_blocks.1", 2), wide[1], 640, heads[1]),
        *lines(attentions("down_blocks.2", 2), wide[2], 1280, heads[2]),
        *lines(attentions("mid_block", 1), wide[3], 1280, heads[3]),
        *lines(attentions("up_blocks.1", 3), wide[2], 1280, heads[2]),
        *lines(attentions("up_blocks.2", 3), wide[1], 640, heads[1]),
        *lines(attentions("up_blocks.3", 3), wide[0], 320, heads[0]),
    ]


TABLES: dict[str, list[Line]] = {
    "sd14": stable_diffusion(4096, (8, 8, 8, 8)),
    "sd21": stable_diffusion(9216, (5, 10, 20, 20)),
    "sdxl": [
        *lines(attentions("down_blocks.1", 2, 2), 4096, 640, 10),
        *lines(attentions("down_blocks.2", 2, 10), 1024, 1280, 20),
        *lines(attentions("mid_block", 1, 10), 1024, 1280, 20),
        *lines(attentions("up_blocks.0", 3, 10), 1024, 1280, 20),
        *lines(attentions("up_blocks.1", 3, 2), 4096, 640, 10),
    ],
}
"""Self-attention in forward order at each model's own size: 512, 768 and 1024 pixels."""


@cache
def published(name: str) -> Any:
    return on_meta(SHAPES[name])


def latent_size(name: str) -> tuple[int, int]:
    side = SHAPES[name].native_size // DOWNSCALE
    return side, side


def met_in_forward(name: str, suffix: str) -> list[tuple[str, int]]:
    """(path, queries) of the attention layers of that name in the order in which a forward pass calls them."""
    unet, met = published(name), list[tuple[str, int]]()

    def record(path: str) -> Callable[[nn.Module, Sequence[Tensor]], None]:
        return lambda _module, args: met.append((path, args[0].shape[1]))

    hooks = [m.register_forward_pre_hook(record(path)) for path, m in unet.named_modules() if path.endswith(suffix)]
    model = RandomModel(unet, SHAPES[name], SHAPES[name].native_size, torch.device("meta"))
    model.predict(model.latents(), 1, model.conditioning(1))
    for hook in hooks:
        hook.remove()
    return met


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("kind", "suffix"), [("self", "attn1"), ("cross", "attn2")])
def test_sites_are_the_published_table(name: str, kind: Any, suffix: str) -> None:
    sites = list_sites(published(name), kind)
    found = [(s.path, s.tokens(latent_size(name)), s.module.to_q.out_features, s.module.heads) for s in sites]
    assert found == [(f"{path}.{suffix}", *rest) for path, *rest in TABLES[name]]
    assert [site.index for site in sites] == list(range(len(TABLES[name])))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_the_order_and_tokens_are_those_of_a_forward_pass(name: str, kind: Any) -> None:
    sites = [(site.path, site.tokens(latent_size(name))) for site in list_sites(published(name), kind)]
    assert sites == met_in_forward(name, "attn1" if kind == "self" else "attn2")


@pytest.mark.parametrize(("name", "count"), [("sd14", 16), ("sd21", 16), ("sdxl", 70)])
def test_there_are_as_many_sites_of_each_kind(name: str, count: int) -> None:
    assert [len(list_sites(published(name), kind)) for kind in ("self", "cross")] == [count, count]


@pytest.mark.parametrize(("name", "width"), [("sd14", 768), ("sd21", 1024), ("sdxl", 2048)])
def test_keys_come_from_the_picture_or_from_the_text(name: str, width: int) -> None:
    assert {site.module.to_k.in_features for site in list_sites(published(name), "cross")} == {width}
    assert all(s.module.to_k.in_features == s.module.to_q.in_features for s in list_sites(published(name), "self"))


@pytest.mark.parametrize(("name", "width"), [("sd21", 64), ("sdxl", 64)])
def test_heads_of_the_later_models_are_of_one_width(name: str, width: int) -> None:
    assert {site.module.to_q.out_features // site.module.heads for site in list_sites(published(name))} == {width}


@pytest.mark.parametrize("name", SHAPES)
def test_diffusers_lists_the_mid_block_last_which_it_is_not(name: str) -> None:
    listed = [path.removesuffix(".processor") for path in published(name).attn_processors if ".attn1." in path]
    ours = [site.path for site in list_sites(published(name))]
    assert listed != ours
    assert sorted(listed) == sorted(ours)
    assert listed[-1].startswith("mid_block")
    assert ours[-1].startswith("up_blocks")


@pytest.mark.parametrize(
    ("name", "selector", "blocks"),
    [
        ("sd14", "10-15", {"up_blocks.2", "up_blocks.3"}),
        ("sd21", "10-15", {"up_blocks.2", "up_blocks.3"}),
        ("sd14", "tokens<=256", {"down_blocks.2", "mid_block", "up_blocks.1"}),
        ("sdxl", "64-69", {"up_blocks.1"}),
        ("sdxl", "24-33", {"mid_block"}),
        ("sdxl", "44-69", {"up_blocks.0", "up_blocks.1"}),
        ("sdxl", "tokens<=1024", {"down_blocks.2", "mid_block", "up_blocks.0"}),
    ],
)
def test_selectors_reach_the_blocks_they_are_known_for(name: str, selector: str, blocks: set[str]) -> None:
    chosen = select_sites(list_sites(published(name)), selector, latent_size(name))
    assert {site.path.split(".attentions")[0] for site in chosen} == blocks


def test_masactrl_starts_at_the_second_transformer_of_sdxl_decoder() -> None:
    first = select_sites(list_sites(published("sdxl")), SHAPES["sdxl"].sites, latent_size("sdxl"))[0]
    assert first.path == "up_blocks.0.attentions.1.transformer_blocks.0.attn1"
    assert len(select_sites(list_sites(published("sdxl")), SHAPES["sdxl"].sites, latent_size("sdxl"))) == 26


@pytest.mark.parametrize("size", [(128, 192), (192, 128), (96, 160)])
def test_pictures_need_not_be_square(size: tuple[int, int]) -> None:
    height, width = size
    wide = {0: (height // 2, width // 2), 4: (height // 4, width // 4), 69: (height // 2, width // 2)}
    sites = list_sites(published("sdxl"))
    assert {index: sites[index].grid(size) for index in wide} == wide


@pytest.mark.parametrize(("name", "count"), [("sd14", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684)])
def test_parameters(name: str, count: int) -> None:
    assert parameters(SHAPES[name]) == count


@pytest.mark.parametrize(("name", "tera"), [("sd14", 0.803), ("sd21", 2.149), ("sdxl", 6.761)])
def test_operations_of_an_evaluation(name: str, tera: float) -> None:
    assert round(evaluation_flops(SHAPES[name], SHAPES[name].native_size) / 1e12, 3) == tera


def test_attention_cores_are_the_share_of_operations_that_the_table_gives() -> None:
    """QK^T and PV are 4 tokens^2 channels: 15.2 % of Stable Diffusion 1.4's evaluation, 11.1 % of XL's."""
    for name, share in (("sd14", 0.152), ("sdxl", 0.111)):
        cores = sum(4 * tokens**2 * channels for _, tokens, channels, _ in TABLES[name])
        assert round(cores / evaluation_flops(SHAPES[name], SHAPES[name].native_size), 3) == share
