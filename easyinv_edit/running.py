"""Carry out a recipe: open its model, find its image, invert, edit."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from easyinv_edit.backbones import load_lora
from easyinv_edit.errors import InputError, RecipeError, first_line
from easyinv_edit.feature_storage import FromInversion, chosen_features
from easyinv_edit.images import MIN_SIDE, load, to_pil
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.recipe import EditRecipe
from easyinv_edit.result import EditResult
from easyinv_edit.trajectory import Trajectory

if TYPE_CHECKING:
    from easyinv_edit.tabletop.scene import Scene

SCENES = ("scene:", "table:")
"""What stands before a seed: of one solid in the middle, or of the wider world, one or two solids at places."""
KEPT = (
    "model", "schedule", "lora", "lora_scale", "low_memory", "image", "style", "style_prompt", "source_features", "batch_size",
    "dtype", "device", "output",
)  # fmt: skip
"""Keys of a recipe that a result records as they were given; the others it knows itself."""


def resolve_device(device: str) -> torch.device:
    """A torch device; "auto" is CUDA, then MPS, then the CPU. Raises InputError where it does not exist here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here ({first_line(error)}); try 'auto' or 'cpu'") from error


def open_pipeline(recipe: EditRecipe, **options: Any) -> EditPipeline:
    """Load the recipe's model in its dtype on its device; options as for `EditPipeline.from_pretrained`."""
    device = resolve_device(recipe.device)
    options = {"dtype": getattr(torch, recipe.dtype), "schedule": recipe.schedule, **options}
    pipe = EditPipeline.from_pretrained(recipe.model, device=None if recipe.low_memory else device, **options)
    if recipe.lora is not None:
        load_lora(pipe.backbone.pipe, recipe.lora, recipe.lora_scale)
    if recipe.low_memory:
        pipe.enable_low_memory(device)
    return pipe


def source_image(spec: str, size: tuple[int, int]) -> str | Image.Image:
    """The image a recipe names: a path as it is, or the tabletop scene of "scene:SEED" or "table:SEED", rendered at `size`."""
    return rendered(scene_of(spec), size) if spec.startswith(SCENES) else spec


def scene_of(spec: str) -> Scene:
    """The tabletop scene of "scene:SEED" or "table:SEED"."""
    from easyinv_edit.tabletop.scene import random_scene, random_table

    world, _, seed = spec.partition(":")
    if not seed.isdecimal():
        raise InputError(f"image {spec!r}: write {world}:SEED with a whole number, e.g. {world}:7")
    return (random_scene if world == "scene" else random_table)(int(seed))


def rendered(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """A scene as a square picture of the shorter side."""
    from easyinv_edit.tabletop.render import render

    return to_pil(render([scene], min(size))[0] * 2 - 1)[0]


def require_image_and_prompts(recipe: EditRecipe, name: str = "recipe") -> None:
    """Raise RecipeError naming whatever an edit still lacks."""
    missing = {"image": recipe.image, "prompts": recipe.prompts}
    if lacking := [f"{name}: {key}: is missing; an edit needs it" for key, value in missing.items() if not value]:
        raise RecipeError(lacking)


def require_readable_image(image: str) -> None:
    """Raise ImageError or InputError where an image cannot be used, before a model is loaded for it."""
    picture = source_image(image, (MIN_SIDE, MIN_SIDE))
    if isinstance(picture, str):
        load(picture)


def require_readable_masks(control: Any) -> None:
    """Raise ImageError where a controller's mask file cannot be used, before a model is loaded for it."""
    for key, value in control.items() if isinstance(control, dict) else ():
        if key.endswith("_mask") and isinstance(value, str):
            load(value)
        for part in value if isinstance(value, list) else ():
            require_readable_masks(part)


def invert_recipe(recipe: EditRecipe, pipe: EditPipeline) -> Trajectory:
    """The inversion half of a recipe."""
    keeping = isinstance(chosen_features(recipe.source_features), FromInversion)
    return _inverted(recipe, pipe, recipe.image or "", recipe.source_prompt, keeping)


def _inverted(recipe: EditRecipe, pipe: EditPipeline, image: str, prompt: str, keeping: bool = False) -> Trajectory:
    size: Any = tuple(recipe.size) if isinstance(recipe.size, list) else recipe.size
    native = pipe.backbone.native_size if size is None else (size, size) if isinstance(size, int) else size
    return pipe.invert(
        source_image(image, native),
        prompt,
        recipe.inversion,
        keep_features=recipe.control if keeping else None,
        num_inference_steps=recipe.num_inference_steps,
        guidance_scale=recipe.inversion_guidance_scale,
        negative_prompt=recipe.negative_prompt,
        size=size,
        fit=recipe.fit,
        generator=_generator(recipe),
    )


def _generator(recipe: EditRecipe) -> torch.Generator | None:
    return None if recipe.seed is None else torch.Generator().manual_seed(recipe.seed)


def edit_recipe(recipe: EditRecipe, pipe: EditPipeline, trajectory: Trajectory) -> EditResult:
    """The editing half of a recipe; the result records the whole recipe as it was given."""
    result = pipe.edit(
        trajectory,
        recipe.prompts,
        control=recipe.control,
        style=None if recipe.style is None else _inverted(recipe, pipe, recipe.style, recipe.style_prompt),
        source_features=recipe.source_features,
        batch_size=recipe.batch_size,
        guidance_scale=recipe.guidance_scale,
        source_guidance_scale=recipe.source_guidance_scale,
        negative_prompt=recipe.negative_prompt,
        pin_source=recipe.pin_source,
        noise_mix=recipe.noise_mix,
        generator=_generator(recipe),
    )
    kept = {key: getattr(recipe, key) for key in KEPT}
    return dataclasses.replace(result, recipe={**result.recipe, **kept})


def run_recipe(recipe: EditRecipe, pipe: EditPipeline | None = None) -> EditResult:
    """Carry out a whole recipe, on a pipeline already open if one is given."""
    require_image_and_prompts(recipe)
    pipe = pipe or open_pipeline(recipe)
    return edit_recipe(recipe, pipe, invert_recipe(recipe, pipe))
