"""Pictures in and out: every mode and every failure with real files, and the closed forms of fit and undo."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from easyinv_edit.errors import ImageError
from easyinv_edit.images import MAX_SIDE, Fit, fit, load, save_png, strip, to_pil, to_tensor, to_uint8, undo

PHOTOS = Path(__file__).parents[2] / "shared" / "photos"
RED, GREY = (255, 0, 0), (102, 102, 102)


def noise(width: int, height: int) -> Image.Image:
    """A picture in which no two places look alike."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def colours(picture: Image.Image) -> list[tuple[int, ...]]:
    """The distinct colours of an RGB picture."""
    assert picture.mode == "RGB"
    return [tuple(int(v) for v in row) for row in np.unique(np.asarray(picture).reshape(-1, 3), axis=0)]


def chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def encoded(format: str, **options: Any) -> bytes:
    """A noisy picture as a file's content."""
    buffer = io.BytesIO()
    noise(64, 48).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("mode", "suffix", "colour"), [
    ("RGB", "png", RED), ("RGB", "webp", RED), ("RGBA", "png", RED), ("P", "png", RED), ("PA", "tiff", RED), ("CMYK", "tiff", RED),
    ("HSV", None, RED), ("L", "png", GREY), ("LA", "png", GREY), ("1", "png", (255, 255, 255)), ("P", "gif", RED), ("L", "jpg", GREY),
])  # fmt: skip
def test_a_pure_colour_survives_every_mode(tmp_path: Path, mode: str, suffix: str | None, colour: tuple[int, ...]) -> None:
    picture = Image.new("RGB", (12, 10), colour).convert("L" if mode[0] == "L" else "RGB").convert(mode.replace("PA", "P"))
    picture = picture.convert("PA") if mode == "PA" else picture
    source: Any = picture
    if suffix is not None and mode != "PA":  # no format PIL writes holds PA
        source = tmp_path / f"picture.{suffix}"
        picture.save(source, **({"lossless": True} if suffix == "webp" else {}))
    loaded = load(source)
    assert loaded.size == (12, 10)
    assert colours(loaded) == [colour]


@pytest.mark.parametrize(("mode", "value"), [("I;16", 102 * 257), ("I", 102 * 257), ("I;16B", 102 * 257), ("F", 0.4)])
@pytest.mark.parametrize("suffix", [None, "tiff"])
def test_deep_pictures_are_scaled_not_clipped(tmp_path: Path, mode: str, value: float, suffix: str | None) -> None:
    for level, expected in ((value, GREY), (65535 if mode[0] == "I" else 1.0, (255, 255, 255))):
        dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "i4", "F": "f4"}[mode]
        picture = Image.fromarray(np.full((9, 9), level, dtype=dtype))
        assert picture.mode == mode
        if suffix:
            picture.save(tmp_path / "deep.tiff")
        assert colours(load(tmp_path / "deep.tiff" if suffix else picture)) == [expected]


def test_sixteen_bit_png(tmp_path: Path) -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(load(tmp_path / "a.png"))[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L", "RGB", "I;16"])
def test_transparent_pixels_become_white(tmp_path: Path, mode: str) -> None:
    """The picture is black; its left half is transparent. L, RGB, P and I;16 say so by a colour key."""
    base = np.full((10, 10), 7)
    base[:, :5] = 0
    if mode in ("RGBA", "LA", "PA"):
        source = Image.new("LA" if mode == "LA" else "RGBA", (10, 10), 0)
        source.putalpha(Image.fromarray((base > 0).astype(np.uint8) * 255))
        source = load_pa(source) if mode == "PA" else source
    elif mode in ("L", "I;16"):
        source = Image.fromarray(base.astype(np.uint8 if mode == "L" else np.uint16))
    else:
        source = Image.fromarray(np.stack([base] * 3, axis=-1).astype(np.uint8)).convert(mode)
    key = {"RGB": (0, 0, 0), "P": source.getpixel((0, 0)), "L": 0, "I;16": 0}.get(mode)
    if mode != "PA":  # no format PIL writes holds PA
        source.save(tmp_path / "a.png", **({} if key is None else {"transparency": key}))
    pixels = np.asarray(load(source if mode == "PA" else tmp_path / "a.png"))
    assert (pixels[:, :5] == 255).all()
    assert (pixels[:, 5:] <= 7).all()


def load_pa(rgba: Image.Image) -> Image.Image:
    """A black PA picture with the alpha of `rgba`."""
    picture = Image.new("P", rgba.size, 0)
    picture.putpalette([0, 0, 0])
    picture = picture.convert("PA")
    picture.putalpha(rgba.getchannel("A"))
    return picture


def test_half_transparency_is_blended_with_white() -> None:
    assert colours(load(Image.new("RGBA", (8, 8), (0, 0, 0, 51)))) == [(204, 204, 204)]


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_what_pil_makes_of_it(tmp_path: Path, suffix: str, orientation: int) -> None:
    picture, exif = noise(20, 10), Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    loaded = load(tmp_path / f"a.{suffix}")
    picture.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(ImageOps.exif_transpose(picture)))
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(loaded)), np.asarray(loaded))  # not turned twice


def test_exif_orientation_6_turns_clockwise(tmp_path: Path) -> None:
    picture, exif = Image.new("RGB", (40, 20), "white"), Image.Exif()
    picture.paste(RED, (0, 0, 8, 8))
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    loaded = load(tmp_path / "a.jpg")
    assert loaded.size == (20, 40)
    red, green, _ = loaded.getpixel((17, 2))  # type: ignore[misc]
    assert red > 240
    assert green < 15


def test_unreadable_exif_is_ignored(tmp_path: Path) -> None:
    noise(16, 16).save(tmp_path / "a.jpg", exif=b"Exif\0\0nonsense")
    assert load(tmp_path / "a.jpg").size == (16, 16)


def test_a_phone_photo_with_a_preview_is_one_picture(tmp_path: Path) -> None:
    noise(16, 16).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[noise(8, 8)])
    with Image.open(tmp_path / "a.jpg") as opened:
        assert (opened.format, getattr(opened, "n_frames", 1)) == ("MPO", 2)
    assert load(tmp_path / "a.jpg").size == (16, 16)


ARRAY = np.arange(240, dtype=np.uint8).reshape(10, 8, 3)


@pytest.mark.parametrize("make", [
    lambda: ARRAY, lambda: ARRAY / 255, lambda: (ARRAY / 255).astype(np.float32), lambda: ARRAY.astype(np.uint16) * 257,
    lambda: np.asfortranarray(ARRAY), lambda: np.dstack([ARRAY, np.full((10, 8), 255, np.uint8)]), lambda: Image.fromarray(ARRAY),
    lambda: torch.from_numpy(ARRAY).permute(2, 0, 1), lambda: torch.from_numpy(ARRAY).permute(2, 0, 1)[None] / 255,
    lambda: (torch.from_numpy(ARRAY).permute(2, 0, 1) / 255).requires_grad_(),
    lambda: torch.from_numpy(ARRAY).permute(2, 0, 1).double() / 255 * (1 + 1e-6),
])  # fmt: skip
def test_arrays_and_tensors_keep_their_pixels(make: Callable[[], Any]) -> None:
    loaded = load(make())
    np.testing.assert_array_equal(np.asarray(loaded), ARRAY)
    loaded.putpixel((0, 0), (9, 9, 9))
    assert ARRAY[0, 0, 0] == 0  # the input is not shared


@pytest.mark.parametrize("grey", [ARRAY[..., 1], ARRAY[..., 1:2], torch.from_numpy(ARRAY[None, ..., 1] / 255).bfloat16()])
def test_one_channel_is_grey(grey: Any) -> None:
    pixels = np.asarray(load(grey)).astype(int)
    assert np.abs(pixels - ARRAY[..., 1:2]).max() <= (1 if isinstance(grey, torch.Tensor) else 0)


@pytest.mark.parametrize(("image", "said"), [
    (np.full((9, 9, 3), 200.0), "200"), (torch.linspace(-1, 1, 243).reshape(3, 9, 9), "from -1 to 1"),
    (np.full((9, 9), np.nan), "nan"), (np.zeros((9, 9, 3), np.int64), "int64"), (np.zeros((3, 64, 64), np.uint8), "(H, W, 3)"),
    (np.zeros((0, 0, 3)), "0 x 0 pixels"), (torch.zeros(2, 3, 9, 9), "batch of 1"), (torch.zeros(9, 9), "tensor (9, 9)"),
    (np.zeros((9, MAX_SIDE + 1), np.uint8), "16385 x 9"), (Image.new("I", (9, 9), 70000), "70000"), (Image.new("RGB", (1, 9)), "1 x 9"),
    (Image.new("F", (9, 9), 200), "0 to 1"), (Image.new("LAB", (9, 9)), "LAB"), (None, "NoneType"), (b"bytes", "bytes"),
])  # fmt: skip
def test_unusable_values_are_refused_in_one_line(image: Any, said: str) -> None:
    with pytest.raises(ImageError) as caught:
        load(image)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "blue"), Image.new("RGB", (64, 48), "red")]}


@pytest.mark.parametrize(("name", "content", "said"), [
    ("missing.png", None, "no such file"), ("empty.png", b"", "0 bytes"), ("text.png", b"hello\n" * 99, "cannot be read"),
    ("cut.jpg", encoded("JPEG")[:-900], "cannot be read"), ("cut.png", encoded("PNG")[:900], "cannot be read"),
    ("cut.webp", encoded("WEBP")[:900], "cannot be read"), ("cut.gif", encoded("GIF")[:900], "cannot be read"),
    ("bomb.png", png_header(20000, 20000), "too many pixels"), ("long.png", png_header(20000, 100), "20000 x 100 pixels"),
    ("dot.png", png_header(1, 1), "1 x 1 pixels"), ("none.png", png_header(64, 64), "cannot be read"),
    ("a.gif", encoded("GIF", **FRAMES), "3 frames"), ("a.webp", encoded("WEBP", **FRAMES), "3 frames"),
    ("a.png", encoded("PNG", **FRAMES), "3 frames"), ("a.tiff", encoded("TIFF", **FRAMES), "3 frames"),
    ("two\nlines.png", b"?", "two lines.png"), ("x" * 300, None, "too long"), (".", None, "is a folder"), ("nul\0.png", None, "null"),
])  # fmt: skip
def test_unusable_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load(str(path))
    where, _, rest = str(caught.value).partition(": ")
    assert where == str(path).replace("\n", " ")
    assert said in str(caught.value)
    assert "; " in rest
    assert "\n" not in rest


def test_a_pil_picture_opened_by_the_user_is_checked_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG")[:-900])
    with Image.open(tmp_path / "a.jpg") as opened, pytest.raises(ImageError, match=r"a\.jpg: cannot be read"):
        load(opened)


@pytest.mark.parametrize(("original", "size", "policy", "box"), [
    ((100, 50), (64, 64), "crop", (25, 0, 75, 50)), ((50, 100), (64, 64), "crop", (0, 25, 50, 75)),
    ((90, 90), (64, 64), "crop", (0, 0, 90, 90)), ((100, 100), (32, 64), "crop", (0, 25, 100, 75)),
    ((101, 50), (64, 64), "crop", (25, 0, 75, 50)), ((100, 50), (64, 64), "pad", (0, 16, 64, 48)),
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
    pixels, inner = np.asarray(padded), np.asarray(picture)
    np.testing.assert_array_equal(pixels[:32], np.broadcast_to(inner[:1], (32, 96, 3)))
    np.testing.assert_array_equal(pixels[64:], np.broadcast_to(inner[-1:], (32, 96, 3)))
    assert undo(padded, made).tobytes() == picture.tobytes()


@pytest.mark.parametrize("policy", ["crop", "pad", "stretch"])
def test_the_right_size_is_not_resampled(policy: Any) -> None:
    fitted, made = fit(noise(40, 24), (24, 40), policy)
    assert fitted.tobytes() == noise(40, 24).tobytes() == undo(fitted, made).tobytes()


def test_unusable_fits_are_refused() -> None:
    with pytest.raises(ImageError, match="allowed are crop, pad, stretch"):
        fit(noise(16, 16), (8, 8), "zoom")  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="0 x 64 pixels"):
        fit(noise(16, 16), (64, 0))
    with pytest.raises(ImageError, match="its fit made 8 x 16"):
        undo(noise(16, 16), fit(noise(16, 16), (16, 8))[1])


def test_tensors_and_back() -> None:
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    pixels = to_tensor(picture)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert [p.tobytes() for p in to_pil(pixels.expand(2, -1, -1, -1))] == [picture.tobytes()] * 2
    levels = to_uint8(torch.tensor([-9.0, 0.5 / 127.5 - 1 + 1e-4, 9.0]).reshape(1, 3, 1, 1))
    assert levels.tolist() == [[[[0, 1, 255]]]]
    tall = torch.zeros(1, 3, 16, 8)
    assert to_pil(tall)[0].size == (8, 16)


def test_strip_keeps_small_pixels_and_cuts_long_labels() -> None:
    small = Image.new("RGB", (64, 64), RED)
    small.paste("blue", (32, 0, 64, 64))
    row = np.asarray(strip([small, small]))
    assert row.shape == (256 + 8, 2 * 256 + 12, 3)
    assert {tuple(c) for c in row[4:-4, 4:260].reshape(-1, 3).tolist()} == {RED, (0, 0, 255)}  # no mixed colours
    labelled = np.asarray(strip([small, small], ["m" * 200, ""]))
    header = labelled[: labelled.shape[0] - 260]
    assert (header[:, :260] < 128).any()
    assert (header[:, 260:] == 255).all()  # the long label stays in its column
    assert strip([noise(300, 300), noise(600, 300)], height=100).size == (100 + 200 + 12, 108)
    for pictures, labels in (([], None), ([small], ["a", "b"])):
        with pytest.raises(ImageError, match="one label for each"):
            strip(pictures, labels)


def test_save_png_makes_folders_and_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "folder" / "a.png"
    save_png(noise(16, 16), path)
    before = path.read_bytes()
    assert load(path).tobytes() == noise(16, 16).tobytes()

    def full_disk(_self: Image.Image, file: Path, **_options: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(ImageError, match=r"a\.png: cannot be written \(No space left.*; choose a writable folder"):
        save_png(noise(16, 16), path)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    assert path.read_bytes() == before
    with pytest.raises(ImageError, match="cannot be written"):
        save_png(noise(16, 16), path / "below a file" / "b.png")


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the shared photographs are not here")
def test_real_photographs_come_back_nearly_whole() -> None:
    photos = [p for p in sorted(PHOTOS.iterdir()) if p.suffix == ".jpg"]
    assert photos
    for path in photos:
        picture = load(path)
        fitted, made = fit(picture, (512, 512), "pad")
        back = undo(to_pil(to_tensor(fitted))[0], made)
        assert back.size == picture.size
        assert np.abs(np.asarray(back).astype(float) - np.asarray(picture)).mean() < 12
