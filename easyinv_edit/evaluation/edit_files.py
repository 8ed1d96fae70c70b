"""Edits with a rendered right answer as files: pictures, truths, masks and prompts, for other programs or a look."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image
from torch import Tensor

from easyinv_edit import images
from easyinv_edit.evaluation.datasets import CAPTIONS, COLUMNS, TabletopEdit
from easyinv_edit.result import write_text


def write(items: Iterable[TabletopEdit], folder: Path) -> Iterator[str]:
    """Write each item and yield its line: the picture's path and both prompts.

    The pictures and captions.csv lie in the folder itself, as `bench edits --folder` reads them; true results, masks (white is
    inside, before and after the edit) and pictures of the look that is asked for in its folders truths, masks and styles.
    """
    rows = []
    for item in items:
        name = f"{item.name.replace(' ', '-')}.png"
        for path, picture in _pictures(item, name):
            images.save_png(picture, folder / path)
        rows.append((name, item.prompt, item.target_prompt))
        yield f"{folder / name}: {item.prompt} -> {item.target_prompt}"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    write_text(folder / CAPTIONS, text.getvalue())


def _pictures(item: TabletopEdit, name: str) -> Iterator[tuple[Path, Image.Image]]:
    yield Path(name), item.picture
    if item.truth is not None:
        yield Path("truths", name), item.truth
    for when, mask in zip(("before", "after"), item.masks or (), strict=False):
        yield Path("masks", f"{Path(name).stem}.{when}.png"), _drawn(mask)
    if item.style is not None:
        yield Path("styles", name), item.style


def _drawn(mask: Tensor) -> Image.Image:
    return images.to_pil(mask.expand(1, 3, *mask.shape) * 2 - 1)[0]
