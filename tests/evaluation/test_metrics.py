"""Metrics of pixels: closed forms, both forms of a mask, and equality with scikit-image, scipy and torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from easyinv_edit.errors import InputError
from easyinv_edit.evaluation.metrics import SCALE_WEIGHTS, MaskForm, ms_ssim, mse, psnr, ssim

GREY = torch.full((1, 3, 16, 16), 0.5)
FORMS: tuple[MaskForm, ...] = ("compat", "masked_mean")
Metric = Callable[..., float]
METRICS = {"mse": mse, "psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
BEST = {"mse": 0.0, "psnr": math.inf, "ssim": 1.0, "ms_ssim": 1.0}
each_metric = pytest.mark.parametrize("name", METRICS)
each_form = pytest.mark.parametrize("form", FORMS)


def noisy(size: tuple[int, int], amount: float = 0.1, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Smooth pictures and the same with noise, float64 in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(rows, 3, 8, 8, generator=generator, dtype=torch.float64)
    a = torch.nn.functional.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1)
    return a, (a + amount * torch.randn(a.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


def left(size: tuple[int, int], columns: int) -> Tensor:
    """A mask of the first columns."""
    mask = torch.zeros(1, 1, *size)
    mask[..., :columns] = 1
    return mask


# Closed forms, whole pictures


@pytest.mark.parametrize("offset", [0.1, 0.01, 0.25])
def test_a_constant_offset_has_its_decibels(offset: float) -> None:
    assert psnr(GREY, GREY + offset) == pytest.approx(-20 * math.log10(offset), abs=1e-4)
    assert mse(GREY, GREY + offset) == pytest.approx(offset**2, rel=1e-5)


def test_equal_pictures_are_infinitely_close() -> None:
    assert psnr(GREY, GREY) == math.inf


@each_metric
def test_equal_pictures_score_best_and_order_does_not_matter(name: str) -> None:
    a, b = noisy((176, 176))
    assert METRICS[name](a, a) == pytest.approx(BEST[name], abs=1e-12)
    assert METRICS[name](a, b) == pytest.approx(METRICS[name](b, a))
    assert METRICS[name](a, b) != pytest.approx(BEST[name], abs=1e-3)


def test_a_checkerboard_is_half_wrong_against_black() -> None:
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 0.8
    assert mse(board, torch.zeros(16, 16)) == pytest.approx(0.8**2 / 2)
    assert psnr(board, torch.zeros(16, 16)) == pytest.approx(-10 * math.log10(0.32))


def test_a_checkerboard_has_no_structure_in_common_with_its_negative() -> None:
    board = ((torch.arange(20)[:, None] + torch.arange(20)) % 2).double()[None, None]
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / 4.5)
    bias = (torch.outer(line, line) * (-1.0) ** (torch.arange(11)[:, None] + torch.arange(11))).sum() / line.sum() ** 2
    light, dark = 0.5 + bias / 2, 0.5 - bias / 2  # mean of a window, by the colour of its centre
    variance = light * dark
    expected = (2 * light * dark + 1e-4) / (light**2 + dark**2 + 1e-4) * (9e-4 - 2 * variance) / (9e-4 + 2 * variance)
    assert ssim(board, 1 - board) == pytest.approx(expected.item())


def test_bytes_do_not_wrap_around() -> None:
    low, high = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)
    assert psnr(low, high) == psnr(high, low) == pytest.approx(-20 * math.log10(200))


def test_ssim_of_unlike_noise_is_low() -> None:
    a, b = torch.rand(2, 1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    assert ssim(a, b) < 0.5


def luminance(a: float, b: float) -> float:
    """SSIM of two flat pictures: its luminance term."""
    return (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)


def flat(value: float, size: tuple[int, int]) -> Tensor:
    return torch.full((1, 1, *size), value, dtype=torch.float64)


def test_ssim_of_two_flat_pictures_is_its_luminance_term() -> None:
    assert ssim(flat(0.25, (16, 16)), flat(0.75, (16, 16))) == pytest.approx(luminance(0.25, 0.75))


def test_ms_ssim_of_two_flat_pictures_is_the_coarsest_luminance_term() -> None:
    size = (180, 200)
    assert ms_ssim(flat(0.25, size), flat(0.75, size)) == pytest.approx(luminance(0.25, 0.75) ** SCALE_WEIGHTS[-1])


def test_the_weights_of_the_scales_add_up_to_one() -> None:
    assert sum(SCALE_WEIGHTS) == pytest.approx(1, abs=1e-4)


def test_opposite_structure_gives_an_ms_ssim_of_nothing() -> None:
    a, _ = noisy((176, 176))
    assert ssim(a, 1 - a) < 0
    assert ms_ssim(a, 1 - a) == 0


def test_ms_ssim_of_a_batch_is_the_mean_of_its_pictures() -> None:
    a, b = noisy((176, 180), rows=2)
    b[1] = a[1]
    assert ms_ssim(a, b) == pytest.approx((ms_ssim(a[:1], b[:1]) + 1) / 2)


# Masks


def test_only_masked_pixels_count() -> None:
    mask = left((16, 16), 4)
    assert psnr(GREY, GREY + 0.1 * mask, mask) == pytest.approx(20.0, abs=1e-4)
    assert psnr(GREY, GREY + 0.1 * (1 - mask), mask) == math.inf
    assert math.isnan(psnr(GREY, GREY, torch.zeros_like(mask)))


@pytest.mark.parametrize("columns", [16, 8, 4, 1])
def test_compat_flatters_by_the_share_of_the_mask(columns: int) -> None:
    a, b = noisy((16, 16))
    mask, share = left((16, 16), columns), columns / 16
    assert mse(a, b, mask, "compat") == pytest.approx(share * mse(a, b, mask, "masked_mean"), rel=1e-12)
    assert psnr(a, b, mask, "compat") == pytest.approx(psnr(a, b, mask) - 10 * math.log10(share), rel=1e-12)


def test_compat_ssim_of_flat_pictures_follows_the_edge_of_the_mask() -> None:
    a, b, columns, width = 0.3, 0.8, 12, 30
    line = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    line /= line.sum()
    terms = []
    for start in range(width - 10):
        w = line[: max(0, min(11, columns - start))].sum()  # weight of the window that is inside the mask
        spread = w * (1 - w)
        light = (2 * a * b * w * w + 1e-4) / ((a * a + b * b) * w * w + 1e-4)
        terms.append(light * (2 * a * b * spread + 9e-4) / ((a * a + b * b) * spread + 9e-4))
    size = (16, width)
    assert ssim(flat(a, size), flat(b, size), left(size, columns), "compat") == pytest.approx(np.mean(terms), rel=1e-12)
    assert ssim(flat(a, size), flat(b, size), left(size, columns)) == pytest.approx(luminance(a, b), rel=1e-12)


@each_metric
@each_form
def test_a_full_mask_changes_nothing(name: str, form: MaskForm) -> None:
    a, b = noisy((176, 190))
    assert METRICS[name](a, b, torch.ones(1, 1, 176, 190), form) == pytest.approx(METRICS[name](a, b), rel=1e-12)


@each_metric
@each_form
def test_an_empty_mask_has_no_score(name: str, form: MaskForm) -> None:
    a, b = noisy((176, 176))
    assert math.isnan(METRICS[name](a, b, torch.zeros(1, 1, 176, 176), form))


@each_metric
@each_form
def test_a_picture_with_an_empty_mask_is_left_out_of_its_batch(name: str, form: MaskForm) -> None:
    a, b = noisy((176, 176), rows=2)
    mask = torch.cat([left((176, 176), 100), left((176, 176), 0)])
    assert METRICS[name](a, b, mask, form) == METRICS[name](a[:1], b[:1], mask[:1], form)


@each_metric
@each_form
@pytest.mark.parametrize("kind", ["soft", "bool", "bytes"])
def test_a_mask_counts_where_it_is_above_a_half(name: str, form: MaskForm, kind: Literal["soft", "bool", "bytes"]) -> None:
    a, b = noisy((176, 176))
    mask = left((176, 176), 90)
    other = {"soft": mask * 0.2 + 0.4, "bool": mask.bool(), "bytes": mask.byte()}[kind]
    assert METRICS[name](a, b, other, form) == METRICS[name](a, b, mask, form)


@pytest.mark.parametrize("name", ["mse", "psnr", "ssim"])
def test_windows_beyond_the_mask_do_not_count(name: str) -> None:
    a, b = noisy((32, 40))
    b[..., :20] = a[..., :20]
    near = 15 if name == "ssim" else 20  # a window reaches five pixels further than its centre
    assert METRICS[name](a, b, left((32, 40), near)) == pytest.approx(BEST[name], abs=1e-12)
    assert METRICS[name](a, b, left((32, 40), near + 1)) != pytest.approx(BEST[name], abs=1e-6)


def test_coarse_windows_beyond_the_mask_do_not_count() -> None:
    a, b = noisy((176, 352))
    b[..., :192] = a[..., :192]
    assert ms_ssim(a, b, left((176, 352), 112)) == pytest.approx(1, abs=1e-12)  # seven coarse columns, and five more are seen
    assert ms_ssim(a, b, left((176, 352), 128)) < 1 - 1e-9


def test_a_mask_within_the_edge_of_the_picture_has_no_window() -> None:
    a, b = noisy((32, 32))
    assert math.isnan(ssim(a, b, left((32, 32), 5)))
    assert ssim(a, b, left((32, 32), 6)) < 1


# Other libraries


def test_psnr_is_that_of_torchmetrics() -> None:
    a, b = noisy((31, 45), rows=2)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0).item(), rel=1e-6)


def their_ssim(a: Tensor, b: Tensor) -> tuple[float, np.ndarray]:
    """scikit-image's mean and map (H, W, C) of one picture."""
    options = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    x, y = (each[0].permute(1, 2, 0).numpy() for each in (a, b))
    return structural_similarity(x, y, full=True, **options)


def test_ssim_is_that_of_scikit_image() -> None:
    a, b = noisy((40, 53))
    assert ssim(a, b) == pytest.approx(their_ssim(a, b)[0], rel=1e-12)


def test_ssim_on_a_mask_is_scikit_images_map_within_it_or_its_mean_of_blackened_pictures() -> None:
    a, b = noisy((40, 53))
    mask = (torch.rand(1, 1, 40, 53, generator=torch.Generator().manual_seed(1)) > 0.6).double()
    inside = mask[0, 0].numpy()[5:-5, 5:-5] > 0.5
    expected = their_ssim(a, b)[1][5:-5, 5:-5][inside].mean()
    assert ssim(a, b, mask) == pytest.approx(expected, rel=1e-12)
    assert ssim(a, b, mask, "compat") == pytest.approx(their_ssim(a * mask, b * mask)[0], rel=1e-12)


def test_ms_ssim_is_made_of_torchmetrics_scales() -> None:
    a, b = noisy((180, 203), 0.3)
    product, x, y = 1.0, a, b
    for scale, weight in enumerate(SCALE_WEIGHTS):
        if scale:
            x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
        if scale < 4:
            _, contrast = structural_similarity_index_measure(x, y, data_range=1.0, return_contrast_sensitivity=True)
            product *= contrast.item() ** weight
        else:
            _, full = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True)
            product *= full[..., 5:-5, 5:-5].mean().item() ** weight
    assert ms_ssim(a, b) == pytest.approx(product, rel=1e-9)
    # Theirs also counts windows that reach over the edge, at the coarsest scale.
    assert ms_ssim(a, b) == pytest.approx(multiscale_structural_similarity_index_measure(a, b, data_range=1.0).item(), abs=0.01)


def test_ms_ssim_on_a_mask_is_that_of_scipys_windows() -> None:
    a, b = noisy((180, 203), 0.3)
    mask = left((180, 203), 117)  # of the coarsest scale's pixels one is inside by less than half
    product = 1.0
    for scale, weight in enumerate(SCALE_WEIGHTS):
        x, y, share = (avg_pool2d(each.double(), 2**scale)[0].numpy() for each in (a, b, mask))

        def blur(picture: np.ndarray) -> np.ndarray:
            return gaussian_filter(picture, (0, 1.5, 1.5), truncate=3.5)

        mx, my = blur(x), blur(y)
        cover = (2 * blur(x * y) - 2 * mx * my + 9e-4) / (blur(x * x) + blur(y * y) - mx**2 - my**2 + 9e-4)
        if scale == 4:
            cover *= (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
        product *= cover[:, 5:-5, 5:-5][:, share[0, 5:-5, 5:-5] > 0.5].mean() ** weight
    assert ms_ssim(a, b, mask) == pytest.approx(product, rel=1e-6)


# Refusals


@each_metric
def test_what_cannot_be_compared_is_refused(name: str) -> None:
    a, b = noisy((176, 176))
    with pytest.raises(InputError, match=r"\(1, 3, 176, 176\) and \(1, 3, 176, 160\)"):
        METRICS[name](a, b[..., :160])
    with pytest.raises(InputError, match=r"a mask of shape \(1, 1, 88, 88\)"):
        METRICS[name](a, b, torch.ones(1, 1, 88, 88))
    with pytest.raises(InputError, match="'mean' is unknown; choose compat or masked_mean"):
        METRICS[name](a, b, torch.ones(1, 1, 176, 176), "mean")


@pytest.mark.parametrize(("metric", "least"), [(ssim, 11), (ms_ssim, 176)])
def test_pictures_without_room_for_a_window_are_refused(metric: Metric, least: int) -> None:
    a, b = noisy((least, least + 3))
    assert metric(a, b) < 1
    for small in ((a[..., 1:, :], b[..., 1:, :]), (a[..., 4:], b[..., 4:]), (a[0], b[0])):
        with pytest.raises(InputError, match=rf"sides of at least {least} pixels"):
            metric(*small)
