"""Several images inverted at once, an inversion sampled back alone, and inversions that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from easyinv_edit.cost import Cost
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import InputError, TrajectoryError
from easyinv_edit.inversion import DDIM, EDICT, INVERSIONS, sampler_of
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory
from tests.helpers import denoiser_like, make_schedule, relative_error, seeded, smooth_latent, toy_denoiser

T = 10
PROMPTS = ["a red ball", "a blue cube"]
QUICK: dict[str, dict[str, Any]] = {
    "null_text": {"iterations": 1},
    "prompt_tuning": {"iterations": 1},
    "fixed_point": {"iterations": 2},
    "renoise": {"weights": [0, 1], "low_noise_weights": [1, 1]},
}
"""Settings that make a method fast."""
EXACT = 1e-9
"""Rounding in float64, as a share of the largest latent: O-BELM's first steps multiply it by hundreds."""
QUIET = pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")


@pytest.fixture(scope="module")
def pipe(untrained_folder: Path) -> EditPipeline:
    """A pipeline keeps nothing from call to call, so one is enough; in float64, where rounding stays small in every method."""
    pipe = EditPipeline.from_pretrained(untrained_folder, local_files_only=True, dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pictures(picture: Image.Image) -> list[Image.Image]:
    """Two images of different content and shape."""
    wide = Image.new("RGB", (96, 64), (20, 60, 120))
    wide.paste((240, 240, 200), (10, 10, 50, 40))
    return [picture, wide]


def batch(pipe: EditPipeline, images: Sequence[Any], prompts: Any = PROMPTS, **options: Any) -> list[Trajectory]:
    settings = {"method": "ddim", "num_inference_steps": T, "size": 32, **options}
    return pipe.invert_batch(images, prompts, **settings)


def single(pipe: EditPipeline, image: Any, prompt: str, **options: Any) -> Trajectory:
    settings = {"method": "ddim", "num_inference_steps": T, "size": 32, **options}
    return pipe.invert(image, prompt, **settings)


def furthest(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# A batch


@QUIET
@pytest.mark.parametrize("name", INVERSIONS)
def test_a_batch_is_its_single_inversions(pipe: EditPipeline, pictures: list[Image.Image], name: str) -> None:
    method = {"name": name, **QUICK.get(name, {})}
    both = batch(pipe, pictures, method=method, generator=seeded(5, 6))
    assert len(both) == 2
    for ours, image, prompt, seed in zip(both, pictures, PROMPTS, (5, 6), strict=True):
        alone = single(pipe, image, prompt, method=method, generator=seeded(seed)[0])
        assert ours.latents.shape == alone.latents.shape == (T + 1, 1, 4, 8, 8)
        assert furthest(ours.latents, alone.latents) < EXACT * alone.latents.abs().max().item()
        assert ours.extras.keys() == alone.extras.keys()
        for key in alone.extras:
            assert ours.extras[key].shape == alone.extras[key].shape, key
        assert (ours.settings, ours.schedule, ours.guidance_scale) == (alone.settings, alone.schedule, alone.guidance_scale)
        assert (ours.method, ours.prompt, ours.model) == (name, prompt, alone.model)
    assert furthest(both[0].clean, both[1].clean) > 0.1


def test_every_image_has_its_own_prompt_source_and_fit(pipe: EditPipeline, pictures: list[Image.Image]) -> None:
    for order in (1, -1):
        images, prompts = pictures[::order], PROMPTS[::order]
        for ours, image, prompt in zip(batch(pipe, images, prompts, fit="pad"), images, prompts, strict=True):
            alone = single(pipe, image, prompt, fit="pad")
            assert ours.prompt == prompt
            assert ours.source is not None
            assert torch.equal(ours.source, alone.source)  # type: ignore[arg-type]
            assert ours.fit == alone.fit
            assert furthest(ours.clean, alone.clean) < EXACT
    assert single(pipe, pictures[0], "", fit="pad").fit != single(pipe, pictures[1], "", fit="pad").fit, "so that it can fail"


def test_the_prompts_are_used_in_order(pipe: EditPipeline, picture: Image.Image) -> None:
    first, second = batch(pipe, [picture, picture])
    swapped = batch(pipe, [picture, picture], PROMPTS[::-1])
    assert furthest(first.noise, second.noise) > 1e-3
    assert furthest(first.noise, swapped[1].noise) < EXACT
    assert furthest(second.noise, swapped[0].noise) < EXACT


@pytest.mark.parametrize(("guidance", "each"), [(1.0, 2 * T), (3.0, 4 * T)])
def test_the_cost_is_shared(pipe: EditPipeline, pictures: list[Image.Image], guidance: float, each: int) -> None:
    both = batch(pipe, pictures, method="edict", guidance_scale=guidance)
    assert [t.cost.evaluations for t in both] == [each, each]
    assert [t.cost.calls for t in both] == [2 * T, 2 * T], "a call serves both"
    assert both[0].cost.seconds == both[1].cost.seconds > 0
    assert both[0].cost.peak_memory_bytes > 0


def test_a_generator_each_or_one_for_all(pipe: EditPipeline, picture: Image.Image) -> None:
    def noises(generator: Any) -> list[Tensor]:
        made = batch(pipe, [picture] * 2, ["", ""], method="edit_friendly", generator=generator)
        return [t.latents[1:] for t in made]

    own, again, other = noises(seeded(1, 2)), noises(tuple(seeded(1, 2))), noises(seeded(2, 1))
    assert all(torch.equal(a, b) for a, b in zip(own, again, strict=True))
    assert furthest(own[0], own[1]) > 0.1
    assert furthest(own[0], other[1]) < EXACT
    shared, repeated = noises(seeded(1)[0]), noises(seeded(1)[0])
    assert torch.equal(shared[0], repeated[0])
    assert furthest(shared[0], shared[1]) > 0.1, "one generator draws on for the second image"


def test_one_image_is_a_batch_too(pipe: EditPipeline, picture: Image.Image) -> None:
    (ours,) = batch(pipe, [picture], PROMPTS[:1], generator=seeded(0))
    assert torch.equal(ours.latents, single(pipe, picture, PROMPTS[0]).latents)


def test_a_callback_sees_all_rows(pipe: EditPipeline, pictures: list[Image.Image]) -> None:
    seen: list[tuple[int, ...]] = []

    def watch(_pipe: EditPipeline, _step: int, _timestep: int, tensors: dict[str, Tensor]) -> None:
        seen.append(tuple(tensors["latents"].shape))

    batch(pipe, pictures, callback_on_step_end=watch)
    assert seen == [(2, 4, 8, 8)] * T


def test_every_trajectory_of_a_batch_edits_saves_and_loads(
    pipe: EditPipeline, pictures: list[Image.Image], tmp_path: Path
) -> None:
    for ours, image, prompt in zip(batch(pipe, pictures, method="edict"), pictures, PROMPTS, strict=True):
        alone = single(pipe, image, prompt, method="edict")
        ours.save(tmp_path / "a.safetensors")
        loaded = Trajectory.load(tmp_path / "a.safetensors")
        first, again, other = (pipe.edit(t, "x", output_type="latent").images for t in (ours, loaded, alone))
        assert torch.equal(first, again)
        assert furthest(first, other) < EXACT * other.abs().max().item()


@pytest.mark.parametrize(
    ("count", "prompts", "generator", "says"),
    [
        (2, PROMPTS[:1], None, "prompts: 1 prompts for 2 images; give a list with one prompt per image"),
        (2, [*PROMPTS, "x"], None, "prompts: 3 prompts for 2 images"),
        (1, PROMPTS, None, "prompts: 2 prompts for 1 images"),
        (2, "ab", None, "prompts: one text for 2 images"),
        (0, [], None, "images: the list is empty"),
        (2, PROMPTS, [1], "generator: a list of 1 for 2 images"),
        (2, PROMPTS, [1, 2, 3], "generator: a list of 3 for 2 images"),
    ],
)
def test_counts_that_differ_are_refused(
    pipe: EditPipeline, picture: Image.Image, count: int, prompts: Any, generator: list[int] | None, says: str
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        batch(pipe, [picture] * count, prompts, generator=None if generator is None else seeded(*generator))
    assert len(str(caught.value).splitlines()) == 1


def test_one_path_is_no_list_of_images(pipe: EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture.save(path)
    with pytest.raises(InputError, match=r"^images"):
        batch(pipe, str(path), ["x"])


# Taken apart


def test_rows_take_a_batch_apart() -> None:
    schedule = make_schedule(T)
    trajectory = EDICT().invert(toy_denoiser(denoiser_like(schedule), schedule, 3), smooth_latent(rows=3))
    trajectory = replace(trajectory, cost=Cost(evaluations=18, calls=6, seconds=3.0, peak_memory_bytes=7))
    rows = trajectory.rows()
    assert len(rows) == 3
    assert torch.equal(torch.cat([row.latents for row in rows], dim=1), trajectory.latents)
    assert torch.equal(torch.cat([row.extras["companion"] for row in rows], dim=1), trajectory.extras["companion"])
    assert [row.cost for row in rows] == [Cost(evaluations=6, calls=6, seconds=1.0, peak_memory_bytes=7)] * 3
    assert all((row.method, row.settings, row.schedule) == ("edict", trajectory.settings, schedule) for row in rows)
    assert trajectory.latents.shape[1] == 3, "the batch stays whole"


def test_rows_joined_again_are_the_batch(pipe: EditPipeline, pictures: list[Image.Image]) -> None:
    both = batch(pipe, pictures, method="edict")
    joined = Trajectory.join(both)
    assert joined.latents.shape == (T + 1, 2, 4, 8, 8)
    for row, ours in zip(joined.rows(), both, strict=True):
        assert torch.equal(row.latents, ours.latents)
        assert torch.equal(row.extras["companion"], ours.extras["companion"])


@pytest.mark.parametrize(
    "options", [{"method": "edict"}, {"method": {"name": "easyinv", "eta": 0.9}}, {"num_inference_steps": T + 2}, {"size": 64}]
)
@QUIET
def test_inversions_that_differ_are_not_joined(pipe: EditPipeline, picture: Image.Image, options: dict[str, Any]) -> None:
    """Every difference alone."""
    settings = {"method": "easyinv", **options}
    with pytest.raises(TrajectoryError, match="differ") as caught:
        pipe.reconstruct([single(pipe, picture, "", method="easyinv"), single(pipe, picture, "", **settings)])
    assert len(str(caught.value).splitlines()) == 1


def test_a_batch_of_different_guidance_is_refused_or_sampled_at_each_its_own(pipe: EditPipeline, picture: Image.Image) -> None:
    """EDICT is exact at the scale it was inverted at and at no other."""
    both = [single(pipe, picture, PROMPTS[0], method="edict", guidance_scale=scale) for scale in (1.0, 5.0)]
    try:
        back, _ = pipe.reconstruct(both)
    except InputError:
        return
    assert relative_error(back, torch.cat([t.clean for t in both])) < 1e-3


def test_an_empty_batch_is_refused(pipe: EditPipeline) -> None:
    with pytest.raises(InputError):
        pipe.reconstruct([])


def test_a_reloaded_inversion_joins_a_live_one(pipe: EditPipeline, picture: Image.Image, tmp_path: Path) -> None:
    method = {"name": "easyinv", "window": (0.1, 0.9)}
    live = single(pipe, picture, "", method=method)
    live.save(tmp_path / "a.safetensors")
    joined = Trajectory.join([live, Trajectory.load(tmp_path / "a.safetensors")])
    assert torch.equal(joined.latents[:, 0], joined.latents[:, 1])


def test_a_batch_is_not_edited_or_sampled_as_one(pipe: EditPipeline, pictures: list[Image.Image]) -> None:
    both = Trajectory.join(batch(pipe, pictures))
    for work in (lambda: pipe.edit(both, "x"), lambda: pipe.reconstruct(both)):
        with pytest.raises(TrajectoryError, match=r"holds 2 images; take one of its `rows\(\)`") as caught:
            work()
        assert len(str(caught.value).splitlines()) == 1
    assert pipe.edit(both.rows()[1], "x", output_type="latent").images.shape == (1, 4, 8, 8)


# Sampled back alone


@QUIET
@pytest.mark.parametrize("name", INVERSIONS)
def test_a_reconstruction_is_the_inversion_sampled_back(pipe: EditPipeline, picture: Image.Image, name: str) -> None:
    """By the method's own sampler, at the scale the method is reconstructed at, under the inversion's prompt."""
    trajectory = single(pipe, picture, PROMPTS[0], method={"name": name, **QUICK.get(name, {})}, generator=seeded(0)[0])
    sampler = sampler_of(trajectory)
    words = pipe.backbone.embed([PROMPTS[0], ""])
    scale = sampler.source_guidance or trajectory.guidance_scale
    denoiser = Denoiser(pipe.backbone, trajectory.schedule, words.select([0]), (scale,), words.select([1]))
    with torch.no_grad():
        expected = sample(denoiser, trajectory.latents[sampler.start or T], sampler=sampler)
    back, cost = pipe.reconstruct(trajectory)
    assert back.shape == (1, 4, 8, 8)
    assert furthest(back, expected) < EXACT * expected.abs().max().item()
    assert not back.requires_grad
    steps = sampler.start or T
    assert cost.evaluations == steps * (2 if name == "edict" or scale != 1 else 1)
    assert cost.seconds > 0


@QUIET
@pytest.mark.parametrize("name", INVERSIONS)
def test_several_reconstructions_in_one_batch_are_each_its_own(
    pipe: EditPipeline, pictures: list[Image.Image], name: str
) -> None:
    options: dict[str, Any] = {"method": {"name": name, **QUICK.get(name, {})}, "generator": seeded(0, 1)}
    both = batch(pipe, pictures, **options)
    back, cost = pipe.reconstruct(both)
    alone = [pipe.reconstruct(t) for t in both]
    assert back.shape == (2, 4, 8, 8)
    for ours, (theirs, _) in zip(back, alone, strict=True):
        assert furthest(ours, theirs[0]) < EXACT * theirs.abs().max().item()
    assert furthest(back[0], back[1]) > 0.1
    assert cost.evaluations == sum(own.evaluations for _, own in alone)


def test_a_reconstruction_by_ddim_is_bitwise_its_sampling(pipe: EditPipeline, picture: Image.Image) -> None:
    trajectory = single(pipe, picture, "")
    words = pipe.backbone.embed(["", ""])
    with torch.no_grad():
        expected = sample(
            Denoiser(pipe.backbone, trajectory.schedule, words.select([0]), (1.0,), words.select([1])), trajectory.noise
        )
    assert torch.equal(pipe.reconstruct(trajectory)[0], expected)
    assert relative_error(expected, trajectory.clean) > 1e-4, "DDIM is no exact inverse"


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_edict_is_reconstructed_exactly_at_its_own_guidance(pipe: EditPipeline, picture: Image.Image, guidance: float) -> None:
    trajectory = single(pipe, picture, PROMPTS[0], method="edict", guidance_scale=guidance)
    back, cost = pipe.reconstruct(trajectory)
    assert relative_error(back, trajectory.clean) < 1e-3
    assert cost.evaluations == (2 if guidance == 1 else 4) * T
    other, _ = pipe.reconstruct(trajectory, guidance_scale=5.0 - guidance)
    assert relative_error(other, trajectory.clean) > 5e-3
    same, _ = pipe.reconstruct(trajectory, guidance_scale=guidance)
    assert torch.equal(same, back)


def test_a_reconstruction_can_have_the_inversions_negative_prompt(pipe: EditPipeline, picture: Image.Image) -> None:
    options = {"method": "edict", "guidance_scale": 3.0, "negative_prompt": "a green cone"}
    trajectory = single(pipe, picture, PROMPTS[0], **options)
    back, _ = pipe.reconstruct(trajectory, negative_prompt="a green cone")
    assert relative_error(back, trajectory.clean) < 1e-3
    assert relative_error(pipe.reconstruct(trajectory)[0], trajectory.clean) > 5e-3


def test_another_models_inversion_is_not_reconstructed(untrained: EditPipeline, picture: Image.Image) -> None:
    trajectory = single(untrained, picture, "")
    with torch.no_grad():
        untrained.backbone.network.conv_in.weight.mul_(1.1)
    with pytest.raises(TrajectoryError, match="invert the image again with this model"):
        untrained.reconstruct(trajectory)


# Pins that do not fit


def toy(steps: int = T, kind: str = "epsilon", rows: int = 2) -> Denoiser:
    schedule = make_schedule(steps, kind)
    return toy_denoiser(denoiser_like(schedule), schedule, rows)


def pinned(pin: Trajectory) -> Tensor:
    return sample(toy(), smooth_latent(rows=2), pin=pin)


@pytest.mark.parametrize(
    ("steps", "kind", "size", "says"),
    [
        (T + 1, "epsilon", (8, 8), rf"another noise schedule \({T + 1} steps, here {T}\); invert the image again"),
        (T, "v_prediction", (8, 8), "another noise schedule"),
        (T, "epsilon", (8, 12), "latents of 4x8x12, here they are 4x8x8; invert the image at this size"),
        (T, "epsilon", (4, 8), "latents of 4x4x8, here they are 4x8x8"),
    ],
)
def test_a_pin_that_does_not_fit_is_refused(steps: int, kind: str, size: tuple[int, int], says: str) -> None:
    pin = DDIM().invert(toy(steps, kind, rows=1), smooth_latent(size=size))
    with pytest.raises(TrajectoryError, match=says) as caught:
        pinned(pin)
    assert len(str(caught.value).splitlines()) == 1


def test_a_pin_that_fits_is_taken() -> None:
    pin = DDIM().invert(toy(rows=1), smooth_latent())
    assert torch.equal(pinned(pin)[:1], pin.clean)


def test_a_pin_of_more_images_than_rows_is_refused() -> None:
    with pytest.raises(TrajectoryError, match="holds 4 images, but 2 rows are sampled"):
        pinned(DDIM().invert(toy(rows=4), smooth_latent(rows=4)))
