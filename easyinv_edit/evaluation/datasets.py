"""Pictures to measure on: rendered tabletop scenes, or a folder of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from easyinv_edit import images
from easyinv_edit.errors import InputError
from easyinv_edit.tabletop.captions import caption
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import random_scene

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Item:
    """One picture. name: unique in its set; prompt: what it shows, maybe empty; group: a part of the set that is also reported
    apart, or empty."""

    name: str
    picture: Image.Image
    prompt: str = ""
    group: str = ""


def scenes(first_seed: int, count: int, size: int) -> list[Item]:
    """Tabletop scenes by seed with their full captions; those on a white background are the group "white"."""
    made = [random_scene(first_seed + i) for i in range(count)]
    pictures = [images.to_pil(p[None] * 2 - 1)[0] for p in render(made, size)[0]]
    groups = ["white" if scene.background == "white" else "" for scene in made]
    rows = zip(made, pictures, groups, strict=True)
    return [Item(f"scene-{first_seed + i}", p, caption(scene), group) for i, (scene, p, group) in enumerate(rows)]


def folder(path: Path, count: int | None = None) -> list[Item]:
    """The pictures of a folder by name, without prompts; the first `count` of them. Raises InputError where there are none."""
    if not path.is_dir():
        raise InputError(f"{path}: is no folder; give one that holds pictures")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)[:count]
    if not found:
        raise InputError(f"{path}: holds no pictures ({', '.join(PICTURES)})")
    return [Item(file.name, images.load(file)) for file in found]


def chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    """The items in groups of `size`, the last one maybe smaller."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
