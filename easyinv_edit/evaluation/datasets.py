"""Pictures to measure on, and edits with both prompts: rendered tabletop scenes, or a folder of the user's own.

The published sets are read by `coco` and `pie_bench`. An item of a set on disk holds a path, and its picture is read anew at
each access: a set of thousands does not sit in memory.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from easyinv_edit import images
from easyinv_edit.choices import nearest
from easyinv_edit.errors import InputError
from easyinv_edit.evaluation.ground_truth import Case, Task, make_case
from easyinv_edit.evaluation.set_files import PICTURES, check_count, listed, picture_sizes, read_text, refuse
from easyinv_edit.tabletop.captions import caption
from easyinv_edit.tabletop.render import render, render_apart
from easyinv_edit.tabletop.scene import Scene, random_scene

Source: TypeAlias = Path | Image.Image | Callable[[], Image.Image]
"""A picture file, read at each access; a picture; or a function that makes one."""

T = TypeVar("T")

CAPTIONS = "captions.csv"
COLUMNS = ("file", "prompt", "target_prompt")
"""Columns of a captions file; the last one is for edits."""
AT_ONCE = 64
"""Scenes rendered at once: their float pictures take 16 times the memory of the finished ones."""


@dataclass(frozen=True)
class Item:
    """One picture. name: unique in its set; source: where it comes from; prompt: what it shows, maybe empty; group: a part of
    the set that is also reported apart, or empty."""

    name: str
    source: Source
    prompt: str = ""
    group: str = ""

    @property
    def picture(self) -> Image.Image:
        """The upright RGB picture. Raises ImageError where a file cannot be read."""
        return _opened(self.source)


@dataclass(frozen=True, kw_only=True)
class EditItem(Item):
    """A picture and an edit of it; its `prompt` is the source prompt, its `group` the kind of edit.

    target_prompt: what the edited picture shows; words: the edited thing's word in the source and in the target prompt, for
    controls that blend by words; region: makes the mask; outlines: makes the masks; true_source: the edited picture as it
    should be, where that is known; style_source, style_prompt: a picture of the look that is asked for, and what it shows.
    """

    target_prompt: str
    words: tuple[str, str] | None = None
    region: Callable[[], Tensor] | None = None
    outlines: Callable[[], tuple[Tensor, Tensor]] | None = None
    true_source: Source | None = None
    style_source: Source | None = None
    style_prompt: str = ""

    @property
    def edit_type(self) -> str:
        """The kind of edit, or empty."""
        return self.group

    @property
    def mask(self) -> Tensor | None:
        """The region to be edited: (height, width) of the picture, float32, 1 inside and 0 outside; None where unknown."""
        return None if self.region is None else self.region()

    @property
    def masks(self) -> tuple[Tensor, Tensor] | None:
        """Where the edited thing is and where it should come to be, for controls that take masks: each like `mask`, maybe soft;
        that region twice where no more is known."""
        if self.outlines is not None:
            return self.outlines()
        return None if (mask := self.mask) is None else (mask, mask)

    @property
    def box(self) -> tuple[float, float, float, float] | None:
        """Left, top, right and bottom of where the edited thing should come to be, in shares of the picture."""
        if (masks := self.masks) is None or not (inside := masks[1] > 0).any():
            return None
        (rows, columns), (height, width) = inside.nonzero(as_tuple=True), inside.shape
        top, bottom, left, right = (float(v) for ends in (rows, columns) for v in (ends.min(), ends.max() + 1))
        return left / width, top / height, right / width, bottom / height

    @property
    def style(self) -> Image.Image | None:
        """The picture of the look that is asked for; None where there is none."""
        return None if self.style_source is None else _opened(self.style_source)

    @property
    def truth(self) -> Image.Image | None:
        """The true result of the edit; None where it is unknown."""
        return None if self.true_source is None else _opened(self.true_source)


@dataclass(frozen=True, kw_only=True)
class TabletopEdit(EditItem):
    """An edit of a rendered scene. case: both scenes, for a judge that reads attributes."""

    case: Case


def _opened(source: Source) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    return images.load(source) if isinstance(source, Path) else source()


def scenes(first_seed: int, count: int, size: int) -> list[Item]:
    """Tabletop scenes by seed with their full captions; those on a white background are the group "white".

    size: side of the square pictures in pixels.
    """
    made = [random_scene(first_seed + i) for i in range(count)]
    parts = (made[i : i + AT_ONCE] for i in range(0, count, AT_ONCE))
    pictures = [picture for part in parts for picture in images.to_pil(render(part, size)[0] * 2 - 1)]
    groups = ["white" if scene.background == "white" else "" for scene in made]
    rows = zip(made, pictures, groups, strict=True)
    return [Item(f"scene-{first_seed + i}", p, caption(scene), group) for i, (scene, p, group) in enumerate(rows)]


def tabletop_edits(task: Task, first_seed: int, count: int, size: int) -> list[TabletopEdit]:
    """The first `count` edits of a ground-truth task among the scenes from a seed on, rendered when they are asked for.

    size: side of the square pictures in pixels. The mask holds the edited object before and after, except where the background
    is what changes, and every pixel that differs between source and truth, such as the shadow's.
    """
    check_count(count)
    cases = ((seed, make_case(task, task.scenes(seed))) for seed in itertools.count(first_seed))
    found = ((seed, case) for seed, case in cases if case is not None)
    return [_tabletop_edit(seed, case, size) for seed, case in itertools.islice(found, count)]


def _tabletop_edit(seed: int, case: Case, size: int) -> TabletopEdit:
    return TabletopEdit(
        name=f"scene-{seed}-{case.task.name}",
        source=partial(_rendered, case.source, size),
        prompt=case.source_prompt,
        group=case.task.name,
        target_prompt=case.prompt,
        words=case.words,
        region=partial(_edited_region, case, size),
        outlines=partial(_outlines, case, size),
        true_source=partial(_rendered, case.truth, size),
        style_source=None if case.style is None else partial(_rendered, case.style, size),
        style_prompt="" if case.style is None else caption(case.style),
        case=case,
    )


def _rendered(scene: Scene, size: int) -> Image.Image:
    return images.to_pil(render([scene], size)[0] * 2 - 1)[0]


def _outlines(case: Case, size: int) -> tuple[Tensor, Tensor]:
    covered = render_apart([case.source, case.truth], size)[1]
    before, after = case.task.edited
    return torch.zeros(size, size) if before is None else covered[0, before], covered[1, after]


def _edited_region(case: Case, size: int) -> Tensor:
    source, truth = images.to_uint8(render([case.source, case.truth], size)[0] * 2 - 1)
    changed = (source != truth).any(-1)
    if case.task.field != "background":
        changed |= torch.stack(_outlines(case, size)).gt(0).any(0)
    return changed.float()


def folder(path: Path, count: int | None = None, captions: Path | None = None) -> list[Item]:
    """The pictures of a folder by name; the first `count` of them.

    captions: a CSV file (see `read_captions`), by default the folder's own captions.csv where there is one; a picture that it
    does not list has no prompt. Raises InputError where there are no pictures, or with everything that is wrong.
    """
    check_count(count)
    files = _pictures(path)
    table = captions or path / CAPTIONS
    rows = read_captions(table, [file.name for file in files]) if captions or table.is_file() else {}
    prompts = {name: row["prompt"] for name, row in rows.items()}
    return [Item(file.name, file, prompts.get(file.name, "")) for file in picture_sizes(files[:count])]


def edits_folder(path: Path, count: int | None = None, captions: Path | None = None) -> list[EditItem]:
    """The edits that a captions file lists for a folder's pictures, in its order; the first `count` of them.

    captions: a CSV file with all of `COLUMNS` and a target prompt in every row, by default the folder's own captions.csv.
    Raises InputError as `folder` does.
    """
    check_count(count)
    files = {file.name: file for file in _pictures(path)}
    rows = list(read_captions(captions or path / CAPTIONS, list(files), edits=True).items())[:count]
    picture_sizes(files[name] for name, _ in rows)
    return [EditItem(name, files[name], row["prompt"], target_prompt=row["target_prompt"]) for name, row in rows]


def _pictures(path: Path) -> list[Path]:
    """The picture files of a folder by name; hidden ones, as some archives carry beside each picture, are none."""
    if not path.is_dir():
        raise InputError(f"{path}: is no folder; give one that holds pictures")
    files = (file for file in listed(path) if file.suffix.lower() in PICTURES and not file.name.startswith("."))
    found = sorted(file for file in files if file.is_file())
    if not found:
        raise InputError(f"{path}: holds no pictures ({', '.join(PICTURES)})")
    return found


def read_captions(path: Path, pictures: Collection[str], edits: bool = False) -> dict[str, dict[str, str]]:
    """The rows of a captions file by picture, each a mapping of `COLUMNS` to text, in the file's order.

    UTF-8 with or without a byte order mark, separated by commas; the first row names the columns file, prompt and maybe
    target_prompt in any order. pictures: the names that may be listed, each once; edits: target prompts are needed. Raises
    InputError with every problem, each a line `file:line: what is wrong`.
    """
    unread: list[str] = []
    rows = list(_csv_rows(path, unread))
    line, header = rows[0] if rows else (1, [])
    names = [cell.strip().lower().replace(" ", "_") for cell in header]
    problems = [f"{path}:{line}: {wrong}" for wrong in _wrong_header(names, COLUMNS if edits else COLUMNS[:2])]
    found: dict[str, dict[str, str]] = {}
    for line, cells in rows[1:] if names.count("file") == 1 else []:
        row = dict.fromkeys(COLUMNS, "") | dict(zip(names, map(str.strip, cells), strict=False))
        wrong = _wrong_cells(len(cells), len(names)) or _wrong_file(row["file"], pictures, found)
        if not wrong and edits and "target_prompt" in names and not row["target_prompt"]:
            wrong = "has no target prompt; say what the edited picture shows"
        problems += [f"{path}:{line}: {wrong}"] if wrong else []
        found.setdefault(row["file"], row)
    refuse(problems + unread)
    return found


def _csv_rows(path: Path, unread: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of every row that is not blank. What cannot be parsed ends the rows and is added to `unread`."""
    reader = csv.reader(io.StringIO(read_text(path)), strict=True)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        unread.append(f"{path}:{line}: is no row of a CSV file ({error}); close every quote, and double those within text")


def _wrong_header(names: Sequence[str], needed: Sequence[str]) -> list[str]:
    """What is wrong with the columns' names."""
    known = f"the columns are {', '.join(COLUMNS)}, separated by commas"
    wrong = [f"column {n!r} is unknown{nearest(n, COLUMNS)}; {known}" for n in names if n not in COLUMNS]
    wrong += [f"column {n!r} is named twice; name it once" for n in COLUMNS if names.count(n) > 1]
    return wrong + [f"has no column {n!r}; {known}" for n in needed if n not in names]


def _wrong_cells(given: int, wanted: int) -> str:
    return "" if given == wanted else f"has {given} cells, the first row {wanted}; put quotes around text that holds commas"


def _wrong_file(name: str, pictures: Collection[str], listed: Collection[str]) -> str:
    if name not in pictures:
        return f"{name!r} is no picture of the folder{nearest(name, pictures)}; give the name of a file in it"
    return f"{name!r} is listed above already; list each picture once" if name in listed else ""


def chunks(items: Sequence[T], size: int) -> list[list[T]]:
    """The items in groups of `size`, the last one maybe smaller."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
