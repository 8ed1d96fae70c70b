"""Pictures to measure on, and edits with both prompts: rendered tabletop scenes, or a folder of the user's own.

The published sets are read by `coco` and `pie_bench`. An item of a set on disk holds a path, and its picture is read anew at
each access: a set of thousands does not sit in memory.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from easyinv_edit import images
from easyinv_edit.choices import nearest, plain
from easyinv_edit.errors import EasyInvWarning, ImageError, InputError
from easyinv_edit.evaluation.ground_truth import Case, Task, make_case
from easyinv_edit.tabletop.captions import caption
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import Scene, random_scene

Source: TypeAlias = Path | Image.Image | Callable[[], Image.Image]
"""A picture file, read at each access; a picture; or a function that makes one."""
OnMismatch: TypeAlias = Literal["warn", "raise", "ignore"]
"""What to do where a published set has not the number of pictures it should have."""

T = TypeVar("T")

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
CAPTIONS = "captions.csv"
COLUMNS = ("file", "prompt", "target_prompt")
"""Columns of a captions file; the last one is for edits."""
TOLD = 10
"""Problems told one by one; of further ones only the number."""
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
    controls that blend by words; region: makes the mask; true_source: the edited picture as it should be, where that is known.
    """

    target_prompt: str
    words: tuple[str, str] | None = None
    region: Callable[[], Tensor] | None = None
    true_source: Source | None = None

    @property
    def edit_type(self) -> str:
        """The kind of edit, or empty."""
        return self.group

    @property
    def mask(self) -> Tensor | None:
        """The region to be edited: (height, width) of the picture, float32, 1 inside and 0 outside; None where unknown."""
        return None if self.region is None else self.region()

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

    size: side of the square pictures in pixels. The mask holds both objects, except where the background is what changes, and
    every pixel that differs between source and truth, such as the shadow's.
    """
    check_count(count)
    cases = ((seed, make_case(task, random_scene(seed))) for seed in itertools.count(first_seed))
    found = ((seed, case) for seed, case in cases if case is not None)
    return [_tabletop_edit(seed, case, size) for seed, case in itertools.islice(found, count)]


def _tabletop_edit(seed: int, case: Case, size: int) -> TabletopEdit:
    return TabletopEdit(
        name=f"scene-{seed}-{case.task.name}",
        source=partial(_rendered, case.source, size),
        prompt=case.source_prompt,
        group=case.task.name,
        target_prompt=case.prompt,
        words=(case.source.shape, case.truth.shape),
        region=partial(_edited_region, case, size),
        true_source=partial(_rendered, case.truth, size),
        case=case,
    )


def _rendered(scene: Scene, size: int) -> Image.Image:
    return images.to_pil(render([scene], size)[0] * 2 - 1)[0]


def _edited_region(case: Case, size: int) -> Tensor:
    pictures, objects = render([case.source, case.truth], size)
    source, truth = images.to_uint8(pictures * 2 - 1)
    changed = (source != truth).any(-1)
    if case.task.field != "background":
        changed |= (objects > 0).any(0)[0]
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


# --- what the readers of sets share -------------------------------------------------------------------------------------


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
