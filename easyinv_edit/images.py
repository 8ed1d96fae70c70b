"""Pictures in and out: a file, PIL picture, array or tensor becomes one plain RGB picture, then the model's pixels, and back.

`load` reads, `fit` brings a picture to the model's size and remembers how, `undo` takes a result back to the original's
pixels. Sizes of PIL pictures and boxes are (width, height) and (left, top, right, bottom) as in PIL; sizes asked of the
model are (height, width) as in diffusers. Colour profiles are not applied, as in diffusers' own loaders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from easyinv_edit.conditioning import Framing
from easyinv_edit.errors import ImageError

ImageInput: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[Any] | Tensor
Policy: TypeAlias = Literal["crop", "pad", "stretch"]

MIN_SIDE, MAX_SIDE = 8, 16384
SIZES = f"allowed are sides of {MIN_SIDE} to {MAX_SIDE} pixels"

# Formats whose further frames belong to the same still picture: a phone's preview and gain map, Photoshop's layers.
STILLS = ("MPO", "PSD")
# What makes a picture upright, by EXIF orientation. PIL's `exif_transpose` also rewrites the EXIF block, and fails on odd ones.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load(image: ImageInput) -> Image.Image:
    """Any usable image as a new upright RGB picture without metadata; what is transparent becomes white.

    image: a file's path; a PIL picture of any mode (I and I;16 hold 0..65535, F holds 0..1); an array (H, W) or
    (H, W, 1|3|4), or a tensor (1|3|4, H, W) or (1, 1|3|4, H, W), of uint8, uint16 or floats in 0..1. Raises ImageError for
    anything else, for animations, and for sides outside MIN_SIDE..MAX_SIDE, which are refused before a pixel is decoded.
    """
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, f"array {image.shape}")
    if isinstance(image, Image.Image):
        where = str(getattr(image, "filename", "") or f"PIL picture of mode {image.mode}")
        with _one_kind_of_error(where):
            return _from_picture(image, where)
    if isinstance(image, str | os.PathLike):
        return _from_file(Path(image))
    raise _refusal(f"image of type {type(image).__name__}", "is no picture", "give a path, PIL picture, numpy array or tensor")


def _refusal(where: object, wrong: str, remedy: str) -> ImageError:
    """The one-line error `where: wrong; remedy`, also where a path or PIL's message has several lines."""
    return ImageError(" ".join(f"{where}: {wrong}; {remedy}".splitlines()))


@contextmanager
def _one_kind_of_error(where: object) -> Iterator[None]:
    """Turn whatever PIL raises inside into ImageError. Its decoders raise nearly every type on damaged files."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refusal(where, f"has too many pixels ({error})", f"{SIZES} within that limit, so make it smaller") from error
    except Exception as error:
        wrong = f"cannot be read as a picture ({str(error) or type(error).__name__})"
        raise _refusal(where, wrong, "give a whole, readable picture file such as PNG or JPEG") from error


def _from_file(path: Path) -> Image.Image:
    """`load` for a path."""
    with _one_kind_of_error(path):
        if path.is_dir():
            raise _refusal(path, "is a folder", "give one picture file")
        if not path.is_file():
            raise _refusal(path, "there is no such file", "give the path of an existing picture")
        if path.stat().st_size == 0:
            raise _refusal(path, "is empty (0 bytes)", "give a whole picture file such as PNG or JPEG")
        with Image.open(path) as opened:
            return _from_picture(opened, str(path))


def _from_picture(image: Image.Image, where: str) -> Image.Image:
    """`load` for a PIL picture, perhaps not decoded yet; `where` names it in errors."""
    _check_sides(image.size, where)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and getattr(image, "format", None) not in STILLS:
        raise _refusal(where, f"has {frames} frames", "only still pictures can be edited, so save one frame as PNG first")
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation)  # after `load`: PIL turns TIFF files itself
    rgb = _rgb(image, where)
    return rgb.transpose(TURNS[orientation]) if orientation in TURNS else rgb


def _rgb(image: Image.Image, where: str) -> Image.Image:
    """A decoded picture of any mode as a new RGB one over white, its metadata dropped."""
    if image.mode == "F" or image.mode.startswith("I"):
        # PIL itself clips these modes at 255, which turns most of a 16-bit picture white.
        levels = _eight_bits(np.asarray(image), 1 if image.mode == "F" else 65535, where)
        key = image.info.get("transparency")
        levels = levels if key is None else np.where(np.asarray(image) == key, np.uint8(255), levels)
        image = Image.fromarray(levels)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    rgb.info = {}  # a kept orientation or colour profile would be applied again by whoever reads the result
    return rgb


def _from_tensor(tensor: Tensor) -> Image.Image:
    """`load` for a tensor (1|3|4, H, W) or (1, 1|3|4, H, W)."""
    where = f"tensor {tuple(tensor.shape)}"
    planes = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
    if planes.ndim != 3 or planes.shape[0] not in (1, 3, 4):
        raise _refusal(where, "is no picture of this shape", "give (1|3|4, H, W) or a batch of 1")
    planes = planes.detach().cpu()
    planes = planes.float() if planes.is_floating_point() else planes  # numpy knows no bfloat16
    return _from_array(planes.permute(1, 2, 0).numpy(), where)


def _from_array(values: NDArray[Any], where: str) -> Image.Image:
    """`load` for an array (H, W) or (H, W, 1|3|4)."""
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise _refusal(where, "is no picture of this shape", "give (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    _check_sides((values.shape[1], values.shape[0]), where)
    tops = {"u1": 255, "u2": 65535, "f2": 1, "f4": 1, "f8": 1}
    top = tops.get(f"{values.dtype.kind}{values.dtype.itemsize}")
    if top is None:
        raise _refusal(where, f"holds {values.dtype}", "give uint8, uint16, or floats in 0..1")
    levels = _eight_bits(values, top, where)
    return _rgb(Image.fromarray(levels[..., 0] if levels.shape[2:] == (1,) else levels), where)


def _eight_bits(values: NDArray[Any], top: int, where: str) -> NDArray[np.uint8]:
    """Values in 0..top scaled to 0..255 and rounded, any shape. Raises ImageError for values outside that range."""
    low, high = float(values.min()), float(values.max())
    slack = 1e-3 if top == 1 else 0  # rounding errors of floats; a quarter of an 8-bit step
    if not (low >= -slack and high <= top + slack):  # written so that NaN is refused
        raise _refusal(where, f"holds values from {low:.6g} to {high:.6g}", f"allowed are 0 to {top}, so rescale them")
    if top == 255:
        return values.astype(np.uint8, copy=False)
    levels: NDArray[np.uint8] = np.rint(np.clip(values.astype(np.float32) * np.float32(255 / top), 0, 255)).astype(np.uint8)
    return levels


def _check_sides(size: tuple[int, int], where: object) -> None:
    """Raise ImageError where a side of (width, height) is too small to hold anything or too large to be decoded."""
    if not (min(size) >= MIN_SIDE and max(size) <= MAX_SIDE):
        raise _refusal(where, f"is {size[0]} x {size[1]} pixels", f"{SIZES}, so resize it first")


@dataclass(frozen=True)
class Fit:
    """How a picture was brought to the model's size; enough to take a result back.

    original: (width, height) of the upright picture; size: (height, width) of the model's picture; box: for crop the part of
    the original that was used, for pad and stretch the part of the model's picture that holds the original.
    """

    policy: Policy
    original: tuple[int, int]
    size: tuple[int, int]
    box: tuple[int, int, int, int]

    @property
    def framing(self) -> Framing:
        """The same as SDXL is told it: a crop begins where it does in the picture once that is scaled."""
        width, height = self.original
        left, top, right, bottom = self.box if self.policy == "crop" else (0, 0, *self.size[::-1])
        scale = self.size[0] / (bottom - top), self.size[1] / (right - left)
        return Framing((height, width), (round(top * scale[0]), round(left * scale[1])), self.size)

    def as_dict(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return {name: value if isinstance(value, str) else list(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Fit:
        """The inverse of `as_dict`, also after a trip through JSON."""
        left, top, right, bottom = content["box"]
        (width, height), (rows, columns) = content["original"], content["size"]
        return cls(content["policy"], (width, height), (rows, columns), (left, top, right, bottom))


def fit(picture: Image.Image, size: tuple[int, int], policy: Policy = "crop") -> tuple[Image.Image, Fit]:
    """Bring an RGB picture to `size` (height, width); pixels stay identical where it already has that size.

    crop: the largest centred part of that aspect ratio; pad: the whole picture, centred, its edge pixels repeated outwards;
    stretch: the whole picture, distorted. Raises ImageError for an unknown policy or a size below MIN_SIDE or above MAX_SIDE.
    """
    height, width = size
    _check_sides((width, height), "size asked of the model")
    if policy == "crop":
        box = _centred(picture.size, _largest((width, height), picture.size))
        fitted = _resize(picture.crop(box), (width, height))
    elif policy == "pad":
        inner = _largest(picture.size, (width, height))
        box = _centred((width, height), inner)
        fitted = _with_border(_resize(picture, inner), (width, height), box)
    elif policy == "stretch":
        box = (0, 0, width, height)
        fitted = _resize(picture, (width, height))
    else:
        raise _refusal(f"fit policy {policy!r}", "is unknown", f"allowed are {', '.join(get_args(Policy))}")
    return fitted, Fit(policy, picture.size, (height, width), box)


def undo(picture: Image.Image, fit: Fit) -> Image.Image:
    """A picture of the model's size back in the original's pixels.

    pad and stretch return the original's size, crop the size of the part that was used. Raises ImageError where the picture
    has not the size that `fit` made.
    """
    if picture.size != fit.size[::-1]:
        wrong = f"is {picture.size[0]} x {picture.size[1]} pixels"
        raise _refusal("picture to take back", wrong, f"its fit made {fit.size[1]} x {fit.size[0]}, so give one of that size")
    left, top, right, bottom = fit.box
    if fit.policy == "crop":
        return _resize(picture, (right - left, bottom - top))
    return _resize(picture.crop(fit.box), fit.original)


def _resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A new picture of size (width, height); PIL copies without resampling where that is its size already."""
    return picture.resize(size, Image.Resampling.LANCZOS)


def _largest(shape: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) with the aspect ratio of `shape` that fits into `room`, whole pixels, at least 1."""
    (width, height), (room_width, room_height) = shape, room
    if width * room_height > height * room_width:
        return room_width, max(1, round(room_width * height / width))
    return max(1, round(room_height * width / height)), room_height


def _centred(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of `inner` in the middle of `outer`; an odd pixel goes right or below."""
    left, top = (outer[0] - inner[0]) // 2, (outer[1] - inner[1]) // 2
    return left, top, left + inner[0], top + inner[1]


def _with_border(picture: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """An RGB picture put at `box` of a picture of `size` (width, height), its edge pixels repeated outwards.

    A border of one colour would be a flat region, which inversion reconstructs worst; repeated edges keep some texture.
    """
    left, top, right, bottom = box
    around = ((top, size[1] - bottom), (left, size[0] - right), (0, 0))
    return Image.fromarray(np.pad(np.asarray(picture), around, mode="edge"))


def to_tensor(picture: Image.Image) -> Tensor:
    """The model's pixels of a picture: (1, 3, H, W), float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).contiguous()


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels (rows, 3, H, W) in [-1, 1] as uint8 (rows, H, W, 3), rounded; values outside are clamped."""
    levels = (pixels.detach().float() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as values in [0, 1], clamped; same shape, dtype and device. What metrics compare."""
    return (pixels / 2 + 0.5).clamp(0, 1)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Pixels (rows, 3, H, W) in [-1, 1] as one RGB picture per row; the exact inverse of `to_tensor`."""
    return [Image.fromarray(row) for row in to_uint8(pixels).cpu().numpy()]


def save_png(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write the picture as PNG; the file appears whole or not at all, its folders are made. Raises ImageError if impossible."""
    target = Path(path)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, format="PNG")
        partial.replace(target)
    except OSError as error:
        raise _refusal(target, f"cannot be written ({error})", "choose a writable folder") from error
    finally:
        with suppress(OSError):  # where the parent is no folder, even removing nothing fails
            partial.unlink()
