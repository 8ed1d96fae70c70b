"""What an inversion returns: the latents of every level and all that is needed to sample from them again.

Saved as one safetensors file with a JSON header, never a pickle; reloaded bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from easyinv_edit.cost import Cost
from easyinv_edit.errors import TrajectoryError
from easyinv_edit.schedule import NoiseSchedule

FORMAT = "easyinv-edit trajectory 1"
EXTRA = "extra."
GIVEN = "given."


@dataclass(frozen=True)
class Trajectory:
    """Latents of levels 0 (clean) .. T (noise) of one source.

    latents: (T + 1, rows, C, H, W); schedule: the one they were made on, the only one they may be sampled on;
    method, settings: the inversion method's registry name and fields; prompt, guidance_scale: the source branch's;
    extras: tensors (levels, rows, ...) a method needs at sampling time or leaves for information; model: the identity the
    backbone gave itself; source: the encoded picture, uint8 (H, W, 3), and fit: how it was made from the user's image; cost: of
    inverting; given: parts (rows, ...) of the source's conditioning that came as tensors: prompt embeddings, pictures of
    IP-Adapters and ControlNets; features: what the source put into attention sites meanwhile, if asked for (not saved).
    """

    latents: Tensor
    schedule: NoiseSchedule
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = ""
    guidance_scale: float = 1.0
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    source: Tensor | None = None
    fit: Mapping[str, Any] | None = None
    cost: Cost = field(default_factory=Cost)
    given: Mapping[str, Tensor] = field(default_factory=dict)
    features: Any = field(default=None, compare=False)

    @property
    def clean(self) -> Tensor:
        """The latent of level 0: the encoded source (rows, C, H, W)."""
        return self.latents[0]

    @property
    def noise(self) -> Tensor:
        """The latent of level T, where sampling starts (rows, C, H, W)."""
        return self.latents[-1]

    def rows(self) -> list[Trajectory]:
        """A trajectory of several images as one trajectory each; what it cost is shared out evenly."""
        count = self.latents.shape[1]
        evaluations = -(-self.cost.evaluations // count)
        share = replace(self.cost, evaluations=evaluations, seconds=self.cost.seconds / count)
        return [
            replace(
                self,
                latents=self.latents[:, r : r + 1],
                extras={name: extra[:, r : r + 1] for name, extra in self.extras.items()},
                given={name: part[r : r + 1] for name, part in self.given.items()},
                cost=share,
            )
            for r in range(count)
        ]

    @classmethod
    def join(cls, trajectories: Sequence[Trajectory]) -> Trajectory:
        """Trajectories of one method, schedule and size as one of several rows; prompt, source and fit are the first's.

        Raises TrajectoryError where they do not go together.
        """
        first = trajectories[0]
        for other in trajectories[1:]:
            if other._kind() != first._kind():
                raise TrajectoryError(
                    "these inversions differ in method, settings, guidance, schedule or size, so they are no batch; take each "
                    "kind by itself"
                )
        latents = torch.cat([t.latents for t in trajectories], 1)
        extras = {name: torch.cat([t.extras[name] for t in trajectories], 1) for name in first.extras}
        common = [name for name in first.given if all(name in t.given for t in trajectories)]
        given = {name: torch.cat([t.given[name] for t in trajectories]) for name in common}
        return replace(first, latents=latents, extras=extras, given=given)

    def _kind(self) -> tuple[Any, ...]:
        """What inversions of one batch have in common; settings as a file would hold them."""
        settings = json.dumps(self.settings, default=dict, sort_keys=True)
        size = tuple(self.latents.shape[2:])
        return self.method, settings, self.guidance_scale, self.schedule, size, sorted(self.extras)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trajectory; the file appears whole or not at all. Raises TrajectoryError where that is impossible."""
        target = Path(path)
        header = {name: getattr(self, name) for name in ("method", "settings", "prompt", "guidance_scale", "model", "fit")}
        header |= {"schedule": self.schedule.as_dict(), "cost": asdict(self.cost)}
        tensors = {"latents": self.latents, **{EXTRA + name: extra for name, extra in self.extras.items()}}
        tensors |= {GIVEN + name: part for name, part in self.given.items()}
        if self.source is not None:
            tensors["source"] = self.source
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            content = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
            save_file(content, partial, metadata={"format": FORMAT, "header": json.dumps(header, default=dict)})
            partial.replace(target)
        except (OSError, SafetensorError) as error:
            raise TrajectoryError(f"{target}: cannot be written ({error}); choose a writable place") from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Trajectory:
        """Read a saved trajectory. Raises TrajectoryError where the file is missing, damaged or something else."""
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise TrajectoryError(f"{path}: cannot be read as an inversion ({error}); make one with `invert`") from error
        if metadata.get("format") != FORMAT:
            raise TrajectoryError(f"{path}: is a safetensors file but no inversion of this version; make one with `invert`")
        try:
            header = json.loads(metadata["header"])
            made = cls(
                latents=tensors.pop("latents"),
                source=tensors.pop("source", None),
                schedule=NoiseSchedule.from_dict(header.pop("schedule")),
                cost=Cost(**header.pop("cost")),
                extras=_named(tensors, EXTRA),
                given=_named(tensors, GIVEN),
                **header,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TrajectoryError(f"{path}: lacks what an inversion holds ({error!r}); make it again with `invert`") from error
        if made.latents.ndim != 5 or made.latents.shape[0] != len(made.schedule) + 1:
            raise TrajectoryError(f"{path}: its latents do not fit its {len(made.schedule)} steps; make it again with `invert`")
        return made


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins so, by the rest of it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
