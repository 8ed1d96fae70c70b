"""EditPipeline: the facade that knows every room.

    pipe = EditPipeline.embedded()
    trajectory = pipe.invert("ball.png", "a red striped ball")
    result = pipe.edit(trajectory, "a red striped cube")

Argument names and defaults are diffusers' wherever it has them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from attention_control import CONTROLLERS, Controller, controlled
from easyinv_edit import images
from easyinv_edit.backbones import load_pipeline, wrap
from easyinv_edit.backbones.sd import same_model
from easyinv_edit.choices import build, describe
from easyinv_edit.cost import Cost, measured
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import InputError, TrajectoryError
from easyinv_edit.images import ImageInput
from easyinv_edit.inversion import INVERSIONS, InversionMethod
from easyinv_edit.output import OUTPUT_TYPES, OutputType, finish
from easyinv_edit.result import EditResult
from easyinv_edit.rows import streams_of, with_source_twin
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory

Callback = Callable[["EditPipeline", int, int, dict[str, Tensor]], "dict[str, Tensor] | None"]
"""diffusers' `callback_on_step_end`: (pipeline, step, timestep, {"latents": ...}) -> the same dict, or None."""


class EditPipeline:
    """Inverts real images and edits them with text. Holds a backbone and nothing that changes from edit to edit."""

    def __init__(self, backbone: Any, name: str = "") -> None:
        self.backbone = backbone
        self.name = name or str(backbone.identity()["name"])
        self._bar: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> EditPipeline:
        """Load a Stable Diffusion 1.x or 2.x model.

        model: a folder, a hub name, or "embedded" for the model that comes with this package; dtype: of the weights, by default
        float32; device: where to put it (None: leave it on the CPU); options: anything `DiffusionPipeline.from_pretrained`
        takes (`variant`, `revision`, `local_files_only`, `cache_dir`, `token`, ...). Weights are read from safetensors only and
        no remote code is run. Raises ModelError in one line.
        """
        folder = embedded_folder() if str(model) == "embedded" else model
        pipe = load_pipeline(str(folder), dtype=dtype or torch.float32, **options)
        return cls(wrap(pipe if device is None else pipe.to(device)), str(model))

    @classmethod
    def from_pipe(cls, pipe: Any) -> EditPipeline:
        """Wrap a loaded diffusers pipeline: the same objects, no cast, no copy; its scheduler is read and never changed."""
        return cls(wrap(pipe))

    @classmethod
    def embedded(cls, *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None) -> EditPipeline:
        """The small model this package trains and ships: solids on a tabletop at 64 pixels. Works offline, on a CPU."""
        return cls.from_pretrained("embedded", dtype=dtype, device=device, local_files_only=True)

    def set_progress_bar_config(self, **config: Any) -> None:
        """Settings of the progress bars, tqdm's names; `disable=True` turns them off."""
        self._bar = config

    @torch.no_grad()
    def invert(
        self,
        image: ImageInput,
        prompt: str = "",
        method: str | Mapping[str, Any] | InversionMethod = "easyinv",
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        negative_prompt: str | None = None,
        size: int | tuple[int, int] | None = None,
        fit: Literal["crop", "pad", "stretch"] = "crop",
        callback_on_step_end: Callback | None = None,
    ) -> Trajectory:
        """Turn an image into a trajectory of latents.

        image: path, PIL picture, array (H, W, C) or tensor (C, H, W); prompt: what it shows, may be empty; method: a name of
        `INVERSIONS`, a mapping with "name" and settings, or an object; guidance_scale: 1 is right for nearly everyone;
        size: picture side or (height, width) in pixels, by default what the model was trained for; fit: how the image is
        brought to that size; callback_on_step_end: observes, cannot change the latents. Raises ImageError or InputError on bad
        input. Cost: the method's `evaluations(num_inference_steps)`, twice that with guidance.
        """
        chosen = build(INVERSIONS, method, "inversion method")
        picture, record = images.fit(images.load(image), self._size(size), fit)
        schedule = self.backbone.schedule(_positive_steps(num_inference_steps))
        denoiser = self._denoiser([prompt], (guidance_scale,), negative_prompt, schedule)
        z0 = self.backbone.encode(images.to_tensor(picture).to(self.backbone.device))
        with self._progress("inverting", num_inference_steps) as advance, measured(self.backbone.network) as cost:

            def on_level(level: int, z: Tensor) -> None:
                advance()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, level - 1, schedule.timesteps[level], {"latents": z})

            trajectory = chosen.invert(denoiser, z0, on_level)
        source = images.to_uint8(images.to_tensor(picture))[0]
        identity = {**self.backbone.identity(), "name": self.name}
        return replace(trajectory, prompt=prompt, model=identity, source=source, fit=record.as_dict(), cost=cost)

    @torch.no_grad()
    def edit(
        self,
        source: Trajectory | ImageInput,
        prompt: str | Sequence[str],
        *,
        control: str | Mapping[str, Any] | Controller = "masactrl",
        guidance_scale: float = 7.5,
        source_guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        pin_source: bool = True,
        noise_mix: float = 0.0,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callback | None = None,
        output_type: OutputType = "pil",
    ) -> EditResult:
        """Edit an inverted image (or an image, which is then inverted with `invert`'s defaults) to one or more target prompts.

        control: a name of `CONTROLLERS`, a mapping with "name" and settings, or an object; guidance_scale: of the targets, 1
        turns guidance off; source_guidance_scale: of the source branch, by default that of the inversion, and without effect
        where the source is pinned; pin_source: overwrite the source branch with the trajectory at every level, which makes
        its reconstruction exact; noise_mix: share in [0, 1] of fresh noise from `generator` in the targets' start (variance is
        kept), 1 forgetting the inverted noise; callback_on_step_end: may return changed "latents"; output_type: "pil" (at the
        original image's size), "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent".

        Raises TrajectoryError where the trajectory belongs to another model or schedule, InputError on other bad input. Cost
        per step: one row per target, one more per guided target, and the source's row (with an unconditional twin where its
        prompt is not the negative one) where the controller reads it or it is not pinned.
        """
        trajectory = source if isinstance(source, Trajectory) else self.invert(source)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        chosen = build(CONTROLLERS, control, "controller")
        self._check_edit(trajectory, prompts, noise_mix, output_type)
        own_scale = trajectory.guidance_scale if source_guidance_scale is None else source_guidance_scale
        guidance = (own_scale, *(guidance_scale for _ in prompts))
        denoiser = self._denoiser([trajectory.prompt, *prompts], guidance, negative_prompt, trajectory.schedule)
        start = self._start(trajectory, len(prompts), noise_mix, generator)
        pin = trajectory if pin_source else None
        z, cost = self._sample(denoiser, start, chosen, pin, callback_on_step_end)
        recipe = {
            "model": self.name,
            **_recipe_of(trajectory),
            "prompts": prompts,
            "negative_prompt": negative_prompt,
            "control": describe(chosen),
            "guidance_scale": guidance_scale,
            "source_guidance_scale": source_guidance_scale,
            "pin_source": pin_source,
            "noise_mix": noise_mix,
            "seed": None if generator is None else generator.initial_seed(),
            "size": [side * self.backbone.downscale for side in _sides(start)],
        }
        costs = {"invert": trajectory.cost, "edit": cost}
        return finish(
            self.backbone, trajectory, prompts, z, recipe=recipe, cost=costs, output_type=output_type, pinned=pin_source
        )

    def __call__(
        self,
        image: ImageInput,
        prompt: str | Sequence[str],
        source_prompt: str = "",
        *,
        inversion: str | Mapping[str, Any] | InversionMethod = "easyinv",
        num_inference_steps: int = 50,
        inversion_guidance_scale: float = 1.0,
        size: int | tuple[int, int] | None = None,
        fit: Literal["crop", "pad", "stretch"] = "crop",
        **edit_options: Any,
    ) -> EditResult:
        """`invert` then `edit` in one call; edit_options are those of `edit`."""
        trajectory = self.invert(
            image,
            source_prompt,
            inversion,
            num_inference_steps=num_inference_steps,
            guidance_scale=inversion_guidance_scale,
            negative_prompt=edit_options.get("negative_prompt"),
            size=size,
            fit=fit,
        )
        return self.edit(trajectory, prompt, **edit_options)

    def _size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        height, width = self.backbone.native_size if size is None else (size, size) if isinstance(size, int) else size
        multiple = self.backbone.size_multiple
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise InputError(f"size {height} x {width}: both sides must be positive multiples of {multiple} for this model")
        return height, width

    def _denoiser(
        self, prompts: Sequence[str], guidance: tuple[float, ...], negative_prompt: str | None, schedule: Any
    ) -> Denoiser:
        if any(scale < 0 for scale in guidance):
            raise InputError(f"guidance scale {min(guidance):g} is negative; 1 turns guidance off, 7.5 is usual")
        embedded = self.backbone.embed([*prompts, negative_prompt or ""])
        rows = range(len(prompts))
        negative = embedded.select([len(prompts)] * len(prompts))
        return Denoiser(self.backbone, schedule, embedded.select(rows), guidance, negative)

    def _check_edit(self, trajectory: Trajectory, prompts: Sequence[str], noise_mix: float, output_type: str) -> None:
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError("prompt: give a target prompt, or a list of them")
        if not 0 <= noise_mix <= 1:
            raise InputError(f"noise_mix is {noise_mix}; it is a share between 0 (inverted noise) and 1 (fresh noise)")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type is {output_type!r}; choose {', '.join(OUTPUT_TYPES)}")
        if trajectory.model and not same_model(trajectory.model, self.backbone.identity()):
            theirs, mine = trajectory.model.get("name") or "another model", self.name or "this one"
            raise TrajectoryError(f"the inversion was made by {theirs}, not by {mine}; invert the image again with this model")
        if self.backbone.schedule(len(trajectory.schedule)) != trajectory.schedule:
            raise TrajectoryError("the inversion was made on another noise schedule; invert the image again")

    def _start(self, trajectory: Trajectory, targets: int, noise_mix: float, generator: torch.Generator | None) -> Tensor:
        noise = trajectory.noise.to(self.backbone.device)
        own = noise.repeat(targets, 1, 1, 1)
        if noise_mix > 0:
            on = "cpu" if generator is None else generator.device
            fresh = torch.randn(own.shape, generator=generator, device=on, dtype=own.dtype).to(own.device)
            own = (1 - noise_mix**2) ** 0.5 * own + noise_mix * fresh
        return torch.cat([noise, own])

    def _sample(
        self, denoiser: Denoiser, start: Tensor, control: Controller, pin: Trajectory | None, callback: Callback | None
    ) -> tuple[Tensor, Cost]:
        """Run the loop from `start` under control; returns the latents of level 0, the source first, and what it cost."""
        schedule, steps = denoiser.schedule, len(denoiser.schedule)
        with (
            controlled(self.backbone.network, control, num_steps=steps, latent_size=_sides(start)) as session,
            self._progress("editing", steps) as advance,
            measured(self.backbone.network) as cost,
        ):

            def after_step(level: int, z: Tensor) -> Tensor:
                advance()
                if callback is None:
                    return z
                changed = callback(self, steps - level - 1, schedule.timesteps[level + 1], {"latents": z})
                return z if changed is None else changed.get("latents", z)

            z = sample(
                with_source_twin(denoiser, any(session.reads_source(step) for step in range(steps))),
                start,
                pin=pin,
                reads_source=session.reads_source,
                control=lambda step, batch: session.step(step, streams_of(batch)),
                after_step=after_step,
            )
        return z, cost

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[], Any]]:
        with tqdm(**{"total": total, "desc": what, "leave": False, **self._bar}) as bar:
            yield bar.update


def embedded_folder() -> Path:
    """Where the embedded model lies: an ordinary diffusers folder."""
    return Path(str(files("easyinv_edit") / "tabletop" / "weights"))


def _recipe_of(trajectory: Trajectory) -> dict[str, Any]:
    """What an inversion contributes to the recipe of an edit."""
    return {
        "source_prompt": trajectory.prompt,
        "num_inference_steps": len(trajectory.schedule),
        "inversion": {"name": trajectory.method, **trajectory.settings},
        "inversion_guidance_scale": trajectory.guidance_scale,
        "fit": (trajectory.fit or {}).get("policy", "crop"),
    }


def _positive_steps(steps: int) -> int:
    if steps < 1:
        raise InputError(f"num_inference_steps is {steps}; it must be at least 1")
    return steps


def _sides(z: Tensor) -> tuple[int, int]:
    return z.shape[-2], z.shape[-1]
