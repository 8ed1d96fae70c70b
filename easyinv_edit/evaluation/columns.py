"""What benchmarks measure: one column of their tables each, by the name it has there.

A column reads one number off a `Sample`, None where it is not defined for it. Columns without a reader are worked out from
others when the tables are made. Some need weights; where these are missing the column stays empty and the summary says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from easyinv_edit.evaluation import metrics, weights
from easyinv_edit.evaluation.lpips import BACKBONES
from easyinv_edit.evaluation.metrics import MaskForm
from easyinv_edit.evaluation.weights import Metric, Weights


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A result beside what it is compared with.

    Pictures are (1, 3, H, W) in [0, 1], masks (1, 1, H, W), inside where above 0.5. source: the picture that was encoded;
    mask: 1 where the edit belongs; truth: the true result, and inside: its object, None where unknown; prompt, source_prompt:
    what both should show; facts: what the run knows besides, by column; guided: the same item sampled back at the edit's
    guidance; form: how masks count.
    """

    picture: Tensor
    source: Tensor
    mask: Tensor | None = None
    truth: Tensor | None = None
    inside: Tensor | None = None
    prompt: str = ""
    source_prompt: str = ""
    facts: Mapping[str, float] = field(default_factory=dict)
    guided: Sample | None = None
    form: MaskForm = "masked_mean"
    metrics: Mapping[str, Metric] = field(default_factory=dict)


Reader = Callable[[Sample], float | None]
Comparison = Callable[[Sample, Tensor, Tensor, Tensor | None], float]
"""(sample, picture, reference, mask or None) -> a number."""
BOTH = ("inversion", "edits")


@dataclass(frozen=True)
class Column:
    """better: which way is good, None for neither; digits: in tables; unit: of the numbers, empty for none; read: see `Reader`;
    needs: the metric of `weights.METRICS` it takes; kinds: of benchmarks that have it; least: the shortest side it can see."""

    better: Literal["higher", "lower"] | None
    digits: int
    unit: str = ""
    read: Reader | None = None
    needs: str | None = None
    kinds: tuple[str, ...] = BOTH
    least: int = 1


@dataclass(frozen=True)
class Compared:
    """A way of comparing two pictures; the columns that use it are made below. Fields as in `Column`."""

    compare: Comparison
    better: Literal["higher", "lower"]
    digits: int
    unit: str = ""
    needs: str | None = None
    least: int = 1

    def column(self, read: Reader, *kinds: str) -> Column:
        """A column that compares with this."""
        return Column(self.better, self.digits, self.unit, read, self.needs, kinds, self.least)


def _pixels(measure: Callable[[Tensor, Tensor, Tensor | None, MaskForm], float]) -> Comparison:
    return lambda sample, a, b, mask: measure(a, b, mask, sample.form)


def _network(name: str) -> Comparison:
    return lambda sample, a, b, mask: sample.metrics[name](a, b, mask).item()


COMPARED: dict[str, Compared] = {
    "PSNR": Compared(_pixels(metrics.psnr), "higher", 2, "dB"),
    "SSIM": Compared(_pixels(metrics.ssim), "higher", 4, least=metrics.WINDOW),
    "MS-SSIM": Compared(_pixels(metrics.ms_ssim), "higher", 4, least=176),
    "MSE": Compared(_pixels(metrics.mse), "lower", 6),
    **{
        f"LPIPS ({net})": Compared(_network(f"LPIPS ({net})"), "lower", 4, "", f"LPIPS ({net})", known.least)
        for net, known in BACKBONES.items()
    },
    "structure": Compared(_network("DINO structure (0-255)"), "lower", 5, "", "DINO structure (0-255)"),
    "structure, corrected": Compared(_network("DINO structure"), "lower", 5, "", "DINO structure"),
}
"""Ways to compare two whole pictures. "structure" is PIE-Bench's DINO distance, whose input is 0 to 255."""


def _whole(compared: Compared) -> Reader:
    return lambda s: compared.compare(s, s.picture, s.source, None)


def _guided(compared: Compared) -> Reader:
    return lambda s: None if s.guided is None else compared.compare(s, s.guided.picture, s.guided.source, None)


def _background(compared: Compared) -> Reader:
    return lambda s: None if s.mask is None else compared.compare(s, s.picture, s.source, 1 - s.mask)


def _true(compared: Compared) -> Reader:
    return lambda s: None if s.truth is None else compared.compare(s, s.picture, s.truth, None)


def _true_psnr(outside: bool) -> Reader:
    """dB of the pixels inside, or outside, of the true result's object."""

    def read(s: Sample) -> float | None:
        if s.truth is None or s.inside is None:
            return None
        return metrics.psnr(s.picture, s.truth, 1 - s.inside if outside else s.inside)

    return read


def _clip(s: Sample) -> float:
    return float(s.metrics["CLIP"](s.picture, [s.prompt]).item())


def _clip_edited(s: Sample) -> float | None:
    return None if s.mask is None else float(s.metrics["CLIP"](s.picture, [s.prompt], s.mask).item())


def _clip_source(s: Sample) -> float:
    return float(s.metrics["CLIP"](s.source, [s.source_prompt]).item())


def _fact(name: str) -> Reader:
    return lambda s: s.facts.get(name)


COLUMNS: dict[str, Column] = {
    **{name: way.column(_whole(way), *BOTH) for name, way in COMPARED.items()},
    **{f"{name}, guided": way.column(_guided(way), "inversion") for name, way in COMPARED.items()},
    **{f"background {name}": way.column(_background(way), "edits") for name, way in COMPARED.items()},
    **{f"truth {name}": way.column(_true(way), "edits") for name, way in COMPARED.items()},
    "inside": Column("higher", 2, "dB", _true_psnr(False), None, ("edits",)),
    "outside": Column("higher", 2, "dB", _true_psnr(True), None, ("edits",)),
    "gain": Column("higher", 2, "dB", None, None, ("edits",)),
    "spread": Column(None, 2, "dB", None, None, ("edits",)),
    "better": Column("higher", 2, "", None, None, ("edits",)),
    "target": Column("higher", 2, "", _fact("target"), None, ("edits",)),
    "kept": Column("higher", 2, "", _fact("kept"), None, ("edits",)),
    "CLIP whole": Column("higher", 2, "", _clip, "CLIP", ("edits",)),
    "CLIP edited": Column("higher", 2, "", _clip_edited, "CLIP", ("edits",)),
    "CLIP source": Column(None, 2, "", _clip_source, "CLIP", ("edits",)),
    "latent error": Column("lower", 4, "", _fact("latent error"), None, ("inversion",)),
    "latent error, guided": Column("lower", 4, "", _fact("latent error, guided"), None, ("inversion",)),
    "noise deviation": Column(None, 3, "", _fact("noise deviation"), None, ("inversion",)),
    "evaluations": Column("lower", 0, "", _fact("evaluations")),
    "sampling evaluations": Column("lower", 0, "", _fact("sampling evaluations"), None, ("inversion",)),
    "inversion evaluations": Column("lower", 0, "", _fact("inversion evaluations"), None, ("edits",)),
    "seconds": Column("lower", 2, "s", _fact("seconds")),
    "inversion seconds": Column("lower", 2, "s", _fact("inversion seconds"), None, ("edits",)),
    "x DDIM": Column("lower", 2, "", None, None, ("inversion",)),
}
"""Every column. "truth ...", "inside", "outside": against the true result, in its object and outside of it; gain, spread: mean
and deviation of the dB inside over no control on the same item, and better: in which share it is above it; target, kept: shares
of the words asked for, and of those both prompts leave unnamed, that a classifier reads; evaluations, seconds: of inverting one
picture in a benchmark of inversions, of one edit in one of edits; x DDIM: seconds over those of DDIM inversion in the run."""

INVERSION = (
    "evaluations", "seconds", "x DDIM", "latent error", "PSNR", "SSIM", "latent error, guided", "PSNR, guided", "SSIM, guided",
)  # fmt: skip
TRUE_EDITS = ("truth PSNR", "inside", "outside", "gain", "spread", "better", "target", "kept", "evaluations", "seconds")
EDITS = ("background PSNR", "background SSIM", "background MSE", "evaluations", "seconds")
"""What is measured where a configuration names no metrics: of inversions, of edits with a true result, and of others."""


def plain_name(title: str) -> str:
    """The column that a table's title is of: titles of CLIP's and DINO's also name the net."""
    return title if title in COLUMNS else title.rsplit(" (", 1)[0]


@dataclass(frozen=True)
class Measures:
    """The columns of one run. names: of `COLUMNS`, in order; metrics: those with weights, loaded; titles: what tables call each
    column; missing: columns that stay empty, each with the reason."""

    names: tuple[str, ...]
    metrics: Mapping[str, Metric]
    titles: Mapping[str, str]
    missing: Mapping[str, str]

    def row(self, sample: Sample) -> dict[str, float | None]:
        """The numbers of a sample by title; None where one is not defined or not finite, as the PSNR of equal pictures."""
        found: dict[str, float | None] = {}
        for name in self.names:
            read = COLUMNS[name].read
            if read is not None and name not in self.missing:
                value = read(sample)
                found[self.titles[name]] = value if value is not None and math.isfinite(value) else None
        return found

    def least(self) -> tuple[int, str]:
        """The shortest side in pixels that every column can see, and the column that needs it."""
        return max((COLUMNS[name].least, name) for name in self.names)


def loaded(names: Iterable[str], files: Weights, device: torch.device, published: Iterable[str] = ()) -> Measures:
    """Open what the columns need; what has no weights is told by `missing`.

    published: titles of published numbers, which name a column's net where ours is not there to do it.
    """
    chosen = tuple(dict.fromkeys(names))
    needed = {name: COLUMNS[name].needs for name in chosen}
    found = weights.load(files, dict.fromkeys(need for need in needed.values() if need), device=device)
    missing = {name: str(found[need]) for name, need in needed.items() if need and isinstance(found[need], str)}
    theirs = {plain_name(title): title for title in published}
    titles = {
        name: theirs.get(name, name) if name in missing else _title(name, found.get(need or ""))
        for name, need in needed.items()
    }
    return Measures(chosen, {key: m for key, m in found.items() if not isinstance(m, str)}, titles, missing)


def _title(name: str, metric: Metric | str | None) -> str:
    """The column's name with the net of its metric, unless it names that itself."""
    said = str(getattr(metric, "name", ""))
    return name if "(" in name or "(" not in said else f"{name} {said[said.index('(') :]}"
