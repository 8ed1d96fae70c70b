"""What an inversion method is, and what methods share: the loop up the levels, seeded noise, and composition."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import BeforeValidator, ConfigDict
from torch import Tensor, nn

from easyinv_edit.choices import build, describe
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import EasyInvWarning
from easyinv_edit.sampling import Sampler
from easyinv_edit.schedule import require_finite
from easyinv_edit.trajectory import Trajectory

OnLevel = Callable[[int, Tensor], None]
"""Told (level, its latents) after each level; for progress, callbacks and cancelling by an exception."""
Generators = torch.Generator | Sequence[torch.Generator] | None
"""Where random numbers come from: torch's own, one generator for all rows, or one per row (as in diffusers)."""
SETTINGS = ConfigDict(extra="forbid", validate_default=True)


@runtime_checkable
class InversionMethod(Protocol):
    """A frozen dataclass whose fields are its settings and its YAML keys; run state is local to `invert`.

    passes: how often `invert` visits every level; the first pass goes up, the second, of methods that refine, comes down;
    fewest_steps: below which the pipeline refuses it, because what comes out is no use.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    passes: ClassVar[int] = 1
    fewest_steps: ClassVar[int] = 1

    def invert(
        self, denoiser: Denoiser, z0: Tensor, on_level: OnLevel | None = None, generator: Generators = None
    ) -> Trajectory:
        """Clean latents z0 (rows, C, H, W) -> their trajectory."""

    def evaluations(self, num_inference_steps: int, guided: bool = False) -> int:
        """UNet evaluations per row for T steps: exactly, or at most where a tolerance may stop early.

        guided: inverting at a guidance scale other than 1, which costs two evaluations for one.
        """

    def sampler(self, trajectory: Trajectory) -> Sampler:
        """How a trajectory of this method is sampled: by DDIM's steps, unless the method says otherwise."""
        return Sampler()


def climb(
    method: InversionMethod,
    denoiser: Denoiser,
    z0: Tensor,
    step: Callable[[Tensor, int], Tensor],
    on_level: OnLevel | None,
    guidance_matters: bool = True,
) -> Trajectory:
    """Go from level 0 to T with `step(latents of level - 1, level) -> latents of level` and keep every level.

    Warns above guidance 1, where inversion amplifies its own error (`guidance_matters`: exact inverses do not); raises
    NonFiniteError at the first bad level.
    """
    if guidance_matters and max(denoiser.guidance) > 1:
        warnings.warn(
            f"{method.name}: inverting at guidance {max(denoiser.guidance):g} amplifies the inversion's error; "
            "1 is the value to invert at, whatever the edit uses",
            EasyInvWarning,
            stacklevel=2,
        )
    levels = [z0]
    for level in range(1, len(denoiser.schedule) + 1):
        levels.append(require_finite(step(levels[-1], level), method.name, level))
        if on_level is not None:
            on_level(level, levels[-1])
    return Trajectory(
        latents=torch.stack(levels),
        schedule=denoiser.schedule,
        method=method.name,
        settings=settings_of(method),
        guidance_scale=denoiser.guidance[0],
    )


def settings_of(method: InversionMethod) -> dict[str, Any]:
    """The fields of a method, JSON-able; a composed method is a mapping with its name."""
    return {key: value for key, value in describe(method).items() if key != "name"}


def draw(like: Tensor, generator: Generators) -> Tensor:
    """Unit noise of the shape of `like` (rows, C, H, W), in its dtype and on its device.

    Drawn in float32 where the generator lives, so that a seed means the same noise on every device and in every dtype.
    """
    sources = list(generator) if isinstance(generator, Sequence) else [generator]
    shape = like.shape if len(sources) == 1 else (1, *like.shape[1:])
    drawn = [torch.randn(shape, generator=g, device="cpu" if g is None else g.device) for g in sources]
    return torch.cat(drawn).to(like)


def _method(choice: Any) -> Any:
    from easyinv_edit.inversion import INVERSIONS  # late: the registry imports every method

    method = build(INVERSIONS, choice, "base inversion")
    if not isinstance(method, InversionMethod):
        raise ValueError(
            f"should be an inversion method: a name, or a mapping with name and settings ({', '.join(INVERSIONS)})"
        )
    return method


def by_name(name: str) -> Any:
    """A dataclass field whose default is the registered method of that name with its own defaults."""
    return field(default_factory=lambda: {"name": name})


def samples_by_ddim(method: InversionMethod) -> bool:
    """Whether trajectories of this method are sampled by DDIM's plain steps."""
    return type(method).sampler is InversionMethod.sampler


def _pivots(choice: Any) -> Any:
    method = _method(choice)
    if not samples_by_ddim(method):
        raise ValueError(
            f"{method.name} has a sampler of its own, but DDIM's steps are what is refined here; use ddim or easyinv"
        )
    return method


def _uncomposed(choice: Any) -> Any:
    method = _method(choice)
    if hasattr(method, "base"):
        raise ValueError(f"{method.name} decides the guidance itself; give its base instead")
    return method


def _other_than_proximal(choice: Any) -> Any:
    method = _method(choice)
    if method.name == "proximal":
        raise ValueError("proximal guidance cannot refine itself")
    return method


Pivots = Annotated[Any, BeforeValidator(_pivots)]
"""A method whose trajectory another one refines; sampled by DDIM's plain steps."""
Uncomposed = Annotated[Any, BeforeValidator(_uncomposed)]
"""Any method that is not itself composed of others."""
Guided = Annotated[Any, BeforeValidator(_other_than_proximal)]
"""Any method but proximal guidance."""


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Gradients can be taken through `network` but not for its weights: half the memory; its flags are put back."""
    trained = [p for p in network.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
