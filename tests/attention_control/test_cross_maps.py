"""Cross-attention maps of a run, against softmax written out; and that looking at them changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from attention_control import (
    ControlError,
    CrossMaps,
    CrossProcessor,
    ObjectAdd,
    Program,
    PromptToPrompt,
    Run,
    StreamRow,
    controlled,
    list_sites,
)
from attention_control.cross_maps import map_sites, probabilities
from attention_control.streams import layout
from tests.attention_control.cross_reference import EXACT, SOURCE, cross_paths, evaluate_written, grid
from tests.attention_control.reference import (
    STEPS,
    WORDS,
    distance,
    evaluate,
    make_scene,
    official_rows,
    same_bits,
    single_source_rows,
    unguided_rows,
)

Size = tuple[int, int]
SINGLE = 1e-6
"""Maps are kept in float32, and are at most 1."""


@dataclass(frozen=True)
class _Looking:
    """A blend that looks at the maps and leaves the targets alone."""

    maps: bool = True

    def __call__(self, step: int, source: Tensor, targets: Tensor, maps: CrossMaps) -> Tensor:
        return targets


@dataclass(frozen=True)
class _Watching:
    """A controller that wants maps and nothing else."""

    def program(self, run: Run) -> Program:
        return Program(blends=(_Looking(),))


# --- the maps -------------------------------------------------------------------------------------------------------------


def test_a_map_is_the_mean_over_heads_sites_and_steps_laid_out_as_the_grid() -> None:
    maps = CrossMaps((2, 3))
    seen = torch.rand(4, 5, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for site in seen:
        maps.add("target", 1, site)
    found = maps.of("target", 1)
    assert found is not None
    assert (found.shape, found.dtype) == ((7, 2, 3), torch.float32)
    for token in range(7):
        for y in range(2):
            for x in range(3):
                assert abs(found[token, y, x] - seen[:, :, 3 * y + x, token].mean()) <= SINGLE


def test_what_earlier_calls_added_counts_as_much_as_what_this_one_did() -> None:
    maps = CrossMaps((2, 3))
    seen = torch.rand(6, 5, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for place, site in enumerate(seen):
        maps.add("target", 0, site)
        if place in (1, 4):
            before = maps.of("target", 0)
            maps.fold()
            after = maps.of("target", 0)
            assert before is not None
            assert after is not None
            assert torch.equal(before, after)
    found = maps.of("target", 0)
    assert found is not None
    assert (found.flatten(1) - seen.mean((0, 1)).T).abs().max() <= SINGLE


def test_streams_have_maps_of_their_own_and_none_before_they_were_seen() -> None:
    maps = CrossMaps((1, 1))
    maps.add("source", 0, torch.full((1, 1, 1), 0.25))
    maps.add("target", 0, torch.full((1, 1, 1), 0.5))
    assert maps.of("target", 1) is None
    assert [maps.of("source", 0), maps.of("target", 0)] == [torch.tensor([[[0.25]]]), torch.tensor([[[0.5]]])]
    assert CrossMaps((1, 1)).of("source", 0) is None, "another run starts empty"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_are_softmax_in_single_precision_or_better(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, n, 3, 8, generator=generator).to(dtype) for n in (6, 5))
    bias = torch.randn(6, 5, generator=generator)
    found = probabilities(query, key, bias)
    assert (found.shape, found.dtype) == ((2, 3, 6, 5), torch.promote_types(dtype, torch.float32))
    logits = query.double().transpose(1, 2) @ key.double().transpose(1, 2).transpose(2, 3) / 8**0.5
    assert (found - torch.softmax(logits + bias.double(), -1)).abs().max() <= (1e-12 if dtype == torch.float64 else SINGLE)
    assert (probabilities(query, key) - torch.softmax(logits, -1)).abs().max() <= SINGLE


# --- where they are taken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latent", "downscale", "size"),
    [
        ((8, 8), 1, (8, 8)),
        ((14, 14), 1, (14, 14)),
        ((16, 16), 1, (16, 16)),
        ((16, 24), 1, (16, 24)),
        ((24, 32), 1, (24, 32)),
        ((32, 32), 2, (16, 16)),
        ((29, 31), 2, (15, 16)),
        ((40, 56), 2, (20, 28)),
        ((64, 64), 4, (16, 16)),
        ((64, 96), 4, (16, 24)),
        ((48, 80), 4, (12, 20)),
        ((96, 96), 4, (24, 24)),
        ((128, 128), 4, (32, 32)),
    ],
)
def test_maps_are_taken_from_the_coarsest_sites_of_enough_places(
    pristine_unet: UNet2DConditionModel, latent: Size, downscale: int, size: Size
) -> None:
    sites, found = map_sites(list_sites(pristine_unet, "cross"), latent)
    assert [site.path for site in sites] == cross_paths(downscale)
    assert found == size
    assert all(grid(site.path, latent) == size for site in sites)


def test_at_512_pixels_these_are_the_papers_five_sites_of_16_by_16() -> None:
    assert cross_paths(4)[:2] == [f"down_blocks.2.attentions.{i}.transformer_blocks.0.attn2" for i in range(2)]
    assert cross_paths(4)[2:] == [f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn2" for i in range(3)]


def test_without_sites_there_is_nothing_to_take() -> None:
    assert map_sites([], (16, 16)) == ([], (16, 16))


# --- recording ------------------------------------------------------------------------------------------------------------


def _recorded(unet: UNet2DConditionModel, controller: Any, streams: Any, scenes: Sequence[Any]) -> CrossMaps:
    """The maps of a run whose steps see one scene after the other."""
    words = WORDS[: len(scenes[0].latents)]
    with controlled(unet, controller, num_steps=STEPS, latent_size=scenes[0].size, words=words) as session:
        for step, scene in enumerate(scenes):
            with session.step(step, streams):
                evaluate(unet, scene, streams)
        return session.maps


@pytest.mark.parametrize(
    ("rows", "size", "downscale", "targets"),
    [
        (official_rows, (16, 24), 1, 3),
        (single_source_rows, (16, 16), 1, 1),
        (unguided_rows, (24, 16), 1, 1),
        (unguided_rows, (15, 50), 2, 1),
    ],
)
def test_recorded_maps_are_means_over_heads_sites_and_steps_of_conditional_rows(
    unet: UNet2DConditionModel, rows: Any, size: Size, downscale: int, targets: int
) -> None:
    streams, scenes = rows(targets), [make_scene(targets, size, seed=seed) for seed in (1, 2)]
    maps = _recorded(unet, _Watching(), streams, scenes)
    written = [evaluate_written(unet, scene, streams).maps for scene in scenes]
    paths = cross_paths(downscale)
    assert maps.size == grid(paths[0], size)
    for row in [SOURCE, *(StreamRow("target", i, "conditional") for i in range(targets))]:
        mean = torch.stack([seen[path][row].mean(0) for seen in written for path in paths]).mean(0)
        found = maps.of(row.role, row.index)
        assert found is not None
        assert found.shape == (7, *maps.size)
        assert (found.flatten(1).T - mean).abs().max() <= SINGLE
        other = torch.stack([written[0][path][row].mean(0) for path in paths]).mean(0)
        assert (other - mean).abs().max() > 100 * SINGLE, "tells nothing of the second step"
    assert maps.of("target", targets) is None


@pytest.mark.parametrize("rows", [official_rows, single_source_rows, unguided_rows])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_recording_alone_leaves_the_output_bitwise_as_it_was(unet: UNet2DConditionModel, size: Size, rows: Any) -> None:
    scene, streams = make_scene(size=size), rows()
    plain = evaluate(unet, scene, streams)
    with (
        controlled(unet, _Watching(), num_steps=STEPS, latent_size=size) as session,
        session.step(3, streams),
    ):
        assert same_bits(evaluate(unet, scene, streams), plain)
    assert session.maps.of("target", 0) is not None, "nothing was recorded"


def test_recording_in_half_precision_is_near_double(unet: UNet2DConditionModel) -> None:
    streams, scene = official_rows(), make_scene()
    exact = _recorded(unet, _Watching(), streams, [scene]).of("target", 0)
    half = _recorded(unet.half(), _Watching(), streams, [scene.to(torch.float16)]).of("target", 0)
    assert exact is not None
    assert half is not None
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 2e-3


def test_the_maps_kept_are_those_that_were_used(unet: UNet2DConditionModel) -> None:
    """In replace mode, what the target's one token looks at is what the source's two tokens look at together."""
    maps = _recorded(unet, PromptToPrompt(mode="replace", self_steps=0, blend_source="cube"), official_rows(), [make_scene()])
    source, target = maps.of("source", 0), maps.of("target", 0)
    assert source is not None
    assert target is not None
    assert (target[3] - source[3] - source[4]).abs().max() <= SINGLE
    assert (target[:3] - source[:3]).abs().max() <= SINGLE


def test_calls_without_targets_are_not_recorded(unet: UNet2DConditionModel) -> None:
    alone = layout([("source", 0, "conditional")])
    assert _recorded(unet, _Watching(), alone, [make_scene()]).of("source", 0) is None


def test_calls_outside_of_a_step_are_not_recorded_and_bitwise_plain(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    plain = evaluate(unet, scene, streams)
    with controlled(unet, _Watching(), num_steps=STEPS, latent_size=scene.size) as session:
        assert same_bits(evaluate(unet, scene, streams), plain)
        assert session.maps.of("source", 0) is None


def test_a_batch_of_another_size_than_declared_is_refused(unet: UNet2DConditionModel) -> None:
    with (
        controlled(unet, _Watching(), num_steps=STEPS, latent_size=(16, 16)) as session,
        session.step(0, unguided_rows()),
        pytest.raises(ControlError, match="called with 4 rows, but the step declared 2"),
    ):
        evaluate(unet, make_scene(), official_rows())


# --- the processor, on one layer ------------------------------------------------------------------------------------------


@dataclass
class _Same:
    """Watches some rows and gives back the maps of some as they are, scaled."""

    watched: Sequence[int]
    changed: Sequence[int]
    factor: float = 1.0
    seen: dict[int, Tensor] = field(default_factory=dict)

    def cross_plan(self, path: str, batch_rows: int) -> _Same:
        assert (path, batch_rows) == ("here", 3)
        return self

    def bias(self, row: int) -> Tensor | None:
        return None

    def settle(self, maps: dict[int, Tensor]) -> dict[int, Tensor]:
        self.seen = maps
        return {row: self.factor * maps[row] for row in self.changed}


STATES = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TEXT = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True, "out_bias": False},
        {"cross_attention_norm": "layer_norm"},
        {"residual_connection": True, "rescale_output_factor": 2.0},
    ],
    ids=str,
)
def test_rows_whose_maps_are_given_back_as_they_are_get_the_default_processors_answer(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = Attention(16, cross_attention_dim=12, heads=4, dim_head=4, **settings).double().eval()
    own, plain = layer.processor, layer(STATES, TEXT)
    for plan in (_Same([0, 2], [2]), _Same([2, 1, 0], [0, 1, 2]), _Same([1], [])):
        layer.set_processor(CrossProcessor("here", own, plan))
        out = layer(STATES, TEXT)
        assert (out - plain).abs().max() <= 1e-12
        untouched = [row for row in range(3) if row not in plan.changed]
        assert torch.equal(out[untouched], plain[untouched])
        assert set(plan.seen) == set(plan.watched)
        assert all((maps.sum(-1) - 1).abs().max() <= 1e-12 and maps.shape == (4, 5, 7) for maps in plan.seen.values())


def test_a_map_of_nothing_leaves_the_layers_bias_alone() -> None:
    torch.manual_seed(0)
    layer = Attention(16, cross_attention_dim=12, heads=4, dim_head=4).double().eval()
    plain = layer(STATES, TEXT)
    layer.set_processor(CrossProcessor("here", layer.processor, _Same([0, 1], [1], factor=0.0)))
    out = layer(STATES, TEXT)
    assert (out[1] - layer.to_out[0].bias).abs().max() <= 1e-12
    assert torch.equal(out[[0, 2]], plain[[0, 2]])


# --- nothing stays behind -------------------------------------------------------------------------------------------------


class _Interruption(RuntimeError):
    pass


@pytest.mark.parametrize("interruption", [None, _Interruption, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("controller", "touched"),
    [
        (PromptToPrompt(blend_source="cube"), 32),
        (PromptToPrompt(self_steps=0), 16),
        (ObjectAdd("ball", (0, 0, 0.5, 1)), 16),
        (_Watching(), 5),
    ],
    ids=["words and self-attention", "words", "box", "watching"],
)
def test_the_same_processor_objects_are_back_whatever_happens(
    unet: UNet2DConditionModel, controller: Any, touched: int, interruption: type[BaseException] | None
) -> None:
    scene, streams, before = make_scene(), official_rows(), dict(unet.attn_processors)
    plain = evaluate(unet, scene, streams)

    def run() -> None:
        with controlled(unet, controller, num_steps=STEPS, latent_size=scene.size, words=WORDS[:2]) as session:
            inside = unet.attn_processors
            assert sum(inside[name] is not processor for name, processor in before.items()) == touched
            with session.step(0, streams):
                evaluate(unet, scene, streams)
                if interruption:
                    raise interruption

    with pytest.raises(interruption) if interruption else nullcontext():
        run()
    after = unet.attn_processors
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert same_bits(evaluate(unet, scene, streams), plain)


def test_attaching_twice_is_refused_and_the_first_goes_on(unet: UNet2DConditionModel) -> None:
    scene, streams, before = make_scene(), official_rows(), dict(unet.attn_processors)
    alone = _recorded(unet, _Watching(), streams, [scene]).of("target", 0)
    assert alone is not None
    with controlled(unet, _Watching(), num_steps=STEPS, latent_size=scene.size) as session:
        with (
            pytest.raises(ControlError, match="already under attention control"),
            controlled(unet, PromptToPrompt(), num_steps=STEPS, latent_size=scene.size, words=WORDS[:2]),
        ):
            pass
        with session.step(0, streams):
            evaluate(unet, scene, streams)
        found = session.maps.of("target", 0)
    assert found is not None
    assert torch.equal(found, alone)
    assert all(unet.attn_processors[name] is before[name] for name in before)


def test_the_reference_sees_what_plain_attention_sees(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(size=(16, 24)), official_rows()
    answer = evaluate_written(unet, scene, streams)
    assert distance(answer.outputs, evaluate(unet, scene, streams)) <= EXACT
    assert sorted(answer.maps) == sorted(path for scale in (1, 2, 4, 8) for path in cross_paths(scale))
