"""PIE-Bench: 700 pictures of 512 x 512 pixels with ten kinds of edits (Ju et al., arXiv 2310.01506, ICLR 2024).

Ask for it by the form that the README of github.com/cure-lab/PnPInversion links to. Its terms of redistribution are not
stated, so it is neither bundled nor downloaded here; a path is given. What that path holds:

    mapping_file.json       id -> image_path, original_prompt, editing_prompt, editing_instruction, editing_type_id,
                            blended_word, mask (the README shows this under the name of the TI2I file)
    annotation_images/      0_random_140/000000000000.jpg, 1_change_object_80/1_artificial/1_animal/111000000000.jpg, ...

The TI2I benchmark that rides along (mapping_file_ti2i_benchmark.json) has no source prompts, masks or kinds, and is not read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from easyinv_edit.choices import nearest
from easyinv_edit.errors import ImageError, InputError
from easyinv_edit.evaluation.datasets import EditItem
from easyinv_edit.evaluation.set_files import (
    OnMismatch,
    check_count,
    check_mismatch,
    invalid,
    mismatch,
    picture_size,
    read_json,
    refuse,
)

MAPPING = "mapping_file.json"
PICTURES = "annotation_images"
SIDE = 512
TYPES: dict[str, int] = {
    "random": 140,
    "change_object": 80,
    "add_object": 80,
    "delete_object": 80,
    "change_attribute_content": 40,
    "change_attribute_pose": 40,
    "change_attribute_color": 40,
    "change_attribute_material": 40,
    "change_background": 80,
    "change_style": 80,
}
"""Kinds of edits in the order of their ids, 0 to 9, and how many pictures each has."""
COUNT = sum(TYPES.values())
BRACKETED = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True, kw_only=True)
class PieItem(EditItem):
    """One edit. type_id: 0 to 9, its name in `TYPES` is the group; source_words, target_words: what the prompts' brackets mark,
    without them; instruction: the edit as a command, maybe empty. `words` is the pair of blended words."""

    type_id: int
    source_words: tuple[str, ...]
    target_words: tuple[str, ...]
    instruction: str


def load(path: Path, types: Sequence[str] = (), per_type: int | None = None, on_mismatch: OnMismatch = "warn") -> list[PieItem]:
    """The edits in the order of their ids.

    path: the folder that holds mapping_file.json and annotation_images/. types: names from `TYPES`, all of them for none;
    per_type: only the first so many of each. A mapping without 700 edits in the right kinds is told as `on_mismatch` says.
    Pictures are read when they are asked for; that they exist in the right size is checked here. Raises InputError with every
    problem.
    """
    check_count(per_type)
    check_mismatch(on_mismatch)
    refuse([f"types: {t!r} is unknown{nearest(t, TYPES)}; choose {', '.join(TYPES)}" for t in types if t not in TYPES])
    problems: list[str] = []
    items, kept = [_item(path, key, entry) for key, entry in _entries(path, problems).items()], []
    seen: Counter[str] = Counter()
    for item in items:
        seen[item.group] += 1
        if item.group in (types or TYPES) and (per_type is None or seen[item.group] <= per_type):
            kept.append(item)
            problems += _wrong_picture(path, item)
    refuse(problems)
    if seen != Counter(TYPES):
        mismatch(_told(path, seen), on_mismatch)
    if not kept:
        raise InputError(f"{path / MAPPING}: holds no edits of {', '.join(types or TYPES)}; give the whole set")
    return kept


def decode_mask(runs: Sequence[int]) -> Tensor:
    """The region to be edited, (512, 512) float32 of 0 and 1, from runs [start, length, start, length, ...] of ones.

    Starts count pixels row by row from 0; a run ends with the picture. As in the authors' evaluation the outermost pixels are
    1 on all four sides, against annotation errors there. Raises InputError for half a pair, and for starts or lengths outside.
    """
    return _painted(_pairs(runs))


def _pairs(runs: Sequence[int]) -> NDArray[np.int32]:
    """(runs, 2): the first pixel of each run and the one after its last."""
    if len(runs) % 2:
        raise InputError(f"holds {len(runs)} numbers, but runs are pairs of start and length")
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if not 0 <= start < SIDE * SIDE or length < 0:
            allowed = f"starts are 0 to {SIDE * SIDE - 1} and lengths not negative"
            raise InputError(f"a run of {length} pixels from {start} is outside the {SIDE} x {SIDE} picture; {allowed}")
    ends = [min(start + length, SIDE * SIDE) for start, length in zip(runs[::2], runs[1::2], strict=True)]
    return np.array([runs[::2], ends], dtype=np.int32).T


def _painted(pairs: NDArray[np.int32]) -> Tensor:
    """Runs may overlap: a pixel is inside where more of them have begun than ended."""
    begun, ended = (np.bincount(pairs[:, i], minlength=SIDE * SIDE + 1) for i in (0, 1))
    mask = ((begun - ended).cumsum()[:-1] > 0).reshape(SIDE, SIDE)
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return torch.from_numpy(mask.astype(np.float32))


class _Entry(BaseModel):
    """One entry of the mapping file. The id of the kind is a string in it."""

    model_config = ConfigDict(strict=True)

    image_path: str
    original_prompt: str
    editing_prompt: str
    editing_type_id: Annotated[int, Field(strict=False, ge=0, lt=len(TYPES))]
    mask: list[int]
    editing_instruction: str = ""
    blended_word: str = ""

    @field_validator("image_path")
    @classmethod
    def _below_the_pictures(cls, value: str) -> str:
        where = PurePosixPath(value)
        if where.is_absolute() or ".." in where.parts or not where.parts:
            raise ValueError(f"must be a path below {PICTURES}")
        return value

    @field_validator("mask")
    @classmethod
    def _decodable(cls, value: list[int]) -> list[int]:
        _pairs(value)
        return value

    @field_validator("blended_word")
    @classmethod
    def _a_pair(cls, value: str) -> str:
        if len(value.split()) == 1:
            raise ValueError("must be a word of the source and one of the target, or empty")
        return value


def _entries(path: Path, problems: list[str]) -> dict[str, _Entry]:
    """The sound entries of the mapping file by id; what is wrong with the others is added to `problems`."""
    file = path / MAPPING
    if not file.is_file():
        below = sorted(path.glob(f"*/{MAPPING}"))
        remedy = f"give {below[0].parent}" if below else f"give the folder that holds {MAPPING} and {PICTURES}"
        raise InputError(f"{file}: there is no such file; {remedy}")
    content = read_json(file)
    if not isinstance(content, Mapping):
        raise InputError(f"{file}: holds no mapping of ids to edits; give the set's own file")
    entries = {}
    for key, value in sorted(content.items()):
        try:
            entries[key] = _Entry.model_validate(value)
        except ValidationError as error:
            problems += invalid(f"{file}: {key}", error)
    return entries


def _item(path: Path, key: str, entry: _Entry) -> PieItem:
    blended = entry.blended_word.split()
    return PieItem(
        name=key,
        source=path / PICTURES / entry.image_path,
        prompt=_plain(entry.original_prompt),
        group=list(TYPES)[entry.editing_type_id],
        target_prompt=_plain(entry.editing_prompt),
        words=(blended[0], blended[1]) if blended else None,
        region=partial(_painted, _pairs(entry.mask)),
        type_id=entry.editing_type_id,
        source_words=_marked(entry.original_prompt),
        target_words=_marked(entry.editing_prompt),
        instruction=entry.editing_instruction,
    )


def _plain(prompt: str) -> str:
    """A prompt without its brackets and with single spaces, which is how tokenizers and word lists read it."""
    return " ".join(prompt.replace("[", "").replace("]", "").split())


def _marked(prompt: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in BRACKETED.findall(prompt))


def _wrong_picture(path: Path, item: PieItem) -> list[str]:
    """That a picture can be opened, and that its mask fits it; only its header is read."""
    assert isinstance(item.source, Path)
    try:
        width, height = picture_size(item.source)
    except ImageError as error:
        return [f"{path / MAPPING}: {item.name}: {error}"]
    if (width, height) == (SIDE, SIDE):
        return []
    return [f"{path / MAPPING}: {item.name}: {item.source} is {width} x {height} pixels, its mask {SIDE} x {SIDE}"]


def _told(path: Path, seen: Mapping[str, int]) -> str:
    """One line with the number of edits and every kind that has another number than it should."""
    wrong = ", ".join(f"{name} {seen.get(name, 0)} of {right}" for name, right in TYPES.items() if seen.get(name, 0) != right)
    return f"{path / MAPPING}: holds {sum(seen.values())} edits, PIE-Bench has {COUNT} ({wrong}); give the whole set"
