"""Edits with a second inversion: a style's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from easyinv_edit.errors import InputError, TrajectoryError
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.result import EditResult
from easyinv_edit.trajectory import Trajectory
from tests.helpers import relative_error

T = 4
CONTENT, STYLE, TARGETS = "a red ball", "a blue ring", ["a blue cube", "a green cone"]
EXACT = 1e-10
"""Rounding in float64, relative."""


@dataclass
class Bench:
    """One float64 pipeline, and its inversions, each made once."""

    pipe: EditPipeline
    inversions: dict[Any, Trajectory] = field(default_factory=dict)

    def inverted(self, number: int, prompt: str = "", method: str = "ddim", steps: int = T, size: int = 32) -> Trajectory:
        """Of one of three pictures: content, style, another style."""
        key = (number, prompt, method, steps, size)
        if key not in self.inversions:
            image = Image.new("RGB", (64, 64), ((255, 255, 255), (90, 120, 200), (20, 60, 20))[number])
            image.paste(((200, 40, 40), (240, 220, 60), (10, 10, 200))[number], (16, 20 - 8 * number, 48, 52))
            self.inversions[key] = self.pipe.invert(image, prompt, method, num_inference_steps=steps, size=size)
        return self.inversions[key]

    def drawn(self, prompt: Any = TARGETS[0], style: Trajectory | None = None, **options: Any) -> EditResult:
        """The content, with prompt, drawn in a style."""
        settings = {"control": "portrait", "guidance_scale": 3.0, "output_type": "latent", **options}
        return self.pipe.edit(self.inverted(0, CONTENT), prompt, style=style or self.inverted(1, STYLE), **settings)


@pytest.fixture(scope="module")
def bench(untrained_folder: Path) -> Bench:
    pipe = EditPipeline.from_pretrained(untrained_folder, dtype=torch.float64, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return Bench(pipe)


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "control",
    [
        "portrait",
        {"name": "portrait", "draw_content": False},
        {"name": "compose", "controllers": [{"name": "portrait"}, {"name": "structure", "sites": "2-9"}]},
    ],
)
def test_a_controller_that_reads_a_style_needs_one(bench: Bench, control: Any) -> None:
    name = control if isinstance(control, str) else control["name"]
    with pytest.raises(InputError, match=f"{name}: reads a second inversion, of a style picture; give it as `style`"):
        bench.pipe.edit(bench.inverted(0), TARGETS[0], control=control)


@pytest.mark.parametrize("control", ["masactrl", "none", "structure", "style_aligned"])
def test_a_controller_that_reads_none_refuses_one(bench: Bench, control: str) -> None:
    with pytest.raises(InputError, match=f"{control}: reads no second inversion; leave `style` out"):
        bench.drawn(control=control)


@pytest.mark.parametrize("other", [{"method": "fixed_point"}, {"steps": T + 1}, {"size": 64}])
def test_a_style_of_another_kind_is_refused(bench: Bench, other: dict[str, Any]) -> None:
    with pytest.raises(TrajectoryError, match="differ in method, settings, guidance, schedule or size"):
        bench.drawn(style=bench.inverted(1, **other))


def test_a_style_of_other_settings_is_refused(bench: Bench) -> None:
    one, other = (
        bench.pipe.invert(Image.new("RGB", (64, 64)), "", {"name": "edict", "mix": mix}, num_inference_steps=10, size=32)
        for mix in (0.93, 0.95)
    )
    with pytest.raises(TrajectoryError, match="differ in method, settings"):
        bench.pipe.edit(one, TARGETS[0], control="portrait", style=other)


def test_a_style_of_several_pictures_is_refused(bench: Bench) -> None:
    style = Trajectory.join([bench.inverted(1), bench.inverted(2)])
    with pytest.raises(TrajectoryError, match="holds 2 images; take one of its `rows"):
        bench.drawn(style=style)


def test_a_style_of_another_model_is_refused(bench: Bench, untrained: EditPipeline) -> None:
    """The same weights, one of them changed."""
    with torch.no_grad():
        next(untrained.backbone.network.parameters()).add_(1)
    style = untrained.invert(Image.new("RGB", (64, 64)), "", "ddim", num_inference_steps=T, size=32)
    with pytest.raises(TrajectoryError, match="was made by"):
        bench.drawn(style=style)


@pytest.mark.parametrize("features", ["exact", "inversion"])
def test_source_features_cannot_stand_in_for_a_style(bench: Bench, features: str) -> None:
    with pytest.raises(InputError, match="needs the source's own rows; use 'live'"):
        bench.drawn(source_features=features)


def test_features_are_not_kept_for_a_controller_that_reads_a_style(bench: Bench) -> None:
    options: dict[str, Any] = {"num_inference_steps": T, "size": 32, "keep_features": "portrait"}
    with pytest.raises(InputError, match="portrait: needs the source's own rows, so its features cannot be kept"):
        bench.pipe.invert(Image.new("RGB", (64, 64)), "", "ddim", **options)


# --- what comes back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("pinned", [True, False])
def test_the_images_are_the_targets_alone(bench: Bench, count: int, pinned: bool) -> None:
    pictures = bench.drawn(TARGETS[:count], output_type="pil", pin_source=pinned)
    assert len(pictures.images) == len(pictures.edited) == count
    latents = bench.drawn(TARGETS[:count], pin_source=pinned).images
    assert latents.shape == (count, 4, 8, 8)
    assert latents.dtype == torch.float64
    sources = [bench.inverted(0, CONTENT).clean[0], bench.inverted(1, STYLE).clean[0]]
    assert all((row - source).abs().max() > 1e-3 for row in latents for source in sources), "neither content nor style"


def test_the_source_and_its_reconstruction_are_the_contents(bench: Bench) -> None:
    made = bench.drawn(output_type="pil")
    content = bench.inverted(0, CONTENT)
    assert made.trajectory is content
    assert content.source is not None
    assert made.source is not None
    assert torch.equal(torch.tensor(list(made.source.tobytes())), content.source.flatten().long())
    assert made.quality["psnr"] == pytest.approx(made.quality["vae_psnr"], abs=0.01)


def test_the_style_matters_and_so_does_the_prompt(bench: Bench) -> None:
    first = bench.drawn().images
    assert torch.equal(bench.drawn().images, first)
    changed = [
        bench.drawn(style=bench.inverted(2, STYLE)),
        bench.drawn(style=bench.inverted(1, CONTENT)),
        bench.drawn(TARGETS[1]),
    ]
    assert all(relative_error(made.images, first) > 1e-3 for made in changed)


def test_two_prompts_are_two_edits(bench: Bench) -> None:
    both = bench.drawn(TARGETS).images
    alone = [bench.drawn(target).images for target in TARGETS]
    assert relative_error(both, torch.cat(alone)) <= EXACT
    assert relative_error(both[:1], both[1:]) > 1e-3


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_do_not_change_an_edit(bench: Bench, pinned: bool) -> None:
    together, apart = (bench.drawn([*TARGETS, "a ring"], batch_size=size, pin_source=pinned) for size in (None, 2))
    assert relative_error(apart.images, together.images) <= EXACT
    assert apart.cost["edit"].evaluations > together.cost["edit"].evaluations, "live: both sources in every batch"


@pytest.mark.parametrize(
    ("prompts", "count", "guidance"),
    [(("", ""), 1, 3.0), (("", ""), 2, 1.0), ((CONTENT, STYLE), 2, 3.0), ((CONTENT, STYLE), 1, 1.0)],
)
def test_content_and_style_cost_a_row_each(bench: Bench, prompts: tuple[str, str], count: int, guidance: float) -> None:
    """And a twin each where guided targets read both halves and the halves differ."""
    content, style = (bench.inverted(i, prompt) for i, prompt in enumerate(prompts))
    options: dict[str, Any] = {"control": "portrait", "style": style, "guidance_scale": guidance, "output_type": "latent"}
    made = bench.pipe.edit(content, TARGETS[:count], **options)
    halves = 1 if guidance == 1 else 2
    sources = 2 * (halves if prompts[0] else 1)
    assert made.cost["edit"].evaluations == T * (sources + halves * count)
    assert made.cost["edit"].calls == T
    assert (made.cost["invert"].evaluations, made.cost["style"].evaluations) == (T, T)


def test_without_a_style_no_cost_of_one_is_told(bench: Bench) -> None:
    assert set(bench.pipe.edit(bench.inverted(0), TARGETS[0], control="none").cost) == {"invert", "edit"}


def test_the_recipe_says_what_was_done(bench: Bench) -> None:
    made = bench.drawn(TARGETS, control={"name": "portrait", "style_guidance": 2.0, "draw_content": False})
    control = made.recipe["control"]
    assert {key: control[key] for key in ("name", "style_guidance", "draw_content", "switch_step")} == {
        "name": "portrait",
        "style_guidance": 2.0,
        "draw_content": False,
        "switch_step": 0.7,
    }
    assert (made.recipe["source_prompt"], made.recipe["prompts"]) == (CONTENT, TARGETS)
    assert made.recipe["num_inference_steps"] == T


def test_the_callback_sees_content_style_and_targets(bench: Bench) -> None:
    seen: list[Tensor] = []

    def watch(_pipe: EditPipeline, _step: int, _timestep: int, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"].clone())

    made = bench.drawn(TARGETS, callback_on_step_end=watch)
    content, style = bench.inverted(0, CONTENT).latents, bench.inverted(1, STYLE).latents
    assert [len(z) for z in seen] == [4] * T
    assert all(torch.equal(z[:1], content[level]) for z, level in zip(seen, range(T - 1, -1, -1), strict=True))
    assert all(torch.equal(z[1:2], style[level]) for z, level in zip(seen, range(T - 1, -1, -1), strict=True))
    assert torch.equal(seen[-1][2:], made.images)


@pytest.mark.parametrize("method", ["edict", "null_text", "edit_friendly"])
def test_what_a_method_keeps_of_its_own_is_each_rows(bench: Bench, method: str) -> None:
    """Unpinned, content and style each find their way back with what their own inversion left."""
    settings: dict[str, Any] = {"null_text": {"iterations": 1, "guidance_scale": 3.0}}.get(method, {})
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ((200, 40, 40), (90, 120, 200))]
    options: dict[str, Any] = {"num_inference_steps": 10, "size": 32, "generator": torch.Generator().manual_seed(0)}
    chosen = {"name": method, **settings}
    content, style = (bench.pipe.invert(picture, CONTENT, chosen, **options) for picture in pictures)
    seen: list[Tensor] = []

    def watch(_pipe: EditPipeline, _step: int, _timestep: int, tensors: dict[str, Tensor]) -> None:
        seen.append(tensors["latents"].clone())

    control = {"name": "portrait", "draw_content": False}
    edit: dict[str, Any] = {"guidance_scale": 3.0, "pin_source": False, "output_type": "latent", "callback_on_step_end": watch}
    bench.pipe.edit(content, TARGETS[0], control=control, style=style, **edit)
    alone = torch.cat([bench.pipe.reconstruct(each)[0] for each in (content, style)])
    assert relative_error(seen[-1][:2], alone) <= EXACT
