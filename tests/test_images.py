"""Pictures in and out: every mode and every failure with real files, and the closed forms of fit and undo."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from easyinv_edit.errors import ImageError
from easyinv_edit.figures import strip
from easyinv_edit.images import MAX_SIDE, Fit, Policy, fit, load, save_png, to_pil, to_tensor, to_uint8, undo

PHOTOS = Path(__file__).parents[2] / "shared" / "photos"
RED, GREY, WHITE = (255, 0, 0), (102, 102, 102), (255, 255, 255)
ARRAY = np.arange(240, dtype=np.uint8).reshape(10, 8, 3)
PLANES = torch.from_numpy(ARRAY).permute(2, 0, 1)
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "blue"), Image.new("RGB", (64, 48), "red")]}


def noise(width: int, height: int) -> Image.Image:
    """A picture in which no two places look alike."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def colours(picture: Image.Image) -> list[tuple[int, ...]]:
    """The distinct colours of an RGB picture."""
    assert picture.mode == "RGB"
    return [tuple(int(v) for v in row) for row in np.unique(np.asarray(picture).reshape(-1, 3), axis=0)]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
    parts = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(format: str, **options: Any) -> bytes:
    """A noisy picture as a file's content."""
    noise(64, 48).save(buffer := io.BytesIO(), format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("mode", "suffix", "colour"), [
    ("RGB", "png", RED), ("RGB", "webp", RED), ("RGBA", "png", RED), ("P", "png", RED), ("P", "gif", RED),
    ("CMYK", "tiff", RED), ("L", "png", GREY), ("L", "jpg", GREY), ("LA", "png", GREY), ("1", "png", WHITE),
])  # fmt: skip
def test_a_pure_colour_survives_every_mode(tmp_path: Path, mode: str, suffix: str, colour: tuple[int, ...]) -> None:
    Image.new("RGB", (12, 10), colour).convert(mode).save(tmp_path / f"a.{suffix}", lossless=True)
    assert colours(load(tmp_path / f"a.{suffix}")) == [colour]


@pytest.mark.parametrize(("mode", "dtype", "top", "suffix"), [
    ("I;16", "<u2", 65535, "png"), ("I;16B", ">u2", 65535, "tiff"), ("I", "i4", 65535, "tiff"), ("F", "f4", 1, "tiff"),
])  # fmt: skip
def test_deep_pictures_are_scaled_not_clipped(tmp_path: Path, mode: str, dtype: str, top: int, suffix: str) -> None:
    levels = np.arange(256).reshape(16, 16)  # 255 is white, 0 is black, in every mode
    picture = Image.fromarray((levels * (top / 255)).astype(dtype))
    assert picture.mode == mode
    picture.save(tmp_path / f"a.{suffix}")
    for source in (picture, tmp_path / f"a.{suffix}"):
        np.testing.assert_array_equal(np.asarray(load(source)), np.dstack([levels] * 3))


@pytest.mark.parametrize(("mode", "key"), [("L", 0), ("RGB", (0, 0, 0)), ("P", 0), ("I;16", 0)])
def test_a_transparent_colour_becomes_white(tmp_path: Path, mode: str, key: Any) -> None:
    levels = np.zeros((10, 10), np.uint16 if mode == "I;16" else np.uint8)
    levels[:, 5:] = 7
    Image.fromarray(levels).convert(mode).save(tmp_path / "a.png", transparency=key)
    expected = np.where(levels == 0, 255, 0 if mode == "I;16" else 7)
    np.testing.assert_array_equal(np.asarray(load(tmp_path / "a.png"))[..., 0], expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (51, 204), (255, 0)])
def test_black_with_alpha_is_blended_with_white(mode: str, alpha: int, expected: int) -> None:
    assert colours(load(Image.new(mode, (8, 8), (0, 0, 0, alpha) if mode == "RGBA" else (0, alpha)))) == [(expected,) * 3]


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_what_pil_makes_of_it(tmp_path: Path, suffix: str, orientation: int) -> None:
    picture = noise(20, 10)
    picture.getexif()[0x0112] = orientation
    picture.save(tmp_path / f"a.{suffix}", exif=picture.getexif(), lossless=True)
    loaded = load(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(ImageOps.exif_transpose(picture)))
    assert ImageOps.exif_transpose(loaded).tobytes() == loaded.tobytes()  # nobody turns it twice


def test_orientation_6_turns_clockwise_also_in_odd_exif(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste(RED, (0, 0, 8, 8))
    entries = struct.pack(">HHHIHHHHI4sI", 2, 0x0112, 3, 1, 6, 0, 0x011A, 2, 4, b"abc", 0)  # orientation 6, resolution "abc"
    picture.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*" + struct.pack(">I", 8) + entries, subsampling=0)
    loaded = load(tmp_path / "a.jpg")
    assert loaded.size == (20, 40)
    np.testing.assert_allclose(loaded.getpixel((17, 2)), RED, atol=20)


def test_a_phone_photo_with_a_preview_is_one_picture(tmp_path: Path) -> None:
    noise(16, 16).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[noise(8, 8)])
    assert Image.open(tmp_path / "a.jpg").n_frames == 2  # type: ignore[attr-defined]
    assert load(tmp_path / "a.jpg").size == (16, 16)


@pytest.mark.parametrize("image", [
    ARRAY, ARRAY / 255, (ARRAY / 255).astype(np.float32), ARRAY.astype(np.uint16) * 257, np.asfortranarray(ARRAY),
    np.dstack([ARRAY, np.full((10, 8), 255, np.uint8)]), Image.fromarray(ARRAY), PLANES, PLANES[None] / 255,
    (PLANES / 255).half(), (PLANES / 255).requires_grad_(), PLANES.double() / 255 * (1 + 1e-6),
])  # fmt: skip
def test_arrays_and_tensors_keep_their_pixels(image: Any) -> None:
    loaded = load(image)
    np.testing.assert_array_equal(np.asarray(loaded), ARRAY)
    loaded.putpixel((0, 0), (9, 9, 9))
    assert ARRAY[0, 0, 0] == 0  # the input is not shared


@pytest.mark.parametrize("grey", [ARRAY[..., 1], ARRAY[..., 1:2], PLANES[1:2]])
def test_one_channel_is_grey(grey: Any) -> None:
    np.testing.assert_array_equal(np.asarray(load(grey)), np.dstack([ARRAY[..., 1]] * 3))


@pytest.mark.parametrize(("image", "said"), [
    (np.full((9, 9, 3), 200.0), "200"), (torch.linspace(-1, 1, 243).reshape(3, 9, 9), "from -1 to 1"),
    (np.full((9, 9), np.nan), "nan"), (np.zeros((9, 9, 3), np.int64), "int64"), (np.zeros((3, 64, 64), np.uint8), "(H, W, 3)"),
    (np.zeros((0, 0, 3)), "0 x 0 pixels"), (torch.zeros(2, 3, 9, 9), "batch of 1"), (torch.zeros(9, 9), "tensor (9, 9)"),
    (np.zeros((9, MAX_SIDE + 1), np.uint8), "16385 x 9"), (Image.new("I", (9, 9), 70000), "70000"),
    (Image.new("RGB", (1, 9)), "1 x 9"), (Image.new("F", (9, 9), 200), "0 to 1"), (None, "NoneType"),
    (b"bytes", "bytes"), (Image.open(io.BytesIO(encoded("JPEG")[:-900])), "cannot be read"),
    (Image.open(io.BytesIO(encoded("GIF", **FRAMES))), "3 frames"),
])  # fmt: skip
def test_unusable_values_are_refused_in_one_line(image: Any, said: str) -> None:
    with pytest.raises(ImageError) as caught:
        load(image)
    assert said in str(caught.value)
    assert re.fullmatch(".+: .+; .+", str(caught.value))  # a dot matches no newline


@pytest.mark.parametrize(("name", "content", "said"), [
    ("missing.png", None, "no such file"), ("empty.png", b"", "0 bytes"), ("text.png", b"hello\n" * 99, "cannot be read"),
    ("cut.jpg", encoded("JPEG")[:-900], "cannot be read"), ("cut.png", encoded("PNG")[:900], "cannot be read"),
    ("cut.webp", encoded("WEBP")[:900], "cannot be read"), ("cut.gif", encoded("GIF")[:900], "cannot be read"),
    ("bomb.png", png_header(20000, 20000), "too many pixels"), ("long.png", png_header(20000, 100), "20000 x 100 pixels"),
    ("dot.png", png_header(1, 1), "1 x 1 pixels"), ("none.png", png_header(64, 64), "cannot be read"),
    ("a.gif", encoded("GIF", **FRAMES), "3 frames"), ("a.webp", encoded("WEBP", **FRAMES), "3 frames"),
    ("a.png", encoded("PNG", **FRAMES), "3 frames"), ("a.tiff", encoded("TIFF", **FRAMES), "3 frames"),
    ("two\nlines.png", b"?", "two lines.png"), ("x" * 300, None, "too long"), (".", None, "is a folder"),
])  # fmt: skip
def test_unusable_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load(str(path))
    assert re.fullmatch(re.escape(str(path).replace("\n", " ")) + ": .+; .+", str(caught.value))
    assert said in str(caught.value)


@pytest.mark.parametrize(("original", "size", "policy", "box"), [
    ((100, 50), (64, 64), "crop", (25, 0, 75, 50)), ((50, 100), (64, 64), "crop", (0, 25, 50, 75)),
    ((90, 90), (64, 64), "crop", (0, 0, 90, 90)), ((101, 50), (64, 64), "crop", (25, 0, 75, 50)),
    ((100, 100), (32, 64), "crop", (0, 25, 100, 75)), ((100, 50), (64, 64), "pad", (0, 16, 64, 48)),
    ((50, 100), (64, 64), "pad", (16, 0, 48, 64)), ((90, 90), (64, 64), "pad", (0, 0, 64, 64)),
    ((8, 9000), (64, 64), "pad", (31, 0, 32, 64)), ((100, 50), (64, 32), "stretch", (0, 0, 32, 64)),
])  # fmt: skip
def test_boxes_and_undo(original: tuple[int, int], size: tuple[int, int], policy: Any, box: tuple[int, ...]) -> None:
    fitted, made = fit(Image.new("RGB", original, RED), size, policy)
    assert fitted.size == size[::-1]
    assert made == Fit(policy, original, size, box)  # type: ignore[arg-type]
    assert Fit.from_dict(json.loads(json.dumps(made.as_dict()))) == made
    back = undo(fitted, made)
    assert back.size == ((box[2] - box[0], box[3] - box[1]) if policy == "crop" else original)
    assert colours(fitted) == colours(back) == [RED]


def test_crop_shows_the_middle_and_pad_repeats_the_edges() -> None:
    picture = noise(96, 32)
    cropped, made = fit(picture, (32, 32), "crop")
    assert cropped.tobytes() == picture.crop((32, 0, 64, 32)).tobytes() == undo(cropped, made).tobytes()
    padded, made = fit(picture, (96, 96), "pad")
    np.testing.assert_array_equal(np.asarray(padded), np.pad(np.asarray(picture), ((32, 32), (0, 0), (0, 0)), mode="edge"))
    assert undo(padded, made).tobytes() == picture.tobytes()
    for policy in get_args(Policy):  # nothing is resampled where the size is right already
        fitted, made = fit(picture, (32, 96), policy)
        assert fitted.tobytes() == picture.tobytes() == undo(fitted, made).tobytes()


def test_unusable_fits_are_refused() -> None:
    with pytest.raises(ImageError, match="allowed are crop, pad, stretch"):
        fit(noise(16, 16), (8, 8), "zoom")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="0 x 64 pixels"):
        fit(noise(16, 16), (64, 0))
    with pytest.raises(ImageError, match="its fit made 8 x 16"):
        undo(noise(16, 16), fit(noise(16, 16), (16, 8))[1])


def test_tensors_and_back() -> None:
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(32, 8, 3))
    pixels = to_tensor(picture)
    assert (pixels.shape, pixels.dtype) == ((1, 3, 32, 8), torch.float32)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert [(p.size, p.tobytes()) for p in to_pil(pixels.expand(2, -1, -1, -1))] == [((8, 32), picture.tobytes())] * 2
    assert to_uint8(torch.tensor([-9, -0.996, 9]).reshape(1, 3, 1, 1)).tolist() == [[[[0, 1, 255]]]]  # -0.996 is level 0.51
    assert colours(load(torch.ones(3, 8, 8).bfloat16())) == [WHITE]


def test_strip_keeps_small_pixels_and_cuts_long_labels() -> None:
    small = Image.new("RGB", (64, 64), RED)
    small.paste("blue", (32, 0, 64, 64))
    row = strip([small, small])
    assert row.size == (2 * 256 + 12, 256 + 8)
    assert colours(row.crop((4, 4, 260, 260))) == [(0, 0, 255), RED]  # no mixed colours
    header = np.asarray(strip([small, small], ["m" * 200, ""]))[:-260]
    assert (header[:, :260] < 128).any()
    assert (header[:, 260:] == 255).all()  # the long label stays in its column
    assert strip([noise(300, 300), noise(600, 300)], height=100).size == (100 + 200 + 12, 108)
    with pytest.raises(ImageError, match="1 pictures and 2 labels"):
        strip([small], ["a", "b"])


def test_save_png_makes_folders_and_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "folder" / "a.png"
    save_png(noise(16, 16), path)
    assert load(path).tobytes() == noise(16, 16).tobytes()
    monkeypatch.setattr(Path, "replace", Mock(side_effect=OSError("No space left on device")))
    with pytest.raises(ImageError, match=r"a\.png: cannot be written \(No space left.*; choose a writable folder"):
        save_png(noise(9, 9), path)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    assert load(path).size == (16, 16)  # the earlier picture is still whole
    with pytest.raises(ImageError, match="cannot be written"):
        save_png(noise(16, 16), path / "below a file" / "b.png")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the shared photographs are not here")
@pytest.mark.parametrize("name", ["hat.jpg", "peach.jpg"])
def test_real_photographs_come_back_nearly_whole(name: str) -> None:
    picture = load(PHOTOS / name)
    back = undo(*fit(picture, (512, 512), "pad"))
    assert np.abs(np.asarray(back).astype(float) - np.asarray(picture)).mean() < 2
