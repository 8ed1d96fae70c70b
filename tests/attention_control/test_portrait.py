"""Portrait Diffusion, content and style against the paper's equations and the authors' masked code, written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from attention_control import ControlError, Portrait, StreamRow, Streams, controlled
from attention_control.streams import Half, Role, layout
from tests.attention_control.explicit import CASES, CLEAR, EXACT, Rule, Seen, attention, evaluate_by
from tests.attention_control.reference import (
    STEPS,
    Outputs,
    Scene,
    distance,
    evaluate,
    evaluate_controlled,
    official_rows,
    same_bits,
    targets_of,
    unguided_rows,
)
from tests.helpers import tiny_unet

EARLY, LATE = (0, 34), (35, STEPS - 1)
SITES = range(10, 16)


@dataclass(frozen=True)
class Pictures(Scene):
    """Latents and text of content, style, targets ..."""

    def batch(self, streams: Streams) -> tuple[Tensor, Tensor]:
        index = [row.index + (2 if row.role == "target" else 0) for row in streams.rows]
        text = [self.text[i] if row.half == "conditional" else self.empty for i, row in zip(index, streams.rows, strict=True)]
        return self.latents[index], torch.stack(text)


def make_pictures(targets: int = 1, size: tuple[int, int] = (16, 16)) -> Pictures:
    draw: Any = {"generator": torch.Generator().manual_seed(3), "dtype": torch.float64}
    count = 2 + targets
    return Pictures(torch.randn(count, 4, *size, **draw), torch.randn(count, 7, 16, **draw), torch.randn(7, 16, **draw))


def _laid_out(source_halves: Sequence[Half], target_halves: Sequence[Half], targets: int) -> Streams:
    rows: list[tuple[Role, int, Half]] = [("source", i, half) for half in source_halves for i in (0, 1)]
    return layout([*rows, *(("target", i, half) for half in target_halves for i in range(targets))])


def guided(targets: int = 1) -> Streams:
    """Both halves of everything."""
    return _laid_out(("unconditional", "conditional"), ("unconditional", "conditional"), targets)


def guided_targets(targets: int = 1) -> Streams:
    """One row of each source."""
    return _laid_out(("conditional",), ("unconditional", "conditional"), targets)


def unguided(targets: int = 1) -> Streams:
    """Guidance off, as the authors have it."""
    return _laid_out(("conditional",), ("conditional",), targets)


ROWS = pytest.mark.parametrize("rows", [guided, guided_targets, unguided])
Attend = Callable[[Seen, StreamRow, StreamRow, StreamRow], Tensor]
"""(seen, whose query, the style's row, the row that is drawn) -> attention to the style's keys and values."""


def to_the_style(seen: Seen, asks: StreamRow, style: StreamRow, _drawn: StreamRow) -> Tensor:
    return attention(seen.query[asks], seen.key[style], seen.value[style])


def shrunk(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Means over whole blocks, flat."""
    down = mask.shape[0] // size[0], mask.shape[1] // size[1]
    return mask.double().reshape(size[0], down[0], size[1], down[1]).mean((1, 3)).flatten()


def to_the_style_by_parts(style_mask: Tensor | None, content_mask: Tensor | None) -> Attend:
    """The content's foreground reads the style's, its background the style's background. Without a content mask all is
    foreground; without a style mask the foreground reads everything, and outside a row sees itself."""

    def attend(seen: Seen, asks: StreamRow, style: StreamRow, drawn: StreamRow) -> Tensor:
        q, k, v = seen.query[asks], seen.key[style], seen.value[style]
        of_style = None if style_mask is None else shrunk(style_mask, seen.size)
        foreground = attention(q, k, v, of_style)
        if content_mask is None:
            return foreground
        background = seen.plain(drawn) if of_style is None else attention(q, k, v, 1 - of_style)
        inside = shrunk(content_mask, seen.size)[None, :, None]
        return inside * foreground + (1 - inside) * background

    return attend


def painted(late: bool, guidance: float = 1.5, draw_content: bool = True, attend: Attend = to_the_style) -> Rule:
    """Early with the content's query; late out_c + g (out_t - out_c). The content's own row gives out_c in both."""

    def rule(seen: Seen, row: StreamRow) -> Tensor:
        content, style = seen.mate(row), seen.mate(row, 1)
        if seen.site not in SITES or row == style or (row == content and not draw_content):
            return seen.plain(row)
        out_c = attend(seen, content, style, row)
        if not late or row == content:
            return out_c
        return out_c + guidance * (attend(seen, row, style, row) - out_c)

    return rule


def drawn_rows(outputs: Outputs) -> Outputs:
    """All but the style's."""
    return {row: out for row, out in outputs.items() if (row.role, row.index) != ("source", 1)}


@CASES
@ROWS
@pytest.mark.parametrize("step", [EARLY[1], LATE[0]], ids=["early", "late"])
def test_target_and_content_are_drawn_with_the_styles_keys_and_values(
    unet: UNet2DConditionModel, rows: Callable[[int], Streams], targets: int, size: tuple[int, int], step: int
) -> None:
    scene, streams = make_pictures(targets, size), rows(targets)
    expected, plain = evaluate_by(unet, scene, streams, painted(step in LATE)), evaluate(unet, scene, streams)
    assert all(distance({row: out}, plain) > CLEAR for row, out in drawn_rows(expected).items())
    assert distance(evaluate_controlled(unet, Portrait(), scene, streams, step), expected) <= EXACT


@pytest.mark.parametrize("step", [EARLY[0], EARLY[1], LATE[0], LATE[1]])
def test_every_step_is_controlled_and_the_switch_is_at_seven_tenths(unet: UNet2DConditionModel, step: int) -> None:
    scene, streams = make_pictures(), unguided()
    out = evaluate_controlled(unet, Portrait(), scene, streams, step)
    assert distance(out, evaluate_by(unet, scene, streams, painted(step in LATE))) <= EXACT
    assert distance(targets_of(out), evaluate_by(unet, scene, streams, painted(step not in LATE))) > CLEAR


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 10])
def test_the_guidance_moves_from_the_contents_queries_to_the_targets(unet: UNet2DConditionModel, guidance: float) -> None:
    scene, streams = make_pictures(2), guided(2)
    expected = evaluate_by(unet, scene, streams, painted(True, guidance))
    out = evaluate_controlled(unet, Portrait(style_guidance=guidance), scene, streams, LATE[0])
    assert distance(out, expected) <= EXACT
    assert distance(targets_of(out), evaluate_by(unet, scene, streams, painted(True))) > CLEAR


@pytest.mark.parametrize(("step", "streams"), [(EARLY[0], unguided()), (LATE[0], guided())], ids=["early", "late"])
def test_a_content_that_is_not_drawn_is_plain(unet: UNet2DConditionModel, step: int, streams: Streams) -> None:
    scene = make_pictures(size=(16, 24))
    expected = evaluate_by(unet, scene, streams, painted(step in LATE, draw_content=False))
    out = evaluate_controlled(unet, Portrait(draw_content=False), scene, streams, step)
    content = {row: o for row, o in out.items() if (row.role, row.index) == ("source", 0)}
    assert distance(content, evaluate(unet, scene, streams)) <= 1e-12
    assert distance(out, expected) <= EXACT
    drawn = evaluate_controlled(unet, Portrait(), scene, streams, step)
    assert distance(content, drawn) > CLEAR
    assert distance(targets_of(out), drawn) > CLEAR


@pytest.mark.parametrize("settings", [{}, {"draw_content": False}, {"style_guidance": 0}, {"content_mask": torch.ones(16, 16)}])
def test_the_style_is_always_plain(unet: UNet2DConditionModel, settings: dict[str, Any]) -> None:
    scene, streams = make_pictures(), guided()
    plain = evaluate(unet, scene, streams)
    for step in (EARLY[0], LATE[0]):
        out = evaluate_controlled(unet, Portrait(**settings), scene, streams, step)
        assert distance({row: o for row, o in out.items() if (row.role, row.index) == ("source", 1)}, plain) <= 1e-12


def test_targets_of_one_batch_do_not_see_each_other(unet: UNet2DConditionModel) -> None:
    scene = make_pictures(2)
    for step in (EARLY[0], LATE[0]):
        together = evaluate_controlled(unet, Portrait(), scene, guided(2), step)
        for target in range(2):
            index = [0, 1, 2 + target]
            own = Pictures(scene.latents[index], scene.text[index], scene.empty)
            for row, out in targets_of(evaluate_controlled(unet, Portrait(), own, guided(), step)).items():
                assert (together[StreamRow("target", target, row.half)] - out).abs().max() <= EXACT


# --- masks --------------------------------------------------------------------------------------------------------------


def _soft(size: tuple[int, int], seed: int) -> Tensor:
    """Sixteenths from 0 to 1, exact in single precision, with soft and hard places."""
    return torch.randint(0, 17, size, generator=torch.Generator().manual_seed(seed)).float() / 16


MASKED = pytest.mark.parametrize("given", ["both", "style", "content"])


def _masks(given: str, size: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    big = 2 * size[0], 2 * size[1]
    style, content = _soft(big, 1), _soft(big, 2)
    half = torch.zeros(big)
    half[:, : size[1]] = 1
    return style * half if given != "content" else None, content * half.flip(1) if given != "style" else None


@pytest.mark.parametrize("size", [(16, 16), (16, 24)], ids=["square", "oblong"])
@MASKED
@pytest.mark.parametrize("step", [EARLY[0], LATE[0]], ids=["early", "late"])
def test_with_masks_each_part_reads_its_own(unet: UNet2DConditionModel, size: tuple[int, int], given: str, step: int) -> None:
    scene, streams = make_pictures(2, size), guided_targets(2)
    style, content = _masks(given, size)
    expected = evaluate_by(unet, scene, streams, painted(step in LATE, attend=to_the_style_by_parts(style, content)))
    out = evaluate_controlled(unet, Portrait(style_mask=style, content_mask=content), scene, streams, step)
    assert distance(targets_of(expected), evaluate_by(unet, scene, streams, painted(step in LATE))) > CLEAR
    assert distance(out, expected) <= EXACT


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_with_masks_the_late_blend_starts_from_the_masked_content(unet: UNet2DConditionModel, guidance: float) -> None:
    scene, streams = make_pictures(), unguided()
    style, content = _masks("both", (16, 16))
    rule = painted(True, guidance, attend=to_the_style_by_parts(style, content))
    controller = Portrait(style_mask=style, content_mask=content, style_guidance=guidance)
    out = evaluate_controlled(unet, controller, scene, streams, LATE[0])
    assert distance(out, evaluate_by(unet, scene, streams, rule)) <= EXACT


@pytest.mark.parametrize("step", [EARLY[0], LATE[0]], ids=["early", "late"])
def test_full_masks_are_no_masks(unet: UNet2DConditionModel, step: int) -> None:
    scene, streams, full = make_pictures(), guided(), torch.ones(32, 32)
    out = evaluate_controlled(unet, Portrait(style_mask=full, content_mask=full), scene, streams, step)
    assert distance(out, evaluate_controlled(unet, Portrait(), scene, streams, step)) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("style", "content"), [(0, 1), (1, 0)])
def test_empty_parts_are_finite_in_half_precision(dtype: torch.dtype, style: float, content: float) -> None:
    scene, unet = make_pictures(), tiny_unet(dtype=dtype)
    low = Pictures(scene.latents.to(dtype), scene.text.to(dtype), scene.empty.to(dtype))
    controller = Portrait(style_mask=torch.full((16, 16), float(style)), content_mask=torch.full((16, 16), float(content)))
    for step in (EARLY[0], LATE[0]):
        out = evaluate_controlled(unet, controller, low, guided(), step)
        assert all(torch.isfinite(output).all() for output in out.values())


# --- what it needs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [official_rows(), unguided_rows()], ids=["guided", "unguided"])
@pytest.mark.parametrize("step", [EARLY[0], LATE[0]], ids=["early", "late"])
def test_a_batch_without_the_style_is_refused(unet: UNet2DConditionModel, streams: Streams, step: int) -> None:
    with pytest.raises(ControlError, match="style row"):
        evaluate_controlled(unet, Portrait(), make_pictures(), streams, step)


@pytest.mark.parametrize("step", [EARLY[0], LATE[0]], ids=["early", "late"])
def test_a_batch_without_the_content_is_refused(unet: UNet2DConditionModel, step: int) -> None:
    streams = layout([("source", 1, "conditional"), ("target", 0, "conditional")])
    with pytest.raises(ControlError, match="no source row"):
        evaluate_controlled(unet, Portrait(), make_pictures(), streams, step)


@pytest.mark.parametrize(("switch", "late"), [(0, True), (0.0, True), (1.0, False), (STEPS, False)])
def test_one_of_both_phases_may_be_left_out(unet: UNet2DConditionModel, switch: float | int, late: bool) -> None:
    scene, streams = make_pictures(), unguided()
    expected = evaluate_by(unet, scene, streams, painted(late))
    step = 0 if late else STEPS - 1
    assert distance(evaluate_controlled(unet, Portrait(switch_step=switch), scene, streams, step), expected) <= EXACT


def test_outside_of_a_step_it_is_bitwise_plain(unet: UNet2DConditionModel) -> None:
    scene, streams = make_pictures(), guided()
    plain = evaluate(unet, scene, streams)
    with controlled(unet, Portrait(), num_steps=STEPS, latent_size=scene.size) as session:
        with session.step(0, streams):
            evaluate(unet, scene, streams)
        assert same_bits(evaluate(unet, scene, streams), plain)
    assert same_bits(evaluate(unet, scene, streams), plain)


def test_a_second_use_of_the_same_controller_equals_the_first(unet: UNet2DConditionModel) -> None:
    scene, streams = make_pictures(2, (16, 24)), guided(2)
    style, content = _masks("both", (16, 24))
    controller = Portrait(style_mask=style, content_mask=content)
    for step in (EARLY[0], LATE[0]):
        first = evaluate_controlled(unet, controller, scene, streams, step)
        assert distance(targets_of(first), evaluate(unet, scene, streams)) > CLEAR
        assert same_bits(evaluate_controlled(unet, controller, scene, streams, step), first)
