"""The judge: a small classifier that reads a scene's words off its picture, to measure what a model drew.

Its own accuracy on held-out pictures is reported with every figure it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from easyinv_edit.tabletop.fitting import Fit, fit
from easyinv_edit.tabletop.scene import WORDS, Scene

IGNORED = -100
"""Label of a word that the picture cannot show."""


class Judge(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1] -> logits per attribute; 0.6 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 192)
        stages = [_stage(a, b) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(192 * 4 * 4, 128), nn.ReLU())
        self.heads = nn.ModuleDict({field: nn.Linear(128, len(words)) for field, words in WORDS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.body(pictures * 2 - 1)
        return {field: head(features) for field, head in self.heads.items()}

    @torch.no_grad()
    def read(self, pictures: Tensor) -> list[dict[str, str]]:
        """The word of every attribute, for each picture (B, 3, H, W); other sizes than 64 are averaged down."""
        device = next(self.parameters()).device
        small = nn.functional.adaptive_avg_pool2d(pictures.to(device), 64)
        best = {field: logits.argmax(-1).tolist() for field, logits in self(small).items()}
        return [{field: WORDS[field][rows[i]] for field, rows in best.items()} for i in range(len(pictures))]


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    norm = nn.GroupNorm(8, channels_out)
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2))


def shown(scene: Scene) -> dict[str, str]:
    """The words a picture of `scene` can show: a plain object has no second colour, a plain ball or ring no pose."""
    words = {field: getattr(scene, field) for field in WORDS}
    if scene.texture == "plain":
        words.pop("second")
        if scene.shape in ("ball", "ring"):
            words.pop("pose")
    return words


def labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Class numbers per attribute, `IGNORED` where the picture cannot show it."""
    rows = [shown(scene) for scene in scenes]
    return {
        field: torch.tensor([words.index(row[field]) if field in row else IGNORED for row in rows])
        for field, words in WORDS.items()
    }


def train(
    pictures: Tensor, scenes: Sequence[Scene], settings: Fit, folder: Path, device: torch.device
) -> tuple[Judge, dict[str, Any]]:
    """Train a judge on uint8 pictures (N, 3, 64, 64) of `scenes`, with a little noise; returns it and the record."""
    torch.manual_seed(settings.seed)
    judge = Judge().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    targets = labels(scenes)

    def loss(generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(pictures), (settings.batch,), generator=generator)
        batch = pictures[rows].float() / 255
        noisy = (batch + 0.02 * torch.randn(batch.shape, generator=generator)).to(device)
        logits = judge(noisy)
        losses = [
            nn.functional.cross_entropy(logits[f].float(), targets[f][rows].to(device), ignore_index=IGNORED) for f in logits
        ]
        return torch.stack(losses).sum(), {}

    record = fit("judge", judge, loss, settings, folder)
    return judge.eval(), record


def accuracy(judge: Judge, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of right words per attribute, on pictures in [0, 1] that should show `scenes`; unseeable words do not count."""
    read = judge.read(pictures)
    counts: dict[str, list[bool]] = {field: [] for field in WORDS}
    for words, scene in zip(read, scenes, strict=True):
        for field, word in shown(scene).items():
            counts[field].append(words[field] == word)
    return {field: sum(right) / len(right) for field, right in counts.items() if right}


def save(judge: Judge, path: Path) -> None:
    """Write the judge as float16 safetensors."""
    save_file({key: value.half().contiguous() for key, value in judge.state_dict().items()}, path)


def load(path: Path) -> Judge:
    """Read a judge, in float32 and evaluation mode."""
    judge = Judge()
    judge.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return judge.eval()
