"""LPIPS: how different two pictures look to an ImageNet network.

Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv
1801.03924, eq. 1, version 0.1. The squared differences of channel-normalised features are weighted per channel, summed over
channels, averaged over positions and summed over layers. Values of different nets cannot be compared: PIE-Bench's tables are
SqueezeNet's, the EasyInv paper's are VGG16's. The weights are read from files the user has; nothing is downloaded.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from easyinv_edit.errors import InputError, first_line
from easyinv_edit.evaluation.metrics import black_outside, check_pictures

Net: TypeAlias = Literal["vgg", "alex", "squeeze"]

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation for pictures in [-1, 1]."""
BACKBONES_FROM = "https://download.pytorch.org/models/"
HEADS_FROM = "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1"


class Fire(nn.Module):
    """SqueezeNet's block: to `thin` channels, then to `wide` twice, by 1 x 1 and by 3 x 3. Names are torchvision's."""

    def __init__(self, channels: int, thin: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, thin, 1)
        self.expand1x1 = nn.Conv2d(thin, wide, 1)
        self.expand3x3 = nn.Conv2d(thin, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu()


def _vgg16() -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for number, (width, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        layers += [nn.MaxPool2d(2)] if number else []
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return layers


def _alexnet() -> list[nn.Module]:
    first, second = nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.Conv2d(64, 192, 5, padding=2)
    layers = [first, nn.ReLU(), nn.MaxPool2d(3, 2), second, nn.ReLU(), nn.MaxPool2d(3, 2)]
    for channels, width in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
    return layers


def _squeezenet() -> list[nn.Module]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    layers = [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool()]
    layers += [Fire(128, 32, 128), Fire(256, 32, 128), pool(), Fire(256, 48, 192), Fire(384, 48, 192)]
    return [*layers, Fire(384, 64, 256), Fire(512, 64, 256)]


@dataclass(frozen=True)
class Backbone:
    """A torchvision network's `features`. taps: layers whose outputs are compared; widths: their channels; file: what
    torchvision calls its weights; least: the shortest side it can see, pixels."""

    build: Callable[[], list[nn.Module]]
    taps: tuple[int, ...]
    widths: tuple[int, ...]
    file: str
    least: int


BACKBONES: dict[Net, Backbone] = {
    "vgg": Backbone(_vgg16, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), "vgg16-397923af.pth", 16),
    "alex": Backbone(_alexnet, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), "alexnet-owt-7be5be79.pth", 31),
    "squeeze": Backbone(
        _squeezenet, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512), "squeezenet1_1-b8a52dc0.pth", 17
    ),
}


class LPIPS:
    """LPIPS with weights from local files.

    net: "vgg" (VGG16), "alex" (AlexNet) or "squeeze" (SqueezeNet 1.1); backbone_path: torchvision's weights of that net;
    heads_path: LPIPS's own, `lin0.model.1.weight` and so on; both .pth or .safetensors; device: where to compute, in float32.
    Raises InputError where a file is missing or holds something else, naming what to download.
    """

    def __init__(
        self,
        net: Net,
        backbone_path: str | PathLike[str],
        heads_path: str | PathLike[str],
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        if net not in BACKBONES:
            raise InputError(f"LPIPS: net {net!r} is unknown; choose {', '.join(BACKBONES)}")
        self.net, self.device, self.backbone = net, torch.device(device), BACKBONES[net]
        self._layers = self._read_backbone(Path(backbone_path)).to(self.device)
        self._heads = [head.to(self.device) for head in self._read_heads(Path(heads_path))]
        self._shift, self._scale = (torch.tensor(c, device=self.device)[:, None, None] for c in (SHIFT, SCALE))

    @property
    def name(self) -> str:
        """What tables call it; the net is part of the name."""
        return f"LPIPS ({self.net})"

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
        """Distances (B,) of RGB pictures (B, 3, H, W) in [0, 1], float32 on the CPU; 0 where they are equal.

        mask: (B or 1, 1, H, W): both pictures are made black where it is not above 0.5, as PIE-Bench does ("compat"); nan where
        it is empty. Raises InputError for other shapes or values and for pictures too small for the net.
        """
        check_pictures(a, b)
        if min(a.shape[-2:]) < self.backbone.least:
            raise InputError(f"{self.name}: pictures of {a.shape[-1]} x {a.shape[-2]}; its least side is {self.backbone.least}")
        if mask is None:
            return self._distance(a, b)
        (a, empty), (b, _) = black_outside(a, mask), black_outside(b, mask)
        return self._distance(a, b).masked_fill(empty, math.nan)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self._heads, self._features(a), self._features(b), strict=True)
        return torch.stack([(head * (x - y).square()).sum(1).mean((1, 2)) for head, x, y in pairs]).sum(0).cpu()

    def _features(self, pictures: Tensor) -> list[Tensor]:
        """Features (B, C, h, w) at the taps, each position of length 1 over its channels."""
        x = (pictures.to(self.device, torch.float32) * 2 - 1 - self._shift) / self._scale
        found = []
        for number, layer in enumerate(self._layers):
            x = layer(x)
            if number in self.backbone.taps:
                found.append(x / (x.norm(dim=1, keepdim=True) + 1e-10))
        return found

    def _read_backbone(self, path: Path) -> nn.Sequential:
        advice = f"download {self.backbone.file} from {BACKBONES_FROM}"
        layers = nn.Sequential(*self.backbone.build()).eval().requires_grad_(False)
        shapes = {f"features.{key}": value.shape for key, value in layers.state_dict().items()}
        tensors = _read(path, shapes, f"torchvision's backbone of LPIPS ({self.net})", advice)
        layers.load_state_dict({key.removeprefix("features."): value.float() for key, value in tensors.items()})
        return layers

    def _read_heads(self, path: Path) -> list[Tensor]:
        advice = f"download {self.net}.pth from {HEADS_FROM}"
        shapes = {f"lin{i}.model.1.weight": torch.Size((1, width, 1, 1)) for i, width in enumerate(self.backbone.widths)}
        return [value.float() for value in _read(path, shapes, f"the heads of {self.name}", advice).values()]


def _read(path: Path, shapes: Mapping[str, torch.Size], what: str, advice: str) -> dict[str, Tensor]:
    """The tensors of a weights file named in `shapes`, in that order. Raises InputError in one line that ends in `advice`."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; it should hold {what}: {advice}")
    try:
        safe = path.suffix == ".safetensors"
        found = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to run whatever the file says
        raise InputError(f"{path}: cannot be read as {what} (damaged, or more than plain tensors); {advice}") from error
    except Exception as error:  # a damaged file raises nearly every type
        raise InputError(f"{path}: cannot be read as {what} ({first_line(error)}); {advice}") from error
    tensors = found if isinstance(found, Mapping) else {}
    wrong = [key for key, shape in shapes.items() if getattr(tensors.get(key), "shape", None) != shape]
    if wrong:
        raise InputError(f"{path}: is not {what} ({wrong[0]} is missing or has another shape); {advice}")
    return {key: tensors[key] for key in shapes}
