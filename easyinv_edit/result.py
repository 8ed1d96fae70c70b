"""What an edit returns: pictures, what they cost, and everything needed to make them again."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image

from easyinv_edit import images
from easyinv_edit.cost import Cost
from easyinv_edit.errors import InputError
from easyinv_edit.figures import strip
from easyinv_edit.trajectory import Trajectory

PACKAGES = ("easyinv-edit", "torch", "diffusers", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class EditResult:
    """images: one edited picture per target prompt, in the form `output_type` asked for; reconstruction: the source branch,
    decoded, and source: the picture that was encoded, both at the model's size; trajectory: reuse it for more prompts;
    recipe: what decided the output, in a recipe's keys; cost: of inverting and of editing; quality: PSNR in dB of the
    reconstruction and of the autoencoder's round trip, its ceiling; flagged: the safety checker's verdicts, or None; features:
    bytes, dtype, device and budget of the source features that were kept for the targets, or None."""

    images: Any
    prompts: Sequence[str]
    trajectory: Trajectory
    recipe: Mapping[str, Any]
    cost: Mapping[str, Cost]
    source: Image.Image | None = None
    reconstruction: Image.Image | None = None
    edited: Sequence[Image.Image] = ()
    quality: Mapping[str, float] = field(default_factory=dict)
    flagged: Sequence[bool] | None = None
    features: Mapping[str, Any] | None = None

    @cached_property
    def comparison(self) -> Image.Image:
        """Source, reconstruction and edits side by side, labelled."""
        edits = zip(self.prompts, self.edited, strict=True) if self.edited else ()  # latents have no pictures
        pairs = [("source", self.source), ("reconstruction", self.reconstruction), *edits]
        shown = [(label, picture) for label, picture in pairs if picture is not None]
        if not shown:
            raise InputError("this result holds no pictures to compare; edit with output_type='pil'")
        return strip([picture for _, picture in shown], [label for label, _ in shown])

    def summary(self) -> dict[str, Any]:
        """`result.json`: everything but the pictures, JSON-able."""
        return {
            "recipe": dict(self.recipe),
            "model": {key: value for key, value in self.trajectory.model.items() if key != "probe"},
            "evaluations": {phase: cost.evaluations for phase, cost in self.cost.items()},
            "seconds": {phase: round(cost.seconds, 3) for phase, cost in self.cost.items()},
            "peak_memory_bytes": max(cost.peak_memory_bytes for cost in self.cost.values()),
            "source_features": None if self.features is None else dict(self.features),
            "reconstruction": {key: round(value, 3) if math.isfinite(value) else None for key, value in self.quality.items()},
            "flagged": None if self.flagged is None else list(self.flagged),
            "versions": versions(),
        }

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Write source.png, reconstruction.png, edited.png (edited-1.png, ... for several), comparison.png and, last,
        result.json into `folder`; every file appears whole or not at all. Returns what result.json holds. Raises InputError
        where the folder cannot be written or the result holds no pictures."""
        names = ["edited.png"] if len(self.edited) == 1 else [f"edited-{i + 1}.png" for i in range(len(self.edited))]
        own = isinstance(self.images, list)  # PIL pictures, at the original image's size; not arrays or latents
        pictures = dict(zip(names, self.images if own else self.edited, strict=True))
        extra = {"source.png": self.source, "reconstruction.png": self.reconstruction, "comparison.png": self.comparison}
        pictures |= {name: picture for name, picture in extra.items() if picture is not None}
        for name, picture in pictures.items():
            images.save_png(picture, Path(folder) / name)
        content = self.summary() | {"images": {Path(name).stem: name for name in pictures}}
        write_text(Path(folder) / "result.json", json.dumps(content, indent=2) + "\n")
        return content

    def _repr_html_(self) -> str:
        """The comparison and its costs, in Jupyter."""
        buffer = io.BytesIO()
        self.comparison.save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        facts = self.summary()
        line = f"{facts['evaluations']} UNet evaluations, {facts['seconds']} s, reconstruction {facts['reconstruction']} dB"
        return f'<img src="data:image/png;base64,{data}"><br><small>{html.escape(line)}</small>'


def versions() -> dict[str, str]:
    """Python and the libraries that can change a picture."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises InputError in one line."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose a writable folder") from error
    finally:
        if partial.exists():
            partial.unlink()
