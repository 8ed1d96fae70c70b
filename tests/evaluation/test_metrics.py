"""Closed forms of the metrics."""

from __future__ import annotations

import math

import pytest
import torch

from easyinv_edit.evaluation.metrics import psnr, ssim

GREY = torch.full((1, 3, 16, 16), 0.5)


@pytest.mark.parametrize("offset", [0.1, 0.01, 0.25])
def test_a_constant_offset_has_its_decibels(offset: float) -> None:
    assert psnr(GREY, GREY + offset) == pytest.approx(-20 * math.log10(offset), abs=1e-4)


def test_equal_pictures_are_infinitely_close() -> None:
    assert psnr(GREY, GREY) == math.inf


def test_only_masked_pixels_count() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :4] = 1
    assert psnr(GREY, GREY + 0.1 * mask, mask) == pytest.approx(20.0, abs=1e-4)
    assert psnr(GREY, GREY + 0.1 * (1 - mask), mask) == math.inf
    assert math.isnan(psnr(GREY, GREY, torch.zeros_like(mask)))


def test_bytes_do_not_wrap_around() -> None:
    low, high = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)
    assert psnr(low, high) == psnr(high, low) == pytest.approx(-20 * math.log10(200))


def test_ssim_is_one_for_equal_and_symmetric() -> None:
    a, b = torch.rand(2, 1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert ssim(a, a) == pytest.approx(1.0)
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    assert ssim(a, b) < 0.5


def test_ssim_of_two_flat_pictures_is_its_luminance_term() -> None:
    a, b = 0.25, 0.75
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b)) == pytest.approx(expected)
