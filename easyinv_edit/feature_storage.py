"""What `source_features` may be, and the room that kept features take: known before the source is evaluated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from attention_control import ReferenceCache, list_sites
from easyinv_edit.choices import build
from easyinv_edit.errors import InputError

SETTINGS = ConfigDict(extra="forbid")
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, config=SETTINGS)
class Live:
    """The source's rows beside the targets' in every batch; nothing is kept."""

    name: ClassVar[str] = "live"


@dataclass(frozen=True, config=SETTINGS)
class FromInversion:
    """What the inversion kept, stored as it came; an approximation."""

    name: ClassVar[str] = "inversion"


@dataclass(frozen=True, config=SETTINGS)
class Exact:
    """The pinned source, evaluated once before the targets.

    dtype: of storage, by default the UNet's; device: "cpu" keeps them in host memory, pinned and fetched ahead on a CUDA run;
    by default they stay where they were evaluated; max_bytes: how much may be kept, more is refused before the evaluation.
    """

    dtype: Dtype | None = None
    device: Literal["cpu"] | None = None
    max_bytes: Annotated[int, Field(ge=1, strict=True)] | None = None

    name: ClassVar[str] = "exact"

    def cache(self) -> ReferenceCache:
        """An empty one of these settings."""
        dtype: torch.dtype | None = None if self.dtype is None else getattr(torch, self.dtype)
        device = None if self.device is None else torch.device(self.device)
        return ReferenceCache(dtype=dtype, device=device, max_bytes=self.max_bytes)


@dataclass(frozen=True, config=SETTINGS)
class Auto(Exact):
    """Exact where the prompts take several batches and the features fit `max_bytes`, else live."""

    name: ClassVar[str] = "auto"


FEATURES: dict[str, type[Any]] = {"auto": Auto, "live": Live, "exact": Exact, "inversion": FromInversion}
Features = Live | FromInversion | Exact | ReferenceCache


def chosen_features(given: Any) -> Features:
    """A name of `FEATURES`, a mapping with "name" and settings, one of these objects, or a cache. Raises InputError."""
    chosen = build(FEATURES, given, "source_features")
    if isinstance(chosen, Live | FromInversion | Exact | ReferenceCache):
        return chosen
    raise InputError(
        f"source_features is of type {type(chosen).__name__}; choose {', '.join(FEATURES)}, or give a ReferenceCache"
    )


def recorded(features: Features) -> str | dict[str, Any]:
    """The choice as a recipe holds it: its name, with what is set. A cache is a place for exact features."""
    name = "exact" if isinstance(features, ReferenceCache) else features.name
    values = {key: getattr(features, key, None) for key in ("dtype", "device", "max_bytes")}
    given = {key: value if isinstance(value, int) else _plain(value) for key, value in values.items() if value is not None}
    return {"name": name, **given} if given else name


def kept(cache: ReferenceCache | None) -> dict[str, Any] | None:
    """What a result tells of the features that it read; None where none were kept."""
    stored = None if cache is None else cache.stored
    if cache is None or stored is None:
        return None
    return {"bytes": cache.bytes, "dtype": _plain(stored[0]), "device": str(stored[1]), "max_bytes": cache.max_bytes}


@dataclasses.dataclass(frozen=True)
class Room:
    """What a pass will keep. values: layer inputs per step; steps: at which something is kept; dtype: of storage."""

    values: int
    steps: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.steps * self.values * self.dtype.itemsize

    def refusal(self, max_bytes: int | None) -> str | None:
        """Why that is too much and what would fit; None where it fits."""
        if max_bytes is None or self.bytes <= max_bytes:
            return None
        taken = f"the source's features take {self.bytes:,} bytes in {_plain(self.dtype)}"
        told = f"{taken}, more than the {max_bytes:,} bytes allowed"
        half = dataclasses.replace(self, dtype=torch.float16)
        if half.bytes <= max_bytes:
            return f"{told}; {half.bytes:,} in float16 fit; or use source_features 'live', which keeps none"
        smallest = f"{half.bytes:,} in float16 are too many as well, " if half.bytes < self.bytes else ""
        fitting = f"{max_bytes // (half.values * half.dtype.itemsize)} of the {self.steps} controlled steps fit"
        return f"{told}; {smallest}{fitting}; allow more, control fewer steps or sites, or use source_features 'live'"


def room_for(
    network: Any, steps: Mapping[int, Sequence[str]], rows: int, latent_size: tuple[int, int], dtype: torch.dtype | None
) -> Room:
    """The room that the inputs of the self-attention sites read at `steps` (step -> paths) take, for so many source rows.

    latent_size: (height, width); dtype: of storage, by default the network's. A step that reads any site keeps all of them.
    """
    paths = {path for own in steps.values() for path in own}
    sites = [site for site in list_sites(network) if site.path in paths]
    values = rows * sum(site.tokens(latent_size) * int(site.module.query_dim) for site in sites)
    return Room(values, sum(bool(own) for own in steps.values()), dtype or network.dtype)


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")
