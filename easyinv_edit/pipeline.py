"""EditPipeline: the facade that knows every room.

    pipe = EditPipeline.embedded()
    trajectory = pipe.invert("ball.png", "a red striped ball")
    result = pipe.edit(trajectory, "a red striped cube")

Argument names and defaults are diffusers' wherever it has them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from importlib.resources import files
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, Unpack

import torch
from torch import Tensor
from tqdm.auto import tqdm

from attention_control import CONTROLLERS, Controller, ReferenceCache
from easyinv_edit import checks
from easyinv_edit.backbones import load_pipeline, wrap
from easyinv_edit.choices import build, describe
from easyinv_edit.conditions import Conditions, Row, denoiser_of, framing_of, given_parts, rows_of
from easyinv_edit.cost import Cost, measured
from easyinv_edit.denoiser import Prompt
from easyinv_edit.editing import Editing
from easyinv_edit.errors import InputError, ModelError
from easyinv_edit.feature_storage import Auto, Live, chosen_features, kept, recorded
from easyinv_edit.images import ImageInput
from easyinv_edit.inversion import INVERSIONS, InversionMethod, sampler_of
from easyinv_edit.inversion.base import Generators
from easyinv_edit.inverting import apart, inverted, sources_of
from easyinv_edit.low_memory import save_memory
from easyinv_edit.mask_files import reader
from easyinv_edit.models import on_disk, preset
from easyinv_edit.output import OutputType, finish, inversion_recipe, texts_of
from easyinv_edit.result import EditResult
from easyinv_edit.rows import source_scale, start_rows, words_of
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory

Callback = Callable[["EditPipeline", int, int, dict[str, Tensor]], "dict[str, Tensor] | None"]
"""diffusers' `callback_on_step_end`: (pipeline, step, timestep, {"latents": ...}) -> the same dict, or None."""
P = ParamSpec("P")
T = TypeVar("T")


def _at_work(method: Callable[Concatenate[EditPipeline, P], T]) -> Callable[Concatenate[EditPipeline, P], T]:
    """Without gradients, and the model asked once where and in what it computes."""

    @wraps(method)
    @torch.no_grad()
    def work(pipe: EditPipeline, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with pipe.backbone.settled():
            return method(pipe, *args, **kwargs)

    return work


class EditPipeline:
    """Inverts real images and edits them with text. Holds a backbone and nothing that changes from edit to edit."""

    def __init__(self, backbone: Any, name: str = "") -> None:
        self.backbone = backbone
        self.name = name or str(backbone.identity()["name"])
        self._bar: dict[str, Any] = {}
        self._frugal = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        schedule: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> EditPipeline:
        """Load a Stable Diffusion 1.x, 2.x or XL model; the family is read from the model itself.

        model: a folder, a hub name, a name from `easyinv-edit models list`, or "embedded" for the model that comes with this
        package; dtype: of the weights, by default float32; device: where to put it (None: leave it on the CPU); schedule: what
        of the scheduler's configuration is decided otherwise, e.g. {"timestep_spacing": "trailing"}; options: anything
        `DiffusionPipeline.from_pretrained` takes (`variant`, `revision`, `local_files_only`, `cache_dir`, `token`, ...).
        Weights are read from safetensors only and no remote code is run. Raises ModelError in one line.
        """
        known = None if str(model) == "embedded" or on_disk(model) else preset(str(model))
        if known and known.load:
            raise ModelError(f"{model}: takes more than one download; build it as `easyinv-edit models show {model}` says")
        folder = embedded_folder() if str(model) == "embedded" else known.id if known else model
        pipe = load_pipeline(str(folder), dtype=dtype or torch.float32, **options)
        decided = {**(known.schedule if known else {}), **(schedule or {})}
        return cls(wrap(pipe if device is None else pipe.to(device), decided), str(model))

    @classmethod
    def from_pipe(cls, pipe: Any, *, schedule: Mapping[str, Any] | None = None) -> EditPipeline:
        """Wrap a loaded diffusers pipeline: the same objects, no cast, no copy; its scheduler is read and never changed.

        LoRA, textual inversion, IP-Adapters, ControlNets, another autoencoder, offload and quantisation stay as they are;
        schedule: as for `from_pretrained`.
        """
        return cls(wrap(pipe, schedule))

    @classmethod
    def embedded(cls, *, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None) -> EditPipeline:
        """The small model this package trains and ships: solids on a tabletop at 128 pixels. Works offline, on a CPU."""
        return cls.from_pretrained("embedded", dtype=dtype, device=device, local_files_only=True)

    def enable_low_memory(self, device: str | torch.device | None = None) -> list[str]:
        """Turn on everything that saves memory and leaves the edit alone; returns what was turned on, in words.

        The autoencoder works on a picture at a time, and in tiles where pictures are larger than the model's own, which changes
        them visibly; prompts are edited one at a time with the source beside them instead of kept features; on an accelerator
        the parts wait in host memory for their turn (`enable_model_cpu_offload`; device: which accelerator, by default the one
        that is there). What an edit took at its peak stands in `result.cost["edit"].peak_memory_bytes`.
        """
        self._frugal = True
        switched = save_memory(self.backbone.pipe, torch.device(device) if device else None)
        return [*switched, "prompts edited one at a time", "no source features kept"]

    def set_progress_bar_config(self, **config: Any) -> None:
        """Settings of the progress bars, tqdm's names; `disable=True` turns them off."""
        self._bar = config

    def invert(
        self,
        image: ImageInput,
        prompt: Prompt = "",
        method: str | Mapping[str, Any] | InversionMethod = "easyinv",
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        negative_prompt: Prompt | None = None,
        size: int | tuple[int, int] | None = None,
        fit: Literal["crop", "pad", "stretch"] = "crop",
        generator: Generators = None,
        keep_features: str | Mapping[str, Any] | Controller | None = None,
        callback_on_step_end: Callback | None = None,
        **conditions: Unpack[Conditions],
    ) -> Trajectory:
        """Turn an image into a trajectory of latents.

        image: path, PIL picture, array (H, W, C) or tensor (C, H, W); prompt: what it shows, may be empty, or a `Conditioning`
        of one row made with the model's own `encode_prompt`; method: a name of `INVERSIONS`, a mapping with "name" and
        settings, or an object; guidance_scale: 1 is right for nearly everyone; size: picture side or (height, width) in pixels,
        by default what the model was trained for; fit: how the image is brought to that size; generator: of the methods that
        draw noise; keep_features: a controller whose source features are kept for edits with `source_features="inversion"`;
        callback_on_step_end: observes, cannot change the latents; conditions: what the source branch's IP-Adapter and
        ControlNet see, here and in every edit, by default nothing. Raises ImageError or InputError on bad input. Cost: the
        method's `evaluations(num_inference_steps)`, about twice that with guidance.
        """
        options: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        options |= {"negative_prompt": negative_prompt, "size": size, "fit": fit, "generator": generator}
        options |= {"keep_features": keep_features, "callback_on_step_end": callback_on_step_end, **conditions}
        return self.invert_batch([image], [prompt], method, **options)[0]

    @_at_work
    def invert_batch(
        self,
        images: Sequence[ImageInput],
        prompts: Sequence[Prompt],
        method: str | Mapping[str, Any] | InversionMethod = "easyinv",
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        negative_prompt: Prompt | None = None,
        size: int | tuple[int, int] | None = None,
        fit: Literal["crop", "pad", "stretch"] = "crop",
        generator: Generators = None,
        keep_features: str | Mapping[str, Any] | Controller | None = None,
        callback_on_step_end: Callback | None = None,
        **conditions: Unpack[Conditions],
    ) -> list[Trajectory]:
        """Invert several images in one batch: faster than one by one where the device has room for it.

        prompts: one per image; generator: one for all, or a list with one per image; the others are those of `invert`, the
        same for all images. The trajectories are those of single inversions up to rounding, and share the cost evenly.
        """
        chosen = build(INVERSIONS, method, "inversion method")
        checks.some(images, "images")
        checks.one_per_image(prompts, len(images), generator)
        sources = sources_of(self.backbone, images, prompts, self._size(size), fit, conditions)
        schedule = self.backbone.schedule(checks.steps(num_inference_steps, chosen))
        guidance = (guidance_scale,) * len(sources)
        denoiser = denoiser_of(self.backbone, [source.row for source in sources], guidance, negative_prompt, schedule)
        visits = num_inference_steps * getattr(chosen, "passes", 1)
        with self._working("inverting", visits) as (advance, cost):

            def on_level(level: int, z: Tensor) -> None:
                advance()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, level - 1, schedule.timesteps[level], {"latents": z})

            batch = inverted(denoiser, chosen, sources, keep_features, generator, on_level)
        return apart(batch, sources, {**self.backbone.identity(), "name": self.name}, cost)

    @_at_work
    def edit(
        self,
        source: Trajectory | ImageInput,
        prompt: Prompt | Sequence[Prompt],
        *,
        control: str | Mapping[str, Any] | Controller = "masactrl",
        style: Trajectory | None = None,
        source_features: str | Mapping[str, Any] | ReferenceCache = "auto",
        batch_size: int | None = None,
        guidance_scale: float = 7.5,
        source_guidance_scale: float | None = None,
        negative_prompt: Prompt | None = None,
        pin_source: bool = True,
        noise_mix: float = 0.0,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callback | None = None,
        output_type: OutputType = "pil",
        **conditions: Unpack[Conditions],
    ) -> EditResult:
        """Edit an inverted image (or an image, which is then inverted with `invert`'s defaults) to one or more target prompts.

        prompt: texts, or `Conditioning` of one row each in their place; control: a name of `CONTROLLERS`, a mapping with "name"
        and settings, or an object; style: a second inversion, of the same method and size, for controllers that read one;
        batch_size: targets sampled at once, by default all; source_features: "live" (the source's rows beside the targets'),
        "exact" (the pinned source evaluated once, before), "inversion" (kept by `invert(keep_features=...)`; an approximation),
        "auto" (exact where the prompts take several batches and the features fit, else live), a mapping with one of these as
        "name", where "exact" and "auto" take "dtype", "device" and "max_bytes" of what is kept (see `feature_storage`), or a
        `ReferenceCache`: an empty one says the same, and can be given again for more prompts; guidance_scale: of the targets, 1
        or less turns guidance off; negative_prompt: None for the family's own (SDXL's is no text but zeros, see
        `backbones.sdxl`); source_guidance_scale: of the source branch, by default that of the inversion, and without effect
        where the source is pinned; pin_source: overwrite the source branch with the trajectory at every level, which makes its
        reconstruction exact; noise_mix: share in [0, 1] of fresh noise from `generator` in the targets' start (variance is
        kept), 1 forgetting the inverted noise; callback_on_step_end: may return changed "latents"; output_type: "pil" (at the
        original image's size), "np" (B, H, W, C) in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent"; conditions: what the
        targets' IP-Adapter and ControlNet see, by default nothing; the source's are those it was inverted with.

        Raises TrajectoryError where the trajectory belongs to another model or schedule, InputError on other bad input. Cost
        per step: one row per target, one more per guided target, and the source's row (with an unconditional twin where its
        prompt is not the negative one) where the controller reads it or it is not pinned.
        """
        checks.decided(conditions)
        trajectory = source if isinstance(source, Trajectory) else self.invert(source)
        prompts = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else [prompt]
        chosen = build(CONTROLLERS, control, "controller")
        features = chosen_features(source_features)
        checks.edit(prompts, noise_mix, output_type)
        sources = [trajectory] if style is None else [trajectory, style]
        checks.sources(sources, self.backbone, self.name, getattr(chosen, "sources", 1), getattr(chosen, "name", "control"))
        joined = Trajectory.join(sources)
        sampler = sampler_of(joined)
        checks.guidance(trajectory.method, sampler.source_guidance, guidance_scale)
        scale = source_scale(trajectory, sampler, source_guidance_scale)
        guidance = (*(scale for _ in sources), *(guidance_scale for _ in prompts))
        start = start_rows(joined, sampler, len(prompts), noise_mix, generator).to(self.backbone.device)
        given = [given_parts(self.backbone, prompt, conditions, self._pixels(start)) for prompt in prompts]
        framing = framing_of(trajectory)
        rows = [*(row for s in sources for row in rows_of(s)), *map(Row, prompts, [framing] * len(prompts), given)]
        denoiser = denoiser_of(self.backbone, rows, guidance, negative_prompt, trajectory.schedule)
        edit = Editing(self.backbone, chosen, sampler, joined, pin_source, reader(trajectory.fit, self._pixels(start)))
        if self._frugal:
            batch_size = batch_size or 1
            features = Live() if isinstance(features, Auto) else features
        with self._working() as (_, cost):
            z, read = edit.batches(
                denoiser,
                start,
                words_of(self.backbone, [rows[0].prompt, *prompts]),
                batch_size,
                features,
                lambda total: self._progress("editing", total),
                None if callback_on_step_end is None else partial(callback_on_step_end, self),
            )
        recipe = {
            "model": self.name,
            **inversion_recipe(trajectory),
            "prompts": texts_of(prompts),
            "style_prompt": "" if style is None else style.prompt,
            "negative_prompt": None if negative_prompt is None else texts_of([negative_prompt])[0],
            "control": describe(chosen),
            "guidance_scale": guidance_scale,
            "source_guidance_scale": source_guidance_scale,
            "pin_source": pin_source,
            "source_features": recorded(features),
            "batch_size": batch_size,
            "noise_mix": noise_mix,
            "seed": None if generator is None else generator.initial_seed(),
            "size": list(self._pixels(start)),
        }
        costs = {"invert": trajectory.cost, "edit": cost} | ({} if style is None else {"style": style.cost})
        options: dict[str, Any] = {"recipe": recipe, "cost": costs, "output_type": output_type, "pinned": pin_source}
        options["features"] = kept(read)
        with ExitStack() as stack:
            stack.callback(self.backbone.release)
            return finish(self.backbone, trajectory, texts_of(prompts), z, **options)

    @_at_work
    def reconstruct(
        self,
        trajectories: Trajectory | Sequence[Trajectory],
        *,
        guidance_scale: float | None = None,
        negative_prompt: Prompt | None = None,
    ) -> tuple[Tensor, Cost]:
        """Sample inversions back alone: no pin, no control, under their own prompts and by their method's own sampler.

        trajectories: one, or several of one method and size, in one batch; guidance_scale: by default the one the method is
        reconstructed at. Returns latents (rows, C, H, W) of level 0, for `backbone.decode`, and what sampling cost. Raises
        TrajectoryError where a trajectory belongs to another model or schedule.
        """
        rows = [trajectories] if isinstance(trajectories, Trajectory) else list(trajectories)
        checks.some(rows, "trajectories")
        for row in rows:
            checks.trajectory(row, self.backbone, self.name)
        joined = Trajectory.join(rows)
        sampler = sampler_of(joined)
        scale = source_scale(joined, sampler, guidance_scale)
        asked = [row for trajectory in rows for row in rows_of(trajectory)]
        denoiser = denoiser_of(self.backbone, asked, (scale,) * len(rows), negative_prompt, joined.schedule)
        start = start_rows(joined, sampler, 0, 0.0, None).to(self.backbone.device)
        with self._working() as (_, cost):
            z = sample(denoiser, start, sampler=sampler)
        return z, cost

    def __call__(
        self,
        image: ImageInput,
        prompt: Prompt | Sequence[Prompt],
        source_prompt: Prompt = "",
        *,
        inversion: str | Mapping[str, Any] | InversionMethod = "easyinv",
        num_inference_steps: int = 50,
        inversion_guidance_scale: float = 1.0,
        size: int | tuple[int, int] | None = None,
        fit: Literal["crop", "pad", "stretch"] = "crop",
        generator: torch.Generator | None = None,
        **edit_options: Any,
    ) -> EditResult:
        """`invert` then `edit` in one call, both from the same state of `generator`; edit_options are those of `edit`."""
        state = None if generator is None else generator.get_state()
        trajectory = self.invert(
            image,
            source_prompt,
            inversion,
            num_inference_steps=num_inference_steps,
            guidance_scale=inversion_guidance_scale,
            negative_prompt=edit_options.get("negative_prompt"),
            size=size,
            fit=fit,
            generator=generator,
        )
        if generator is not None and state is not None:
            generator.set_state(state)
        return self.edit(trajectory, prompt, generator=generator, **edit_options)

    def _size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        height, width = self.backbone.native_size if size is None else (size, size) if isinstance(size, int) else size
        multiple = self.backbone.size_multiple
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise InputError(f"size {height} x {width}: both sides must be positive multiples of {multiple} for this model")
        return height, width

    def _pixels(self, z: Tensor) -> tuple[int, int]:
        """(height, width) of the picture of latents."""
        return z.shape[-2] * self.backbone.downscale, z.shape[-1] * self.backbone.downscale

    @contextmanager
    def _working(self, what: str = "", total: int = 0) -> Iterator[tuple[Callable[[], Any], Cost]]:
        """Progress and cost of work on the network; offloaded parts leave the accelerator at its end, whatever happened."""
        with ExitStack() as stack:
            stack.callback(self.backbone.release)
            cost = stack.enter_context(measured(self.backbone.network, self.backbone.device))
            yield stack.enter_context(self._progress(what, total)) if what else _nothing, cost

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[], Any]]:
        with tqdm(**{"total": total, "desc": what, "leave": False, **self._bar}) as bar:
            yield bar.update


def embedded_folder() -> Path:
    """Where the embedded model lies: an ordinary diffusers folder."""
    return Path(str(files("easyinv_edit") / "tabletop" / "weights"))


def _nothing() -> None:
    """No progress to tell."""
