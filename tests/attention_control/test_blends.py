"""What is put back of the source after a step, against loops over single places written here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from attention_control import CrossMaps, PromptToPrompt, StreamRow, controlled
from attention_control.blends import KeepBackground, LocalBlend
from attention_control.masks import GivenMask, WordMask, resized
from attention_control.object_add import BoxPaste
from tests.attention_control.cross_reference import SOURCE, cross_paths, evaluate_written
from tests.attention_control.reference import STEPS, WORDS, evaluate, make_scene, official_rows

Size = tuple[int, int]

SIZES: list[tuple[Size, Size]] = [
    ((16, 16), (16, 16)),
    ((16, 16), (32, 32)),
    ((16, 24), (32, 48)),
    ((13, 17), (25, 33)),
    ((16, 16), (64, 64)),
]
"""Of maps, and of latents: the same, and finer by what a UNet's blocks are."""
EVERY_SIZE = pytest.mark.parametrize(("coarse", "fine"), SIZES, ids=str)


# --- the same, place by place -------------------------------------------------------------------------------------------


def _sampled(image: Tensor, size: Size) -> Tensor:
    """Linear between the centres of places, the outermost ones held beyond them; separable, one matrix per side."""

    def weights(many: int, few: int) -> Tensor:
        matrix = torch.zeros(many, few, dtype=torch.float64)
        for i in range(many):
            at = min(max((i + 0.5) * few / many - 0.5, 0), few - 1)
            low = min(int(at), few - 1)
            matrix[i, low] += 1 - (at - low)
            matrix[i, min(low + 1, few - 1)] += at - low
        return matrix

    return weights(size[0], image.shape[0]) @ image.double() @ weights(size[1], image.shape[1]).T


def _grown(image: Tensor) -> Tensor:
    """The largest of each place and its eight neighbours."""
    height, width = image.shape
    out = torch.empty_like(image)
    for y in range(height):
        for x in range(width):
            out[y, x] = image[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max()
    return out


def _pointed_at(attention: Tensor, tokens: Sequence[int], threshold: float, size: Size) -> Tensor:
    """Section 3.3's mask: maps of the words, grown, on the latent's places, by their maximum, thresholded."""
    grown = _sampled(_grown(sum((attention[t] for t in tokens), start=torch.zeros(attention.shape[1:]))), size)
    return grown / grown.max() >= threshold


def _peaks(seed: int, size: Size, tokens: int = 7) -> Tensor:
    """Maps (tokens, h, w) with one hill each, away from the others', over a little noise."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    centres = torch.rand(tokens, 2, generator=generator)
    hills = [torch.exp(-((y - a * size[0]) ** 2 + (x - b * size[1]) ** 2) / 8) for a, b in centres.tolist()]
    return (torch.stack(hills) + 0.05 * torch.rand(tokens, *size, generator=generator)) / tokens


def _maps(size: Size, source: Tensor | None = None, targets: Sequence[Tensor] = ()) -> CrossMaps:
    """As if one head of one site had seen these."""
    maps = CrossMaps(size)
    if source is not None:
        maps.add("source", 0, source.flatten(1).T[None])
    for index, target in enumerate(targets):
        maps.add("target", index, target.flatten(1).T[None])
    return maps


def _latents(size: Size, targets: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(1 + targets, 4, *size, generator=generator).to(dtype)
    return rows[:1], rows[1:]


def _put_back(inside: Sequence[Tensor], source: Tensor, targets: Tensor) -> Tensor:
    return torch.stack([torch.where(mask, z, source[0]) for mask, z in zip(inside, targets, strict=True)])


def test_maps_of_different_seeds_differ() -> None:
    """Else every comparison below would hold whichever map was taken."""
    assert not torch.allclose(_peaks(0, (16, 16)), _peaks(1, (16, 16)), atol=1e-2)


PRECISIONS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])


# --- Prompt-to-Prompt's local blend ---------------------------------------------------------------------------------------


@EVERY_SIZE
@pytest.mark.parametrize("threshold", [0.2, 0.3, 0.7])
def test_the_local_blend_keeps_what_either_prompts_words_point_at(coarse: Size, fine: Size, threshold: float) -> None:
    seen, own = _peaks(0, coarse), [_peaks(1, coarse), _peaks(2, coarse)]
    source, targets = _latents(fine)
    out = LocalBlend((3, 4), ((2,), (5, 6)), threshold, 0)(0, source, targets, _maps(coarse, seen, own))
    theirs = _pointed_at(seen, [3, 4], threshold, fine)
    mine = [_pointed_at(own[0], [2], threshold, fine), _pointed_at(own[1], [5, 6], threshold, fine)]
    inside = [theirs | mask for mask in mine]
    assert all(mask.any() and not mask.all() and not torch.equal(mask, theirs) for mask in inside), "tells nothing"
    assert torch.equal(out, _put_back(inside, source, targets))


@pytest.mark.parametrize("words", ["source", "target"])
def test_the_local_blend_takes_words_of_one_prompt_alone(words: str) -> None:
    coarse, fine = (16, 16), (32, 32)
    seen, own = _peaks(0, coarse), [_peaks(1, coarse), _peaks(2, coarse)]
    source, targets = _latents(fine)
    tokens: tuple[Any, Any] = ((3,), ((), ())) if words == "source" else ((), ((2,), (2,)))
    out = LocalBlend(*tokens, 0.3, 0)(0, source, targets, _maps(coarse, seen, own))
    theirs = [_pointed_at(seen, [3], 0.3, fine)] * 2
    inside = theirs if words == "source" else [_pointed_at(maps, [2], 0.3, fine) for maps in own]
    assert torch.equal(out, _put_back(inside, source, targets))


@pytest.mark.parametrize(("step", "acts"), [(0, False), (4, False), (5, True), (49, True)])
def test_the_local_blend_starts_when_told(step: int, acts: bool) -> None:
    source, targets = _latents((16, 16))
    maps = _maps((16, 16), _peaks(0, (16, 16)), [_peaks(1, (16, 16))] * 2)
    out = LocalBlend((3,), ((2,), (2,)), 0.3, 5)(step, source, targets, maps)
    assert torch.equal(out, targets) is not acts


def test_the_local_blend_leaves_targets_alone_before_any_map_was_seen() -> None:
    source, targets = _latents((16, 16))
    assert torch.equal(LocalBlend((3,), ((2,), (2,)), 0.3, 0)(0, source, targets, CrossMaps((16, 16))), targets)


@PRECISIONS
@pytest.mark.parametrize(("threshold", "kept"), [(0.0, "target"), (0.3, "both"), (1.0, "both")])
def test_the_local_blend_is_bitwise_source_and_target(dtype: torch.dtype, threshold: float, kept: str) -> None:
    source, targets = _latents((32, 32), dtype=dtype)
    maps = _maps((16, 16), _peaks(0, (16, 16)), [_peaks(1, (16, 16)), _peaks(2, (16, 16))])
    out = LocalBlend((3,), ((2,), (2,)), threshold, 0)(0, source, targets, maps)
    assert out.dtype == dtype
    assert bool(((out == source) | (out == targets)).all())
    assert torch.equal(out, targets) is (kept == "target")
    assert (out == targets).all(1).any(2).any(1).all(), "at least its maximum is each target's own"


def test_the_local_blend_puts_all_of_the_source_back_where_words_point_at_nothing() -> None:
    source, targets = _latents((16, 16), dtype=torch.float16)
    maps = _maps((16, 16), torch.zeros(7, 16, 16), [torch.zeros(7, 16, 16)] * 2)
    assert torch.equal(LocalBlend((3,), ((2,), (2,)), 0.3, 0)(0, source, targets, maps), source.expand_as(targets))


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_the_local_blend_of_a_run_follows_the_maps_of_all_its_steps(unet: UNet2DConditionModel, size: Size) -> None:
    streams, words = official_rows(), WORDS[:2]
    scenes = [make_scene(size=size, seed=seed) for seed in (1, 2)]
    target = StreamRow("target", 0, "conditional")
    made = PromptToPrompt(
        cross_steps=0, self_steps=0, blend_source="red", blend_target="ball", blend_threshold=0.9, blend_start=1
    )
    seen: dict[StreamRow, list[Tensor]] = {SOURCE: [], target: []}
    for scene in scenes:
        maps = evaluate_written(unet, scene, streams).maps
        for row, kept in seen.items():
            kept += [maps[path][row].mean(0).T.unflatten(1, size) for path in cross_paths(1)]
    means = {row: torch.stack(kept).mean(0) for row, kept in seen.items()}
    source, targets = _latents(size, targets=1)
    with controlled(unet, made, num_steps=STEPS, latent_size=size, words=words) as session:
        for step, scene in enumerate(scenes):
            with session.step(step, streams):
                evaluate(unet, scene, streams)
            out = session.after(step, source, targets)
            assert torch.equal(out, targets) is (step == 0)
    inside = _pointed_at(means[SOURCE], [2], 0.9, size) | _pointed_at(means[target], [3], 0.9, size)
    assert inside.any()
    assert not inside.all(), "tells nothing"
    assert torch.equal(out, _put_back([inside], source, targets))


# --- keeping the background -----------------------------------------------------------------------------------------------


def _soft(size: Size, seed: int) -> Tensor:
    """A mask with a hard inside, a hard outside and edges between."""
    return (torch.rand(*size, generator=torch.Generator().manual_seed(seed)) * 2 - 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    ("of_source", "of_target"),
    [(_soft((12, 20), 0), _soft((12, 20), 1)), (_soft((12, 20), 0), None), (None, _soft((12, 20), 1))],
)
def test_the_background_is_the_sources_outside_of_both_masks(of_source: Tensor | None, of_target: Tensor | None) -> None:
    source, targets = _latents((12, 20), dtype=torch.float64)
    out = KeepBackground(GivenMask(of_source, of_target))(7, source, targets, CrossMaps((12, 20)))
    known = [mask.double() for mask in (of_source, of_target) if mask is not None]
    for index, (y, x) in enumerate((y, x) for y in range(12) for x in range(20)):
        touched = max(mask[y, x].item() for mask in known) >= 0.01
        expected = targets[:, :, y, x] if touched else source[:, :, y, x].expand_as(targets[:, :, y, x])
        assert torch.equal(out[:, :, y, x], expected), index


@PRECISIONS
def test_the_background_is_bitwise_source_outside_and_target_where_a_mask_touches(dtype: torch.dtype) -> None:
    source, targets = _latents((16, 16), dtype=dtype)
    mask = _soft((16, 16), 0)
    out = KeepBackground(GivenMask(mask, None))(0, source, targets, CrossMaps((16, 16)))
    assert out.dtype == dtype
    assert torch.equal(out[:, :, mask == 0], source.expand_as(targets)[:, :, mask == 0])
    edge = (mask > 0.1) & (mask < 0.9)
    assert edge.any()
    assert torch.equal(out[:, :, edge | (mask == 1)], targets[:, :, edge | (mask == 1)])


@PRECISIONS
@pytest.mark.parametrize("masks", [(1, None), (None, 1), (1, 0), (0, 1), (1, 1)])
def test_a_full_mask_leaves_the_target_bitwise(dtype: torch.dtype, masks: tuple[int | None, int | None]) -> None:
    source, targets = _latents((16, 24), dtype=dtype)
    given = [None if value is None else torch.full((8, 8), float(value)) for value in masks]
    assert torch.equal(KeepBackground(GivenMask(*given))(0, source, targets, CrossMaps((16, 24))), targets)


@PRECISIONS
@pytest.mark.parametrize("masks", [(0, None), (None, 0), (0, 0)])
def test_an_empty_mask_is_the_source_bitwise(dtype: torch.dtype, masks: tuple[int | None, int | None]) -> None:
    source, targets = _latents((16, 24), dtype=dtype)
    given = [None if value is None else torch.full((99, 99), float(value)) for value in masks]
    out = KeepBackground(GivenMask(*given))(0, source, targets, CrossMaps((16, 24)))
    assert torch.equal(out, source.expand_as(targets))


def test_without_any_mask_the_target_is_left_alone() -> None:
    source, targets = _latents((16, 16))
    for mask in (GivenMask(None, None), WordMask((1,), ((1,), (1,)), 0.5), WordMask((), ((), ()), 0.5)):
        assert torch.equal(KeepBackground(mask)(0, source, targets, CrossMaps((16, 16))), targets)


@EVERY_SIZE
def test_masks_by_words_are_scaled_to_one_and_cut_at_the_threshold(coarse: Size, fine: Size) -> None:
    seen, own = _peaks(0, coarse), [_peaks(1, coarse), _peaks(2, coarse)]
    source, targets = _latents(fine)
    blend = KeepBackground(WordMask((3, 4), ((2,), (5, 6)), 0.4))
    out = blend(0, source, targets, _maps(coarse, seen, own))

    def pointed(maps: Tensor, tokens: Sequence[int]) -> Tensor:
        attention = maps[list(tokens)].double().sum(0)
        return _sampled((attention - attention.min()) / (attention.max() - attention.min()), fine) >= 0.4

    inside = [pointed(seen, [3, 4]) | pointed(own[0], [2]), pointed(seen, [3, 4]) | pointed(own[1], [5, 6])]
    assert all(mask.any() and not mask.all() for mask in inside), "tells nothing"
    assert torch.equal(out, _put_back(inside, source, targets))
    assert blend.maps
    assert not KeepBackground(GivenMask(None, None)).maps


# --- masks at other sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (4, 16), (16, 2)])
def test_a_mask_is_averaged_where_it_shrinks(size: Size) -> None:
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    height, width = 16 // size[0], 16 // size[1]
    cells = [
        [mask[y * height : (y + 1) * height, x * width : (x + 1) * width].mean() for x in range(size[1])]
        for y in range(size[0])
    ]
    assert torch.allclose(resized(mask, size), torch.tensor(cells), atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (16, 24), (20, 16)])
def test_a_mask_is_linear_where_it_grows(size: Size) -> None:
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(resized(mask, size).double(), _sampled(mask, size), atol=1e-6)


def test_a_mask_that_shrinks_one_way_and_grows_the_other_loses_no_row() -> None:
    """One row in four is marked: each of eight rows out of 32 should be a quarter marked, however wide they become."""
    mask = torch.zeros(32, 4)
    mask[::4] = 1
    assert torch.allclose(resized(mask, (8, 8)), torch.full((8, 8), 0.25))


# --- ObjectAdd's paste ----------------------------------------------------------------------------------------------------

BOX = (0.25, 0.5, 0.75, 1.0)
"""[left, top, right, bottom]: on places' edges at every size here."""


def _in_box(size: Size) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    for y in range(size[0]):
        for x in range(size[1]):
            mask[y, x] = BOX[0] * size[1] <= x < BOX[2] * size[1] and BOX[1] * size[0] <= y < BOX[3] * size[0]
    return mask


@PRECISIONS
@pytest.mark.parametrize("size", [(16, 16), (24, 32), (64, 40)])
@pytest.mark.parametrize("step", [0, 4])
def test_the_paste_is_bitwise_the_target_in_the_box_and_the_source_elsewhere(dtype: torch.dtype, size: Size, step: int) -> None:
    source, targets = _latents(size, dtype=dtype)
    maps = _maps((16, 16), None, [_peaks(1, (16, 16)), _peaks(2, (16, 16))])
    out = BoxPaste(((3,), (3,)), BOX, 0.3, 5)(step, source, targets, maps)
    assert out.dtype == dtype
    assert torch.equal(out, _put_back([_in_box(size)] * 2, source, targets))


@pytest.mark.parametrize(("coarse", "fine"), [((16, 16), (16, 16)), ((16, 16), (32, 32)), ((16, 24), (32, 48))], ids=str)
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_the_paste_later_keeps_the_objects_own_shape_in_the_box(coarse: Size, fine: Size, threshold: float) -> None:
    own = [_peaks(1, coarse), _peaks(2, coarse)]
    source, targets = _latents(fine)
    out = BoxPaste(((3,), (2, 4)), BOX, threshold, 5)(5, source, targets, _maps(coarse, None, own))
    inside = []
    for maps, tokens in zip(own, ([3], [2, 4]), strict=True):
        seen = _sampled(maps[tokens].double().sum(0), fine)
        inside.append(_in_box(fine) & (seen >= threshold * seen[_in_box(fine)].max()))
        assert inside[-1].sum() < _in_box(fine).sum(), "tells nothing"
    assert torch.equal(out, _put_back(inside, source, targets))


@PRECISIONS
def test_the_paste_in_any_precision_is_source_or_target_and_nothing_between(dtype: torch.dtype) -> None:
    source, targets = _latents((32, 32), dtype=dtype)
    maps = _maps((16, 16), None, [_peaks(1, (16, 16)) / 50, _peaks(2, (16, 16)) / 50])
    out = BoxPaste(((3,), (3,)), BOX, 0.5, 0)(0, source, targets, maps)
    own = (out == targets).all(1)
    assert out.dtype == dtype
    assert bool((own | (out == source).all(1)).all())
    assert not bool((own & ~_in_box((32, 32))).any())
    assert own.any(2).any(1).all()
    assert not torch.equal(out, _put_back([_in_box((32, 32))] * 2, source, targets))


def test_the_paste_keeps_the_box_where_no_map_was_seen_or_the_word_is_nowhere() -> None:
    source, targets = _latents((16, 16))
    expected = _put_back([_in_box((16, 16))] * 2, source, targets)
    for maps in (CrossMaps((16, 16)), _maps((16, 16), None, [torch.zeros(7, 16, 16)] * 2)):
        assert torch.equal(BoxPaste(((3,), (3,)), BOX, 0.3, 0)(9, source, targets, maps), expected)
