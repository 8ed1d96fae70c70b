"""The judge: a small classifier that reads a scene's words off its picture, to measure what a model drew.

Its own accuracy on held-out pictures is reported with every figure it gives.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from easyinv_edit.errors import ModelError
from easyinv_edit.tabletop.fitting import Fit, fit
from easyinv_edit.tabletop.scene import PLACES, WORDS, Scene, Solid

OF_SOLIDS = ("shape", "texture", "colour", "second", "pose")
READ: dict[str, tuple[str, ...]] = {
    **WORDS,
    "place": tuple(PLACES),
    "company": ("alone", "pair"),
    **{f"beside {field}": WORDS[field] for field in OF_SOLIDS},
}
"""What a judge reads: attributes of the (first) solid and the ground, whether there is a second solid, and its attributes."""
FILE = "judge.safetensors"
"""What a tabletop model's folder calls its judge."""
IGNORED = -100
"""Label of a word that the picture cannot show."""


class Judge(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1], averaged to 64 pixels, -> logits per attribute; 0.6 M parameters.

    fields: of `READ`, by default all.
    """

    def __init__(self, fields: Collection[str] = tuple(READ)) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 192)
        stages = [_stage(a, b) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(192 * 4 * 4, 128), nn.ReLU())
        self.heads = nn.ModuleDict({field: nn.Linear(128, len(READ[field])) for field in fields})

    def features(self, pictures: Tensor) -> Tensor:
        """What the heads read: (B, 128), not negative."""
        return self.body(nn.functional.adaptive_avg_pool2d(pictures, 64) * 2 - 1)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.features(pictures)
        return {field: head(features) for field, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pictures: Tensor) -> list[dict[str, str]]:
        """The word of every attribute, for each picture (B, 3, H, W)."""
        device = next(self.parameters()).device
        best = {field: logits.argmax(-1).tolist() for field, logits in self(pictures.to(device)).items()}
        return [{field: READ[field][rows[i]] for field, rows in best.items()} for i in range(len(pictures))]


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    norm = nn.GroupNorm(8, channels_out)
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2))


def shown(scene: Scene) -> dict[str, str]:
    """The words a picture of `scene` can show.

    A plain object has no second colour, a plain ball or ring no pose; size and place are those of a solid that is alone.
    """
    words = {**_of_solid(scene), "background": scene.background, "company": "pair" if scene.beside else "alone"}
    if scene.beside is None:
        return {**words, "size": scene.size, "place": scene.place}
    return {**words, **{f"beside {field}": word for field, word in _of_solid(scene.beside).items()}}


def _of_solid(solid: Solid) -> dict[str, str]:
    words = {field: getattr(solid, field) for field in OF_SOLIDS}
    if solid.texture == "plain":
        words.pop("second")
        if solid.shape in ("ball", "ring"):
            words.pop("pose")
    return words


def labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Class numbers per attribute, `IGNORED` where the picture cannot show it."""
    rows = [shown(scene) for scene in scenes]
    return {
        field: torch.tensor([words.index(row[field]) if field in row else IGNORED for row in rows])
        for field, words in READ.items()
    }


def train(
    pictures: Tensor, scenes: Sequence[Scene], settings: Fit, folder: Path, device: torch.device
) -> tuple[Judge, dict[str, Any]]:
    """Train a judge on uint8 pictures (N, 3, H, W) of `scenes`, with a little noise; returns it and the record."""
    torch.manual_seed(settings.seed)
    targets = {field: given for field, given in labels(scenes).items() if (given != IGNORED).any()}
    judge = Judge(tuple(targets)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(pictures), (settings.batch,), generator=generator)
        batch = pictures[rows].float() / 255
        noisy = (batch + 0.02 * torch.randn(batch.shape, generator=generator)).to(device)
        logits = judge(noisy)
        return torch.stack([_loss(logits[f].float(), targets[f][rows].to(device)) for f in logits]).sum(), {}

    record = fit("judge", judge, loss, settings, folder)
    return judge.eval(), record


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of the words that can be seen; 0 where none can."""
    seen = (target != IGNORED).sum().clamp(min=1)
    return nn.functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum") / seen


def accuracy(judge: Judge, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of right words per attribute, on pictures in [0, 1] that should show `scenes`; unseeable words do not count."""
    read = judge.read(pictures)
    counts: dict[str, list[bool]] = {field: [] for field in READ}
    for words, scene in zip(read, scenes, strict=True):
        for field in shown(scene).keys() & words.keys():
            counts[field].append(words[field] == shown(scene)[field])
    return {field: sum(right) / len(right) for field, right in counts.items() if right}


def save(judge: Judge, path: Path) -> None:
    """Write the judge as float16 safetensors."""
    save_file({key: value.half().contiguous() for key, value in judge.state_dict().items()}, path)


def load(path: Path) -> Judge:
    """Read a judge of the attributes that it was trained for, in float32 and evaluation mode. Raises ModelError."""
    try:
        weights = {key: value.float() for key, value in load_file(path).items()}
        judge = Judge([field for field in READ if f"heads.{field}.weight" in weights])
        judge.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{path}: holds no judge, or is damaged; give a folder that `tabletop train` made") from error
    return judge.eval()
