"""Guidance per row, and what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from easyinv_edit.cost import measured
from easyinv_edit.denoiser import BatchRow, Denoiser
from tests.helpers import denoiser_like, embeddings, make_schedule, smooth_latent, toy_denoiser

SCHEDULE = make_schedule(10)


def affine(z: Tensor, t: int, e: Tensor) -> Tensor:
    """Half the latent plus the row's number plus the timestep."""
    return 0.5 * z + e.mean((1, 2))[:, None, None, None] + t


def cond(row: int) -> BatchRow:
    return BatchRow(row, "conditional")


def uncond(row: int) -> BatchRow:
    return BatchRow(row, "unconditional")


@pytest.mark.parametrize("guidance", [(1.0,), (7.5,), (0.0,), (1.0, 7.5), (3.0, 1.0, 7.5), (2.0, 5.0), (0.5, 1.0)])
def test_output_is_the_guidance_formula_of_each_row(guidance: tuple[float, ...]) -> None:
    """Row r is conditioned on r + 1 and its negative on 0, so guidance w moves the output by w * (r + 1)."""
    z = smooth_latent(rows=len(guidance))
    out = toy_denoiser(affine, SCHEDULE, len(guidance), guidance)(z, 4)
    for r, w in enumerate(guidance):
        unconditional = 0.5 * z[r] + SCHEDULE.timesteps[4]
        torch.testing.assert_close(out[r], unconditional + w * (r + 1), rtol=1e-12, atol=0)


def test_each_row_is_moved_away_from_its_own_negative() -> None:
    guidance, negatives = (3.0, 1.0, 7.5), (-1.0, -2.0, -4.0)
    denoiser = replace(toy_denoiser(affine, SCHEDULE, 3, guidance), negative=embeddings(*negatives))
    z = smooth_latent(rows=3)
    out = denoiser(z, 4)
    for r, (w, negative) in enumerate(zip(guidance, negatives, strict=True)):
        expected = 0.5 * z[r] + SCHEDULE.timesteps[4] + negative + w * (r + 1 - negative)
        torch.testing.assert_close(out[r], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("guidance", "rows"), [((1.0,), 1), ((7.5,), 2), ((1.0, 7.5), 3), ((1.0, 1.0), 2), ((7.5, 7.5), 4), ((0.0, 1.0), 3)]
)
def test_only_guided_rows_cost_twice(guidance: tuple[float, ...], rows: int) -> None:
    denoiser = toy_denoiser(affine, SCHEDULE, len(guidance), guidance)
    with measured(denoiser.backbone.network) as cost:
        denoiser(smooth_latent(rows=len(guidance)), 1)
    assert (cost.evaluations, cost.calls) == (rows, 1)
    assert len(denoiser.batch) == rows


@pytest.mark.parametrize(
    ("guidance", "twins", "batch"),
    [
        ((1.0, 1.0), None, (cond(0), cond(1))),
        ((7.5,), None, (uncond(0), cond(0))),
        ((7.5, 1.0, 3.0), None, (cond(1), uncond(0), uncond(2), cond(0), cond(2))),
        ((1.0, 7.5), (True, True), (uncond(0), uncond(1), cond(0), cond(1))),
        ((1.0, 1.0), (False, True), (cond(0), uncond(1), cond(1))),
    ],
)
def test_batch_order_is_single_rows_then_twins_then_partners(
    guidance: tuple[float, ...], twins: tuple[bool, ...] | None, batch: tuple[BatchRow, ...]
) -> None:
    assert replace(toy_denoiser(affine, SCHEDULE, len(guidance), guidance), twins=twins).batch == batch


def test_the_network_sees_the_rows_in_batch_order_and_the_level_s_label() -> None:
    denoiser = toy_denoiser(affine, SCHEDULE, 3, (7.5, 1.0, 3.0))
    z = smooth_latent(rows=3)
    denoiser(z, 6)
    ((timestep, seen),) = denoiser.backbone.calls  # type: ignore[attr-defined]
    assert timestep == SCHEDULE.timesteps[6]
    assert torch.equal(seen, z[[1, 0, 2, 0, 2]])


def test_a_forced_twin_costs_a_row_and_changes_nothing() -> None:
    plain = toy_denoiser(affine, SCHEDULE, 2, (1.0, 7.5))
    forced = replace(plain, twins=(True, True))
    z = smooth_latent(rows=2)
    with measured(forced.backbone.network) as cost:
        assert torch.equal(forced(z, 3), plain(z, 3))
    assert cost.evaluations == 4 + 3


def test_one_guided_batch_equals_two_separate_calls() -> None:
    output = denoiser_like(SCHEDULE, strength=0.5)
    denoiser = toy_denoiser(output, SCHEDULE, 2, (3.0, 7.5))
    z = smooth_latent(rows=2)
    label = SCHEDULE.timesteps[5]
    conditional = denoiser.backbone.predict(z, label, embeddings(1.0, 2.0))
    unconditional = denoiser.backbone.predict(z, label, embeddings(0.0, 0.0))
    scale = torch.tensor([3.0, 7.5], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(denoiser(z, 5), unconditional + scale * (conditional - unconditional), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rows", [[0], [2], [1, 0], [0, 2], range(1, 3)])
def test_select_serves_the_same_rows(rows: list[int]) -> None:
    denoiser = replace(toy_denoiser(affine, SCHEDULE, 3, (1.0, 7.5, 3.0)), twins=(True, True, True))
    z = smooth_latent(rows=3)
    chosen = denoiser.select(rows)
    assert chosen.guidance == tuple(denoiser.guidance[r] for r in rows)
    assert torch.equal(chosen(z[list(rows)], 2), denoiser(z, 2)[list(rows)])
    assert len(chosen.batch) == 2 * len(rows), "forced twins are selected with their rows"


def test_select_works_without_negatives() -> None:
    denoiser = replace(toy_denoiser(affine, SCHEDULE, 2), negative=None)
    z = smooth_latent(rows=2)
    assert torch.equal(denoiser.select([1])(z[1:], 2), denoiser(z, 2)[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_guided_output_has_the_latents_dtype(dtype: torch.dtype) -> None:
    assert toy_denoiser(affine, SCHEDULE, 1, (7.5,))(smooth_latent().to(dtype), 1).dtype == dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": (1.0,)}, "1 guidance scales for 2 rows"),
        ({"guidance": (1.0, 7.5), "negative": None}, "needs a negative"),
        ({"twins": (True, False), "negative": None}, "needs a negative"),
        ({"guidance": (1.0, 7.5), "twins": (True, False)}, "twins"),
        ({"twins": (True,)}, "twins"),
        ({"negative": embeddings(0.0)}, "1 negative conditionings for 2 rows"),
    ],
)
def test_a_denoiser_that_cannot_serve_its_rows_is_refused(changes: dict[str, Any], message: str) -> None:
    good: Denoiser = toy_denoiser(affine, SCHEDULE, 2)
    with pytest.raises(ValueError, match=message):
        replace(good, **changes)
