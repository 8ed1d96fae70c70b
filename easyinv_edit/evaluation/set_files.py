"""What the readers of data sets share: their refusals, their texts and the sizes of their pictures."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from PIL import Image
from pydantic import ValidationError

from easyinv_edit.choices import nearest, plain
from easyinv_edit.errors import EasyInvWarning, ImageError, InputError

OnMismatch: TypeAlias = Literal["warn", "raise", "ignore"]
"""What to do where a published set has not the number of pictures it should have."""

TOLD = 10
"""Problems told one by one; of further ones only the number."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def refuse(problems: Sequence[str]) -> None:
    """Raise InputError with the first `TOLD` problems, a line each, and how many more there are; do nothing for none."""
    if problems:
        more = [f"and {len(problems) - TOLD} more"] if len(problems) > TOLD else []
        raise InputError("\n".join([*problems[:TOLD], *more]))


def mismatch(text: str, then: OnMismatch) -> None:
    """Say that a set has not the number of pictures it should have: as EasyInvWarning, as InputError, or not at all."""
    if then == "raise":
        raise InputError(text)
    if then == "warn":
        warnings.warn(text, EasyInvWarning, stacklevel=3)


def check_mismatch(then: str) -> None:
    """Raise InputError where `then` is none of `OnMismatch`."""
    allowed = get_args(OnMismatch)
    if then not in allowed:
        raise InputError(f"on_mismatch is {then!r}; choose {', '.join(allowed)}{nearest(then, allowed)}")


def check_count(count: int | None) -> None:
    """Raise InputError for a number of pictures below 1; None is all of them."""
    if count is not None and count < 1:
        raise InputError(f"count is {count}; it must be at least 1")


def listed(path: Path) -> list[Path]:
    """What a folder holds. Raises InputError where it may not be read."""
    try:
        return list(path.iterdir())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); give a folder that you may read") from error


def read_text(path: Path) -> str:
    """A UTF-8 file's text without its byte order mark. Raises InputError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; give the path of an existing one") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); give a file that you may read") from error


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises InputError where it cannot be read, naming the line and column where it breaks off."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise InputError(f"{where}: is no JSON ({error.msg}); unpack the file again, it may be cut short") from error
    except RecursionError as error:
        raise InputError(f"{path}: is no JSON of a data set (nested too deeply); give the set's own file") from error


def invalid(where: str, error: ValidationError) -> list[str]:
    """One line for each field that pydantic refused; `where` names the file and entry."""
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"])
        wrong = "is missing" if item["type"] == "missing" else plain(item)
        lines.setdefault(str(item["loc"][:1]), f"{where}: {place}: {wrong}" if place else f"{where}: {wrong}")
    return list(lines.values())


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) from a picture file's header alone, not turned upright. Raises ImageError where there is none."""
    try:
        with Image.open(path) as opened:
            return opened.size
    except FileNotFoundError as error:
        raise ImageError(f"{path}: there is no such file; unpack the whole set, or take it off the list") from error
    except Exception as error:  # PIL's parsers raise nearly every type on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: cannot be read as a picture ({reason}); give a whole picture file") from error


def picture_sizes(files: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """(width, height) of every file, in their order. Raises InputError naming those that cannot be read."""
    sizes, problems = {}, []
    for file in files:
        try:
            sizes[file] = picture_size(file)
        except ImageError as error:
            problems.append(str(error))
    refuse(problems)
    return sizes
