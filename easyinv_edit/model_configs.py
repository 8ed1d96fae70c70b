"""What of the configuration files of a diffusers model decides whether and how it can be used, with diffusers' own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from easyinv_edit.choices import plain
from easyinv_edit.weight_files import Unreadable, read_json

Depth = int | tuple[int, ...]
"""Transformer layers of a block: of each of its attentions alike, or one by one."""


@checked(frozen=True, config=ConfigDict(extra="ignore"))
class UNetConfig:
    """Of `unet/config.json`."""

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    layers_per_block: int | tuple[int, ...] = 2
    transformer_layers_per_block: int | tuple[Depth, ...] = 1
    reverse_transformer_layers_per_block: tuple[Depth, ...] | None = None
    cross_attention_dim: int | tuple[int, ...] = 1280
    addition_embed_type: str | None = None
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    time_cond_proj_dim: int | None = None

    def __post_init__(self) -> None:
        lists = {
            "up_block_types": self.up_block_types,
            "layers_per_block": self.layers_per_block,
            "transformer_layers_per_block": self.transformer_layers_per_block,
            "reverse_transformer_layers_per_block": self.reverse_transformer_layers_per_block,
        }
        blocks = len(self.down_block_types)
        for name, value in lists.items():
            if isinstance(value, tuple) and len(value) != blocks:
                raise ValueError(f"{name} has {len(value)} entries for {blocks} down_block_types")

    @property
    def self_attention_sites(self) -> int:
        """How many self-attention layers it has, as `attention_control.list_sites` counts them."""
        blocks = len(self.down_block_types)
        layers = self.layers_per_block if isinstance(self.layers_per_block, tuple) else (self.layers_per_block,) * blocks
        given = self.transformer_layers_per_block
        down: tuple[Depth, ...] = given if isinstance(given, tuple) else (given,) * blocks
        up = down[::-1] if self.reverse_transformer_layers_per_block is None else self.reverse_transformer_layers_per_block
        count = sum(_sites(*block) for block in zip(self.down_block_types, layers, down, strict=True))
        count += sum(_sites(kind, n + 1, d) for kind, n, d in zip(self.up_block_types, layers[::-1], up, strict=True))
        return count + _sites(self.mid_block_type or "", 1, down[-1] if down else 0)


def _sites(kind: str, layers: int, depth: Depth) -> int:
    """The sites of a block: one in every layer of every transformer, where it has transformers."""
    if kind not in ("CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D"):
        return 0
    return sum(depth[:layers]) if isinstance(depth, tuple) else layers * depth


@checked(frozen=True, config=ConfigDict(extra="ignore"))
class VAEConfig:
    """Of `vae/config.json`."""

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell and side."""
        return 2 ** (len(self.block_out_channels) - 1)


@checked(frozen=True, config=ConfigDict(extra="ignore"))
class SchedulerConfig:
    """Of `scheduler/scheduler_config.json`; what it leaves out is DDIM's default, whatever its class, as in our schedule."""

    beta_start: float | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True)
class Configs:
    """Those of one model; None where a file is missing or cannot be read."""

    unet: UNetConfig | None = None
    vae: VAEConfig | None = None
    scheduler: SchedulerConfig | None = None

    @property
    def native_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels the UNet was trained for, where it is told."""
        if self.unet is None or self.vae is None or self.unet.sample_size is None:
            return None
        side = self.unet.sample_size
        height, width = side if isinstance(side, tuple) else (side, side)
        return height * self.vae.downscale, width * self.vae.downscale


KINDS: Mapping[str, tuple[str, type[Any]]] = {
    "unet": ("config.json", UNetConfig),
    "vae": ("config.json", VAEConfig),
    "scheduler": ("scheduler_config.json", SchedulerConfig),
}


def read_configs(folder: Path) -> tuple[Configs, list[str]]:
    """The configurations of a model folder, and what is wrong with them, each a line; missing files are not a problem here."""
    read, problems = {}, []
    for part, (name, kind) in KINDS.items():
        file = folder / part / name
        if not file.is_file():
            continue
        try:
            read[part] = TypeAdapter(kind).validate_python(read_json(file))
        except Unreadable as error:
            problems.append(f"{part}/{name}: {error}")
        except ValidationError as error:
            item = error.errors(include_url=False)[0]
            key = "".join(f"{part}: " for part in item["loc"][:1])
            problems.append(f"{part}/{name}: {key}{plain(item)}")
    return Configs(**read), problems
