"""Pictures and texts of a report, read from a folder of which anything may be missing or torn."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from easyinv_edit import images
from easyinv_edit.errors import ImageError
from easyinv_edit.evaluation.report_page import Picture, Row

PNG = b"\x89PNG\r\n\x1a\n"
KEPT, FIGURE_KEPT = 2**16, 2**20
"""PNG files of up to so many bytes are embedded as they are; others as JPEG."""
FIGURE_SIDE = 2000


def figures_of(folder: Path) -> Iterable[Picture]:
    """The run's figures by name."""
    for file in sorted((folder / "figures").glob("*.png")):
        title = file.stem.replace("-", " ").replace("_", " ")
        yield picture_of(folder, f"figures/{file.name}", title, f"figure: {title}", FIGURE_SIDE, FIGURE_KEPT)


def picture_of(folder: Path, file: str, label: str, alt: str, side: int, kept: int = KEPT) -> Picture:
    """A picture of the folder: a PNG file as it is, anything larger or heavier than `kept` as a JPEG of at most `side` pixels.

    One that is elsewhere counts as missing, for a page goes further than its folder.
    """
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        return Picture(label, alt, file, lack="is outside of the folder")
    try:
        content, picture = (folder / path).read_bytes(), images.load(folder / path)
    except ImageError:
        return Picture(label, alt, file, lack="cannot be read")
    except (OSError, ValueError):  # the latter for paths that no file can have
        return Picture(label, alt, file, lack="is missing")
    kind = "png"
    if max(picture.size) > side or len(content) > kept or not content.startswith(PNG):
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        content, kind = _jpeg(picture), "jpeg"
    data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(label, alt, file, data=data, size=picture.size)


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def text_of(path: Path) -> str | None:
    """A file's text, None where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def parsed_of(text: str) -> dict[str, Any]:
    """A JSON object, empty where the text is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def content_of(path: Path) -> dict[str, Any]:
    """A JSON file's mapping, empty where it is none."""
    return parsed_of(text_of(path) or "")


def block_of(path: Path) -> str | None:
    """What a collapsible block shows: JSON indented, anything else as it is."""
    text, content = text_of(path), content_of(path)
    return pretty(content) if content else text


def pretty(content: Row) -> str:
    """JSON for people."""
    return json.dumps(content, indent=2, ensure_ascii=False)


def facts_of(given: Row) -> tuple[tuple[str, str], ...]:
    """Labels and texts of what is known."""
    texts = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in given.items()}
    return tuple((key, str(value)) for key, value in texts.items() if value not in (None, ""))


def moment_of(value: Any) -> str:
    """A time of environment.json for people."""
    return str(value or "").replace("T", " ").replace("+00:00", " UTC")


def number_of(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON knows whole numbers of any length
        return None


def list_of(value: Any) -> list[Any]:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def dicts_of(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list, without whatever else is in it."""
    return [each for each in list_of(value) if isinstance(each, dict)]
