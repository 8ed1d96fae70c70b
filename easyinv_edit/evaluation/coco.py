"""The COCO 2017 pictures on which EasyInv reports its reconstructions (Zhang et al., arXiv 2408.05159).

The paper draws 2,298 pictures at random from the test and validation sets; it names neither them nor a seed, and no filter.
The authors' repository keeps pictures whose shorter side is more than 0.9 of the longer, from the test set, in the order of the
folder; whether 2,298 is what that filter leaves or a sample of it is not told. So a set chosen here follows the protocol, and
is not the paper's own.

Get val2017.zip, test2017.zip and, for captions, annotations_trainval2017.zip from cocodataset.org and unpack them into one
folder. Nothing is downloaded or bundled: the pictures belong to their owners on Flickr. The test set has no public captions.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from easyinv_edit.errors import InputError
from easyinv_edit.evaluation.datasets import Item
from easyinv_edit.evaluation.set_files import (
    OnMismatch,
    check_count,
    check_mismatch,
    invalid,
    listed,
    mismatch,
    picture_sizes,
    read_json,
    refuse,
)

PAPER_COUNT = 2298
"""Pictures in the paper's tables."""
NEAR_SQUARE = 0.9
"""The shorter side is more than this share of the longer one; from the authors' code, the paper has no such number."""
SPLITS = ("val2017", "test2017")
NAME = re.compile(r"\d{12}\.jpg")


def load(
    path: Path,
    count: int | None = PAPER_COUNT,
    *,
    splits: Sequence[str] = SPLITS,
    near_square: float = NEAR_SQUARE,
    seed: int | None = 0,
    captions: bool = False,
    on_mismatch: OnMismatch = "warn",
) -> list[Item]:
    """Near-square COCO pictures in the order of their ids, each split a group.

    path: the folder that holds the splits' folders and annotations/. count: how many, None for all of them; fewer found is told
    as `on_mismatch` says. splits: folders to draw from. near_square: share in [0, 1); 0 keeps every shape. seed: which ones are
    drawn, the same on every machine, and fewer with one seed are part of more with it; None takes the lowest ids. captions:
    each picture's first caption is its prompt; without, prompts are empty as in the authors' notebook. Only headers of pictures
    are read. Raises InputError with everything that is missing or damaged.
    """
    check_count(count)
    check_mismatch(on_mismatch)
    if not 0 <= near_square < 1:
        raise InputError(f"near_square is {near_square}; it is a share of the longer side, from 0 up to but not 1")
    files = _files(path, splits)
    sizes = picture_sizes(files)
    square = [file for file, size in sizes.items() if min(size) > near_square * max(size)]
    found = f"{path}: {len(square):,} near-square pictures among {len(files):,} in {', '.join(splits)}"
    if not square:
        raise InputError(f"{found}; unpack the whole set")
    if count is not None and len(square) < count:
        told = f"{found}, {count:,} were asked for (the paper has {PAPER_COUNT:,}); unpack every split whole, or ask for fewer"
        mismatch(told, on_mismatch)
    texts = _captions(path, splits) if captions else {}
    chosen = sorted(sorted(square, key=lambda file: _rank(file, seed))[:count], key=_id)
    return [Item(f"{files[file]}-{file.stem}", file, texts.get(_id(file), ""), files[file]) for file in chosen]


def _id(file: Path) -> int:
    return int(file.stem)


def _rank(file: Path, seed: int | None) -> bytes:
    """Where a picture stands in the draw. A hash, because a generator's draws change with what else is in the folder."""
    number = _id(file)
    return number.to_bytes(8, "big") if seed is None else hashlib.sha256(f"{seed}:{number}".encode()).digest()


def _files(path: Path, splits: Sequence[str]) -> dict[Path, str]:
    """Every picture with its split, by split and id. Raises InputError for splits that are missing or empty."""
    files: dict[Path, str] = {}
    problems = [] if splits else ["splits: the list is empty; give val2017, test2017 or both"]
    for split in dict.fromkeys(splits):
        place = path / split
        if (place / split).is_dir():  # some unpackers add a folder of the archive's name
            place /= split
        if not place.is_dir():
            problems.append(f"{place}: is no folder; give the folder that holds {split}, or name the splits that you have")
            continue
        named = [file for file in listed(place) if NAME.fullmatch(file.name)]
        if not named:
            problems.append(f"{place}: holds no COCO pictures (twelve digits and .jpg); unpack {split}.zip there")
        files |= dict.fromkeys(sorted(named), split)
    refuse(problems)
    return files


class _Caption(BaseModel):
    """One annotation of a captions file; a picture has about five."""

    model_config = ConfigDict(strict=True)

    id: int
    image_id: int
    caption: str


class _Captions(BaseModel):
    """What is read of a captions file."""

    annotations: list[_Caption]


def _captions(path: Path, splits: Sequence[str]) -> dict[int, str]:
    """The caption with the lowest id of every picture that has one, its white space made single spaces."""
    wanted = [path / "annotations" / f"captions_{split}.json" for split in splits]
    found = [file for file in wanted if file.is_file()]
    if not found:
        told = ", ".join(map(str, wanted))
        raise InputError(f"{told}: there is no such file; unpack annotations_trainval2017.zip, or go without captions")
    texts: dict[int, str] = {}
    for file in found:
        try:
            annotations = _Captions.model_validate(read_json(file)).annotations
        except ValidationError as error:
            refuse(invalid(str(file), error))
            raise
        for one in sorted(annotations, key=lambda one: one.id):
            texts.setdefault(one.image_id, " ".join(one.caption.split()))
    return texts
