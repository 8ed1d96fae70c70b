"""What the pipeline refuses, in words, before any work is done."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from easyinv_edit.backbones.sd import same_model
from easyinv_edit.conditioning import Conditioning
from easyinv_edit.errors import EasyInvWarning, InputError, TrajectoryError
from easyinv_edit.output import OUTPUT_TYPES
from easyinv_edit.trajectory import Trajectory


def steps(num_inference_steps: int, method: Any = None) -> int:
    """The number of steps, at least 1, and at least as many as the method needs to make sense."""
    if num_inference_steps < 1:
        raise InputError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
    fewest = getattr(method, "fewest_steps", 1)
    if num_inference_steps < fewest:
        raise InputError(
            f"{method.name}: needs at least {fewest} steps, and {num_inference_steps} were asked; for few-step models use "
            "renoise, fixed_point, edit_friendly or ddim"
        )
    return num_inference_steps


DECIDED = ("num_inference_steps", "size", "fit", "method", "inversion", "inversion_guidance_scale", "source_prompt")
"""What `invert` is told, by its names and by those of `EditPipeline.__call__`."""


def decided(arguments: Iterable[str]) -> None:
    """That an edit is not asked for what its inversion has decided. Raises TypeError, as for every unknown argument."""
    if wrong := [name for name in arguments if name in DECIDED]:
        raise TypeError(
            f"{', '.join(wrong)}: decided when the image is inverted, and an edit cannot change it; invert the image again "
            "with it, and edit that inversion"
        )


def some(given: Any, what: str) -> None:
    """A list with something in it, and no single text."""
    if isinstance(given, str):
        raise InputError(f"{what}: one text was given; give a list")
    if len(given) < 1:
        raise InputError(f"{what}: the list is empty; give at least one")


def one_per_image(prompts: Sequence[Any], count: int, generator: Any) -> None:
    """A prompt for each image of a batch and, where generators are listed, a generator for each."""
    if isinstance(prompts, str) or len(prompts) != count:
        given = "one text" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise InputError(f"prompts: {given} for {count} images; give a list with one prompt per image")
    if isinstance(generator, Sequence) and len(generator) != count:
        raise InputError(f"generator: a list of {len(generator)} for {count} images; give one generator, or one per image")


def edit(prompts: Sequence[Any], noise_mix: float, output_type: str) -> None:
    """The arguments of an edit that stand alone."""
    if not prompts or not all(isinstance(prompt, str | Conditioning) for prompt in prompts):
        raise InputError("prompt: give a target prompt, or a list of them")
    if not 0 <= noise_mix <= 1:
        raise InputError(f"noise_mix is {noise_mix}; it is a share between 0 (inverted noise) and 1 (fresh noise)")
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type is {output_type!r}; choose {', '.join(OUTPUT_TYPES)}")


def guidance(method: str, fitted: float | None, used: float) -> None:
    """Warn where a method fitted itself to another guidance scale than the one an edit uses."""
    if fitted is not None and fitted != used:
        warnings.warn(
            f"{method}: its embeddings were fitted for guidance {fitted:g}, but this edit uses {used:g}; invert with "
            f"guidance_scale {used:g} in the method's settings, or edit at {fitted:g}",
            EasyInvWarning,
            stacklevel=3,
        )


def sources(given: Sequence[Trajectory], backbone: Any, name: str, wanted: int, control: str) -> None:
    """That the sources of an edit go with the model, and are as many as its controller reads."""
    if len(given) < wanted:
        raise InputError(f"{control}: reads a second inversion, of a style picture; give it as `style`")
    if len(given) > wanted:
        raise InputError(f"{control}: reads no second inversion; leave `style` out, or use the portrait controller")
    for each in given:
        trajectory(each, backbone, name)


def trajectory(given: Trajectory, backbone: Any, name: str) -> None:
    """That an inversion was made by this model, on its schedule, from one image. Raises TrajectoryError."""
    if given.model and not same_model(given.model, backbone.identity()):
        theirs, mine = given.model.get("name") or "another model", name or "this one"
        raise TrajectoryError(f"the inversion was made by {theirs}, not by {mine}; invert the image again with this model")
    if backbone.schedule(len(given.schedule)) != given.schedule:
        raise TrajectoryError("the inversion was made on another noise schedule; invert the image again")
    if given.latents.shape[1] != 1:
        raise TrajectoryError(f"the inversion holds {given.latents.shape[1]} images; take one of its `rows()`")
