"""Masks of MasaCtrl: m A(q, k of the foreground) + (1 - m) A(q, k of the background), written out, and masks by words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from attention_control import ControlError, MasaCtrl, StreamRow, Streams, controlled
from tests.attention_control.explicit import (
    CASES,
    CLEAR,
    EXACT,
    ROWS,
    Rule,
    Seen,
    at,
    attention,
    evaluate_by,
    probabilities,
)
from tests.attention_control.reference import (
    CONTROLLED_STEP,
    STEPS,
    WORDS,
    Outputs,
    Scene,
    distance,
    evaluate,
    evaluate_controlled,
    make_scene,
    official_rows,
    same_bits,
    single_source_rows,
    sources_of,
    targets_of,
    unguided_rows,
)
from tests.helpers import tiny_unet

SITES = range(10, 16)
SINGLE = 1e-6
"""Masks that are no dyadic fractions are rounded to single precision."""


# --- masks at a site's size, written out ----------------------------------------------------------------------------------


def _shrinking(length: int, to: int) -> Tensor:
    """(to, length): means over everything a place covers, even in part."""
    weights = torch.zeros(to, length, dtype=torch.float64)
    for i in range(to):
        first, last = i * length // to, -(-(i + 1) * length // to)
        weights[i, first:last] = 1 / (last - first)
    return weights


def _growing(length: int, to: int) -> Tensor:
    """(to, length): linear between the middles of the two nearest."""
    weights = torch.zeros(to, length, dtype=torch.float64)
    for i in range(to):
        place = min(max((i + 0.5) * length / to - 0.5, 0), length - 1)
        low = int(place)
        weights[i, low] += 1 - (place - low)
        weights[i, min(low + 1, length - 1)] += place - low
    return weights


def at_site(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Along each side averaged where it shrinks, linear where it grows; flat."""
    rows, columns = (_shrinking(n, to) if n >= to else _growing(n, to) for n, to in zip(mask.shape, size, strict=True))
    return (rows @ mask.double() @ columns.T).flatten()


def readable(weights: Tensor) -> Tensor:
    """A part in which nothing can be read is read whole."""
    return weights if bool((weights > 0.05).any()) else torch.ones_like(weights)


def by_parts(source_mask: Tensor | None, target_mask: Tensor | None, strength: float = 1.0) -> Rule:
    """Section 3.3 of the paper, soft. strength: own keys beside, with this weight against one minus it."""

    def read(seen: Seen, row: StreamRow, weights: Tensor) -> Tensor:
        source = seen.mate(row)
        if strength == 1:
            return attention(seen.query[row], seen.key[source], seen.value[source], weights)
        keys, values = (torch.cat([part[source], part[row]], 1) for part in (seen.key, seen.value))
        counted = torch.cat([strength * weights, torch.full_like(weights, 1 - strength)])
        return attention(seen.query[row], keys, values, counted)

    def rule(seen: Seen, row: StreamRow) -> Tensor:
        ones = torch.ones(seen.query[row].shape[1], dtype=torch.float64)
        of_source = None if source_mask is None else at_site(source_mask, seen.size)
        foreground = read(seen, row, ones if of_source is None else readable(of_source))
        if target_mask is None:
            return foreground
        background = seen.plain(row) if of_source is None else read(seen, row, readable(1 - of_source))
        inside = at_site(target_mask, seen.size)[None, :, None]
        return inside * foreground + (1 - inside) * background

    return rule


def soft_mask(size: tuple[int, int], seed: int) -> Tensor:
    """Sixteenths, exact in single precision: soft places on the left, hard ones on the right, a hard empty stripe above."""
    mask = torch.randint(0, 17, size, generator=torch.Generator().manual_seed(seed)).float() / 16
    mask[:, size[1] // 2 :] = mask[:, size[1] // 2 :].round()
    mask[: size[0] // 4] = 0
    return mask


GIVEN = pytest.mark.parametrize("given", ["both", "source", "target"])


def _masks(given: str, size: tuple[int, int]) -> dict[str, Any]:
    masks: dict[str, Any] = {"source_mask": soft_mask(size, 1), "target_mask": soft_mask(size, 2)}
    return masks if given == "both" else {f"{given}_mask": masks[f"{given}_mask"]}


def _rule(masks: dict[str, Any], strength: float = 1.0) -> Rule:
    return at(SITES, by_parts(masks.get("source_mask"), masks.get("target_mask"), strength))


# --- given masks --------------------------------------------------------------------------------------------------------


@CASES
@pytest.mark.parametrize(
    ("rows", "given"),
    [
        (official_rows, "both"),
        (single_source_rows, "both"),
        (unguided_rows, "both"),
        (official_rows, "source"),
        (single_source_rows, "target"),
        (unguided_rows, "target"),
    ],
)
def test_each_part_of_the_target_reads_its_part_of_the_source(
    unet: UNet2DConditionModel, rows: Callable[[int], Streams], given: str, targets: int, size: tuple[int, int]
) -> None:
    scene, streams, masks = make_scene(targets, size), rows(targets), _masks(given, (2 * size[0], 2 * size[1]))
    expected = evaluate_by(unet, scene, streams, _rule(masks))
    out = evaluate_controlled(unet, MasaCtrl(**masks), scene, streams)
    assert distance(out, expected) <= EXACT
    unmasked = evaluate_controlled(unet, MasaCtrl(), scene, streams)
    assert all(distance({row: output}, unmasked) > CLEAR for row, output in targets_of(out).items())


@pytest.mark.parametrize(("given", "strength"), [("both", 0.0), ("both", 0.25), ("source", 0.5), ("target", 0.9)])
def test_strength_joins_own_keys_to_the_masked_ones(unet: UNet2DConditionModel, given: str, strength: float) -> None:
    scene, streams, masks = make_scene(2, (16, 24)), single_source_rows(2), _masks(given, (32, 48))
    expected = evaluate_by(unet, scene, streams, _rule(masks, strength))
    out = evaluate_controlled(unet, MasaCtrl(strength=strength, **masks), scene, streams)
    assert distance(out, expected) <= EXACT
    assert distance(targets_of(out), evaluate_by(unet, scene, streams, _rule(masks))) > CLEAR


@pytest.mark.parametrize("mask_size", [(16, 24), (8, 12), (37, 61), (5, 7), (512, 512), (1, 1)], ids=str)
def test_masks_have_any_size(unet: UNet2DConditionModel, mask_size: tuple[int, int]) -> None:
    scene, streams = make_scene(size=(16, 24)), unguided_rows()
    masks: dict[str, Any] = {"source_mask": soft_mask(mask_size, 1), "target_mask": soft_mask(mask_size, 2)}
    expected = evaluate_by(unet, scene, streams, _rule(masks))
    assert distance(evaluate_controlled(unet, MasaCtrl(**masks), scene, streams), expected) <= SINGLE


@pytest.mark.parametrize("mask_size", [(4, 96), (128, 6)], ids=str)
def test_a_mask_that_shrinks_one_way_and_grows_the_other_is_averaged_where_it_shrinks(
    unet: UNet2DConditionModel, mask_size: tuple[int, int]
) -> None:
    scene, streams = make_scene(size=(16, 24)), unguided_rows()
    masks: dict[str, Any] = {"source_mask": soft_mask(mask_size, 1), "target_mask": soft_mask(mask_size, 2)}
    expected = evaluate_by(unet, scene, streams, _rule(masks))
    assert distance(evaluate_controlled(unet, MasaCtrl(**masks), scene, streams), expected) <= SINGLE


def test_both_masks_may_have_sizes_of_their_own(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    masks: dict[str, Any] = {"source_mask": soft_mask((64, 64), 1), "target_mask": soft_mask((8, 8), 2)}
    expected = evaluate_by(unet, scene, streams, _rule(masks))
    assert distance(evaluate_controlled(unet, MasaCtrl(**masks), scene, streams), expected) <= EXACT


@ROWS
def test_full_masks_are_no_masks(unet: UNet2DConditionModel, rows: Callable[[int], Streams]) -> None:
    scene, streams, full = make_scene(2, (16, 24)), rows(2), torch.ones(64, 96)
    unmasked = evaluate_controlled(unet, MasaCtrl(), scene, streams)
    choices: list[dict[str, Any]] = [{"source_mask": full, "target_mask": full}, {"source_mask": full}, {"target_mask": full}]
    for masks in choices:
        assert distance(evaluate_controlled(unet, MasaCtrl(**masks), scene, streams), unmasked) <= EXACT


def test_an_empty_target_mask_alone_is_plain(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    out = evaluate_controlled(unet, MasaCtrl(target_mask=torch.zeros(16, 16)), scene, streams)
    assert distance(out, evaluate(unet, scene, streams)) <= EXACT


EXTREMES = pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0), (0, 0), (0, 0.5), (1, 0.5), (0.03, 1)])


@EXTREMES
def test_a_part_with_nothing_to_read_reads_everything(unet: UNet2DConditionModel, source: float, target: float) -> None:
    scene, streams = make_scene(), unguided_rows()
    masks: dict[str, Any] = {
        "source_mask": torch.full((16, 16), float(source)),
        "target_mask": torch.full((16, 16), float(target)),
    }
    out = evaluate_controlled(unet, MasaCtrl(**masks), scene, streams)
    assert distance(out, evaluate_by(unet, scene, streams, _rule(masks))) <= EXACT
    assert distance(out, evaluate_controlled(unet, MasaCtrl(), scene, streams)) <= SINGLE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_empty_parts_are_finite_in_half_precision(dtype: torch.dtype) -> None:
    scene, unet = make_scene().to(dtype), tiny_unet(dtype=dtype)
    for source, target, strength in ((0, 1, 1.0), (1, 0, 1.0), (0, 0, 1.0), (1, 0.5, 1.0), (0, 1, 0.5), (1, 0, 0.5)):
        masks: dict[str, Any] = {
            "source_mask": torch.full((16, 16), float(source)),
            "target_mask": torch.full((16, 16), float(target)),
        }
        out = evaluate_controlled(unet, MasaCtrl(strength=strength, **masks), scene, official_rows())
        assert all(output.dtype == dtype and torch.isfinite(output).all() for output in out.values())


@pytest.mark.parametrize(("dtype", "near", "strength"), [(torch.float16, 5e-3, 0.5), (torch.bfloat16, 3e-2, 1.0)])
def test_half_precision_is_near_double(dtype: torch.dtype, near: float, strength: float) -> None:
    scene, streams, masks = make_scene(), official_rows(), _masks("both", (32, 32))
    exact = evaluate_controlled(tiny_unet(), MasaCtrl(strength=strength, **masks), scene, streams)
    out = evaluate_controlled(tiny_unet(dtype=dtype), MasaCtrl(strength=strength, **masks), scene.to(dtype), streams)
    assert distance(out, exact) < near


@pytest.mark.parametrize("step", [0, 3])
def test_before_the_window_masks_change_no_bit(unet: UNet2DConditionModel, step: int) -> None:
    scene, streams = make_scene(), official_rows()
    out = evaluate_controlled(unet, MasaCtrl(**_masks("both", (32, 32))), scene, streams, step)
    assert same_bits(out, evaluate(unet, scene, streams))


def test_the_source_is_left_alone(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(3), official_rows(3)
    out = evaluate_controlled(unet, MasaCtrl(**_masks("both", (32, 32))), scene, streams)
    assert distance(sources_of(out), evaluate(unet, scene, streams)) <= 1e-12


def test_a_second_use_of_the_same_controller_equals_the_first(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(3, (16, 24)), official_rows(3)
    controller = MasaCtrl(**_masks("both", (32, 48)))
    first = evaluate_controlled(unet, controller, scene, streams)
    assert same_bits(evaluate_controlled(unet, controller, scene, streams), first)


# --- masks by words -----------------------------------------------------------------------------------------------------


def evaluate_with_words(
    unet: UNet2DConditionModel, controller: MasaCtrl, scene: Scene, streams: Streams, steps: list[int]
) -> list[Outputs]:
    """Several steps of one run."""
    words, outputs = WORDS[: len(scene.latents)], []
    with controlled(unet, controller, num_steps=STEPS, latent_size=scene.size, words=words) as session:
        for step in steps:
            with session.step(step, streams):
                outputs.append(evaluate(unet, scene, streams))
    return outputs


@dataclass
class WordMasks:
    """Masks by words as section 3.3 has them: cross-attention maps of the conditional rows at the full-size sites (the coarsest
    of 200 places at these sizes), averaged over heads, sites and steps so far, summed over the words' tokens, scaled to
    [0, 1] and cut at a threshold."""

    tokens: dict[tuple[str, int], list[int]]
    threshold: float
    seen: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    margin: float = 1.0

    def record(self, site: Any, streams: Streams, size: tuple[int, int]) -> Any:
        """A hook for a cross-attention site."""

        def hook(attn: Any, args: Any, kwargs: Any) -> None:
            maps = probabilities(attn, args[0], kwargs["encoder_hidden_states"])
            for row, heads in zip(streams.rows, maps, strict=True):
                if row.half == "conditional":
                    self.seen.setdefault((row.role, row.index), []).append(heads.mean(0).T.reshape(-1, *size))

        return site.register_forward_pre_hook(hook, with_kwargs=True)

    def mask(self, role: str, index: int) -> Tensor | None:
        if not self.tokens.get((role, index)):
            return None
        attended = torch.stack(self.seen[role, index]).mean(0)[self.tokens[role, index]].sum(0)
        return (attended - attended.min()) / (attended.max() - attended.min())

    def rule(self, seen: Seen, row: StreamRow) -> Tensor:
        """As with given masks; the cut comes after the resize."""
        masks: list[Tensor | None] = []
        for scaled in (self.mask("source", 0), self.mask("target", row.index)):
            here = None if scaled is None else at_site(scaled, seen.size)
            if here is not None:
                self.margin = min(self.margin, (here - self.threshold).abs().min().item())
            masks.append(None if here is None else (here >= self.threshold).float().reshape(seen.size))
        return by_parts(masks[0], masks[1])(seen, row)


THRESHOLD = 0.4
FULL_SIZE = [
    f"{block}.transformer_blocks.0.attn2"
    for block in (
        "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.1",
        "up_blocks.3.attentions.0",
        "up_blocks.3.attentions.1",
        "up_blocks.3.attentions.2",
    )
]


@CASES
@pytest.mark.parametrize(("rows", "given"), [(official_rows, "both"), (unguided_rows, "source"), (official_rows, "target")])
def test_words_give_the_masks_their_cross_attention_points_at(
    unet: UNet2DConditionModel, rows: Callable[[int], Streams], given: str, targets: int, size: tuple[int, int]
) -> None:
    scene, streams, steps = make_scene(targets, size), rows(targets), [CONTROLLED_STEP, CONTROLLED_STEP + 1]
    settings: dict[str, Any] = {"mask_threshold": THRESHOLD}
    tokens: dict[tuple[str, int], list[int]] = {}
    if given != "target":
        settings["source_words"], tokens["source", 0] = "red cube", [2, 3, 4]
    if given != "source":
        settings["target_words"] = "a"
        tokens |= {("target", i): [1] for i in range(targets)}
    masks, expected = WordMasks(tokens, THRESHOLD), []
    handles = [masks.record(unet.get_submodule(path), streams, size) for path in FULL_SIZE]
    try:
        for _ in steps:
            expected.append(evaluate_by(unet, scene, streams, at(SITES, masks.rule)))
    finally:
        for handle in handles:
            handle.remove()
    assert masks.margin > SINGLE, "a value this near to the threshold may fall on either side in single precision"
    out = evaluate_with_words(unet, MasaCtrl(**settings), scene, streams, steps)
    unmasked = evaluate_controlled(unet, MasaCtrl(), scene, streams)
    assert all(distance(targets_of(e), unmasked) > CLEAR for e in expected)
    assert all(distance(a, b) <= EXACT for a, b in zip(out, expected, strict=True))


def test_words_change_no_bit_before_the_window_and_leave_the_source_alone(unet: UNet2DConditionModel) -> None:
    scene, streams = make_scene(), official_rows()
    plain = evaluate(unet, scene, streams)
    controller = MasaCtrl(source_words="red", target_words="red")
    before, inside = evaluate_with_words(unet, controller, scene, streams, [3, 4])
    assert same_bits(before, plain)
    assert distance(sources_of(inside), plain) <= 1e-12


def test_a_second_run_with_words_starts_from_no_maps(unet: UNet2DConditionModel) -> None:
    scene, streams, steps = make_scene(), official_rows(), [3, 4, 5]
    controller = MasaCtrl(source_words="red cube", target_words="red")
    first, second = (evaluate_with_words(unet, controller, scene, streams, steps) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


# --- the background kept ------------------------------------------------------------------------------------------------


def test_the_kept_background_is_the_sources_bit_by_bit(unet: UNet2DConditionModel) -> None:
    size = (16, 24)
    source, target = torch.zeros(size), torch.zeros(size)
    source[2:6, 3:9], target[4:12, 5:20] = 1, 1
    controller = MasaCtrl(source_mask=source, target_mask=target, keep_background=True)
    z = torch.randn(4, 4, *size, generator=torch.Generator().manual_seed(5))
    with controlled(unet, controller, num_steps=STEPS, latent_size=size) as session:
        out = session.after(0, z[:1], z[1:])
        assert session.reads_source(STEPS - 1)
    inside = ((source + target) > 0).expand_as(z[0])
    assert out.shape == z[1:].shape
    for mine, row in zip(z[1:], out, strict=True):
        assert torch.equal(row, torch.where(inside, mine, z[0]))


@GIVEN
def test_a_cell_that_a_mask_touches_is_none_of_the_background(unet: UNet2DConditionModel, given: str) -> None:
    masks = _masks(given, (32, 32))
    z = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    with controlled(unet, MasaCtrl(keep_background=True, **masks), num_steps=STEPS, latent_size=(16, 16)) as session:
        out = session.after(STEPS - 1, z[:1], z[1:])
    inside = torch.stack([at_site(mask, (16, 16)).reshape(16, 16) for mask in masks.values()]).amax(0)
    assert ((inside > 0.01) & (inside < 0.5)).any(), "tells nothing"
    assert torch.equal(out, torch.where(inside >= 0.01, z[1:], z[:1]))
    assert (out - z[1:]).abs().max() > CLEAR


def test_without_it_latents_are_left_alone(unet: UNet2DConditionModel) -> None:
    z = torch.randn(3, 4, 16, 16)
    with controlled(unet, MasaCtrl(**_masks("both", (16, 16))), num_steps=STEPS, latent_size=(16, 16)) as session:
        assert torch.equal(session.after(0, z[:1], z[1:]), z[1:])


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["source_mask", "target_mask"])
@pytest.mark.parametrize("words", ["source_words", "target_words"])
def test_masks_and_words_together_are_refused(mask: str, words: str) -> None:
    settings: dict[str, Any] = {mask: torch.ones(8, 8), words: "cube"}
    with pytest.raises(ValueError, match="masks or words, not both"):
        MasaCtrl(**settings)


def test_a_background_to_keep_needs_a_mask() -> None:
    with pytest.raises(ValueError, match="keep_background needs a mask"):
        MasaCtrl(keep_background=True)
    enough: list[dict[str, Any]] = [{"source_words": "a"}, {"target_words": "a"}, {"target_mask": torch.ones(8, 8)}]
    for settings in enough:
        assert MasaCtrl(keep_background=True, **settings).keep_background


@pytest.mark.parametrize("given", [True, 3, 0.5, {}])
@pytest.mark.parametrize("name", ["source_mask", "target_mask"])
def test_what_cannot_be_a_mask_is_refused(name: str, given: Any) -> None:
    with pytest.raises(ValueError, match="should be a mask"):
        MasaCtrl(**{name: given})


def _attach(unet: UNet2DConditionModel, controller: MasaCtrl, words: Any = WORDS[:2]) -> None:
    with controlled(unet, controller, num_steps=STEPS, latent_size=(16, 16), words=words):
        pytest.fail("attached all the same")


def test_words_that_are_not_in_the_prompt_are_refused_with_those_that_are(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ControlError, match="'ball' is not in its prompt; its words are 'a', 'red', 'cube'"):
        _attach(unet, MasaCtrl(source_words="ball"))
    with pytest.raises(ControlError, match="'cube' is not in its prompt; its words are 'a', 'red', 'ball'"):
        _attach(unet, MasaCtrl(target_words="cube"))


def test_words_of_a_source_without_a_prompt_are_refused(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ControlError, match="needs a source prompt"):
        _attach(unet, MasaCtrl(source_words="cube"), ())


@pytest.mark.parametrize("given", ["mask.png", [[0, 1]]])
def test_a_mask_that_is_no_tensor_needs_a_reader(unet: UNet2DConditionModel, given: Any) -> None:
    with pytest.raises(ControlError, match="must be a tensor"):
        _attach(unet, MasaCtrl(source_mask=given))


@pytest.mark.parametrize("shape", [(1, 16, 16), (16,), (0, 16)], ids=str)
def test_a_tensor_of_another_shape_is_refused_in_words(unet: UNet2DConditionModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ControlError, match="mask"):
        evaluate_controlled(unet, MasaCtrl(target_mask=torch.zeros(shape)), make_scene(), official_rows())
