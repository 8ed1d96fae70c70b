"""Weight files by their headers: which tensors, of which type, whole or cut short. Files of gigabytes cost a few kilobytes.

A safetensors file is eight bytes with the length of a JSON header, the header, and the tensors one after the other. Pickle
files are never opened.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
BASES = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call the weights of a part."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}

Header = Mapping[str, tuple[str, tuple[int, ...]]]
"""(type, shape) of every tensor by its name."""


class Unreadable(Exception):
    """A file of a model that cannot be read; says why and what to do."""


@dataclass(frozen=True)
class Weights:
    """What a part's weights are on disk: the type of most of them, how many, and the bytes of their files."""

    dtype: str
    parameters: int
    bytes: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises Unreadable, also where the file holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise Unreadable("is no valid JSON; download it again") from error
    if not isinstance(content, dict):
        raise Unreadable("holds no JSON object; download it again")
    return content


def read_header(path: Path) -> Header:
    """The tensors of a safetensors file. Raises Unreadable where it is damaged or its end is missing."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            text = file.read(length) if len(start) == 8 and length <= min(HEADER_LIMIT, size - 8) else b""
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error
    if start == b"version ":
        raise Unreadable("is a git-lfs pointer instead of weights; run git lfs pull")
    try:
        content = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in content.values()), default=0)
        header = {name: (str(entry["dtype"]), tuple(map(int, entry["shape"]))) for name, entry in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise Unreadable("is no safetensors file, or damaged; download it again") from error
    if size < end:
        raise Unreadable(f"is cut short ({size} of {end} bytes); download it again")
    return header


def weights_of(part: Path) -> tuple[Weights | None, list[str]]:
    """The weights that are read for the part in a folder, and what keeps them from being read, each a line."""
    files, problems = _files(part)
    types: Counter[str] = Counter()
    for file in files:
        try:
            for dtype, shape in read_header(file).values():
                types[dtype] += math.prod(shape)
        except Unreadable as error:
            problems.append(f"{part.name}/{file.name}: {error}")
    if not types:
        return None, problems
    most = types.most_common(1)[0][0]
    return Weights(DTYPES.get(most, most.lower()), types.total(), sum(file.stat().st_size for file in files)), problems


def _files(part: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files that are read without a variant, and why not all or none."""
    for base in BASES:
        whole, index = part / f"{base}.safetensors", part / f"{base}.safetensors.index.json"
        if whole.is_file():
            return [whole], []
        if index.is_file():
            return _shards(index)
    if variants := [found[1] for file in sorted(part.glob("*.safetensors")) if (found := VARIANT.fullmatch(file.name))]:
        return [], [
            f"{part.name}: has its weights as the variant {variants[0]!r} only; in Python load the model with "
            f"variant={variants[0]!r}, for a recipe take '.{variants[0]}' out of the files' names"
        ]
    if pickles := [file.name for file in sorted(part.iterdir()) if file.suffix in PICKLES]:
        return [], [
            f"{part.name}: has its weights in {pickles[0]}, a pickle, which is never opened, because it can run code; "
            f"safetensors are needed: {CONVERT}"
        ]
    return [], [f"{part.name}: has no weights; download {BASES[0]}.safetensors or {BASES[1]}.safetensors again"]


VARIANT = re.compile(rf"(?:{'|'.join(BASES)})\.(\w+?)(?:-\d+-of-\d+)?\.safetensors")
CONVERT = (
    "if you trust it, DiffusionPipeline.from_pretrained('MODEL', use_safetensors=False).save_pretrained('FOLDER') writes them"
)


def _shards(index: Path) -> tuple[list[Path], list[str]]:
    """The files an index names, and which of them are missing."""
    name = f"{index.parent.name}/{index.name}"
    try:
        names = sorted(set(map(str, read_json(index)["weight_map"].values())))
    except Unreadable as error:
        return [], [f"{name}: {error}"]
    except (KeyError, AttributeError):
        return [], [f"{name}: names no files; download it again"]
    files = [index.parent / file for file in names]
    missing = [file.name for file in files if not file.is_file()]
    text = (
        f"{index.parent.name}: {len(missing)} of {len(files)} weight files are missing, e.g. {missing[:1]}; download them again"
    )
    return [file for file in files if file.is_file()], [text] if missing else []
