"""A user's masks: whatever they come as, the same values in the frame of the edited picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attention_control import Run
from easyinv_edit.errors import EasyInvWarning, ImageError
from easyinv_edit.images import Policy, fit
from easyinv_edit.mask_files import reader

SIZE = (16, 24)
"""(height, width) of the model's picture."""
LEVELS = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE)
VALUES = torch.from_numpy(LEVELS.astype(np.float32) / 255)


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))


def _saved(path: Path, picture: Image.Image) -> Path:
    picture.save(path)
    return path


def _read(given: Any) -> Tensor:
    return reader(None, SIZE)(given)


# --- what a mask may be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: _saved(folder / "m.png", Image.fromarray(LEVELS)),
        lambda folder: str(_saved(folder / "m.png", Image.fromarray(LEVELS))),
        lambda _: Image.fromarray(LEVELS),
        lambda _: Image.fromarray(LEVELS).convert("RGB"),
        lambda _: LEVELS,
        lambda _: LEVELS.astype(np.float32) / 255,
        lambda _: LEVELS.astype(np.float64) / 255,
        lambda _: VALUES,
        lambda _: VALUES.double(),
    ],
    ids=["path", "text", "grey picture", "RGB picture", "uint8", "float32", "float64", "tensor", "double tensor"],
)
def test_every_kind_gives_the_same_values(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    mask = _read(make(tmp_path))
    assert mask.dtype == torch.float32
    assert torch.equal(mask, VALUES)


@pytest.mark.parametrize("make", [lambda m: m, torch.from_numpy, lambda m: m.astype(float), lambda m: Image.fromarray(m)])
def test_black_and_white_are_zero_and_one(make: Callable[[Any], Any]) -> None:
    chosen = np.zeros(SIZE, dtype=bool)
    chosen[3:9, 5:20] = True
    assert torch.equal(_read(make(chosen)), torch.from_numpy(chosen).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors_are_read(dtype: torch.dtype) -> None:
    assert torch.allclose(_read(VALUES.to(dtype)), VALUES, atol=4e-3)


def test_soft_edges_are_kept() -> None:
    soft = torch.linspace(0, 1, SIZE[1]).expand(SIZE)
    mask = _read(soft)
    assert (mask - soft).abs().max() <= 0.5 / 255 + 1e-6
    assert len(set(mask.flatten().tolist())) == SIZE[1]


def test_a_tensor_with_gradients_is_read() -> None:
    assert torch.equal(_read(VALUES.clone().requires_grad_()), VALUES)


# --- in the frame of the picture ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("original", [(40, 20), (20, 40), (37, 61), (48, 32)])
def test_a_mask_of_the_originals_size_goes_where_its_pixels_go(policy: Policy, original: tuple[int, int]) -> None:
    marks = _noise(*original)
    picture, record = fit(marks.convert("RGB"), SIZE, policy)
    expected = torch.from_numpy(np.asarray(picture)[..., 0].astype(np.float32) / 255)
    for given in (marks, np.asarray(marks)):
        assert torch.equal(reader(record.as_dict(), SIZE)(given), expected)


def test_the_crop_is_of_the_middle() -> None:
    """24 of 48 columns stay: 12 are cut at each side, which the mask must lose too."""
    _, record = fit(Image.new("RGB", (48, 16)), SIZE, "crop")
    marked = np.zeros((16, 48), dtype=bool)
    marked[:, 12:18] = True
    marked[:, :12] = True
    mask = reader(record.as_dict(), SIZE)(marked)
    assert torch.equal(mask[0], (torch.arange(24) < 6).float())


@pytest.mark.parametrize("given", [VALUES, LEVELS, Image.fromarray(LEVELS)], ids=["tensor", "array", "picture"])
def test_a_mask_of_the_models_size_is_taken_as_it_is(given: Any) -> None:
    _, record = fit(Image.new("RGB", (50, 20)), SIZE, "crop")
    assert torch.equal(reader(record.as_dict(), SIZE)(given), VALUES)


@pytest.mark.parametrize("other", [(12, 8), (48, 32), (24, 17), (16, 24)])
@pytest.mark.parametrize("known", [True, False])
def test_another_size_is_stretched_and_said(other: tuple[int, int], known: bool) -> None:
    record = fit(Image.new("RGB", (50, 20)), SIZE, "crop")[1].as_dict() if known else None
    marks = _noise(*other)
    with pytest.warns(EasyInvWarning, match=rf"{other[0]} x {other[1]} pixels and the picture 24 x 16; it is stretched"):
        mask = reader(record, SIZE)(marks)
    stretched = marks.convert("RGB").resize((24, 16), Image.Resampling.LANCZOS)
    assert torch.equal(mask, torch.from_numpy(np.asarray(stretched)[..., 0].astype(np.float32) / 255))


def test_matching_masks_give_no_warning() -> None:
    _, record = fit(Image.new("RGB", (40, 20)), SIZE, "crop")
    read = reader(record.as_dict(), SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(_noise(40, 20)).shape == SIZE
        assert read(_noise(24, 16)).shape == SIZE


@pytest.mark.parametrize("make", [np.asarray, lambda picture: torch.from_numpy(np.asarray(picture) / 255.0)])
def test_a_run_reads_arrays_and_tensors_of_the_originals_size_alike(make: Callable[[Any], Any]) -> None:
    marks = _noise(48, 16)
    record = fit(marks.convert("RGB"), SIZE, "crop")[1].as_dict()
    mask = Run(50, (2, 3), read_mask=reader(record, SIZE)).mask(make(marks))
    assert mask.shape == SIZE, "the picture was cropped and its mask was not"
    assert (mask - torch.from_numpy(np.asarray(marks)[:, 12:36] / 255.0)).abs().max() <= 1e-6


# --- what is no mask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: folder / "missing.png",
        lambda folder: folder,
        lambda _: LEVELS.astype(np.float32),
        lambda _: np.full(SIZE, np.nan, dtype=np.float32),
        lambda _: LEVELS.astype(np.int64),
        lambda _: torch.zeros(2, 3, 16, 24),
        lambda _: torch.zeros(16),
        lambda _: np.zeros((2, 2), dtype=bool),
        lambda _: [[0, 1], [1, 0]],
    ],
    ids=["missing", "folder", "above 1", "NaN", "int64", "four axes", "one axis", "2 x 2", "list"],
)
def test_what_cannot_be_read_is_an_image_error(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    with pytest.raises(ImageError):
        _read(make(tmp_path))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        _read(broken)
