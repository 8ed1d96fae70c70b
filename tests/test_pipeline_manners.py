"""EditPipeline's manners: its callbacks, what it leaves behind on a model, and what it refuses in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attention_control import ControlError, MasaCtrl
from easyinv_edit.errors import ImageError, InputError, NonFiniteError, TrajectoryError
from easyinv_edit.inversion import INVERSIONS
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory

T = 3
CONTROLLED = MasaCtrl(start_step=1)
SOURCE, TARGETS = "a red ball", ["a blue cube", "a green cone"]


@pytest.fixture
def inverted(untrained: EditPipeline, picture: Image.Image) -> Trajectory:
    """The picture inverted with DDIM in T steps, its prompt empty."""
    return untrained.invert(picture, method="ddim", num_inference_steps=T)


# Callbacks


def test_callbacks_have_diffusers_signature(untrained: EditPipeline, picture: Image.Image) -> None:
    seen: list[tuple[int, int, tuple[int, ...]]] = []

    def watch(pipe: EditPipeline, step: int, timestep: int, tensors: dict[str, Tensor]) -> None:
        assert pipe is untrained
        seen.append((step, timestep, tuple(tensors["latents"].shape)))

    inverted = untrained.invert(picture, method="ddim", num_inference_steps=T, callback_on_step_end=watch)
    labels = list(inverted.schedule.timesteps[1:])
    assert seen == [(step, labels[step], (1, 4, 16, 16)) for step in range(T)]
    seen.clear()
    untrained.edit(inverted, TARGETS, control="none", callback_on_step_end=watch, output_type="latent")
    assert seen == [(step, labels[T - 1 - step], (3, 4, 16, 16)) for step in range(T)]


def test_latents_a_callback_returns_are_used(untrained: EditPipeline, inverted: Trajectory) -> None:
    def clear(_pipe: EditPipeline, step: int, _timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.zeros_like(tensors["latents"])} if step == T - 1 else {}

    result = untrained.edit(inverted, "x", callback_on_step_end=clear, output_type="latent")
    assert not result.images.any()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_edit_leaves_nothing_behind(untrained: EditPipeline, inverted: Trajectory, error: Any) -> None:
    before = dict(untrained.backbone.network.attn_processors)

    def stop(*_given: Any) -> None:
        raise error

    with pytest.raises(error):
        untrained.edit(inverted, "x", control=CONTROLLED, callback_on_step_end=stop)
    with pytest.raises(error):
        untrained.invert(inverted.source.permute(2, 0, 1), num_inference_steps=8, callback_on_step_end=stop)
    assert_untouched(untrained, before)


# What it leaves behind


def assert_untouched(pipe: EditPipeline, processors: dict[str, Any]) -> None:
    """No hooks, and the same attention processor objects as before."""
    network = pipe.backbone.network
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    after = network.attn_processors
    assert after.keys() == processors.keys()
    assert all(after[name] is processors[name] for name in processors)


def test_nothing_is_left_on_the_model(untrained: EditPipeline, picture: Image.Image) -> None:
    network, scheduler = untrained.backbone.network, untrained.backbone.pipe.scheduler
    before, weights = dict(network.attn_processors), {k: v.clone() for k, v in network.state_dict().items()}
    timesteps = scheduler.timesteps.clone()
    untrained(picture, TARGETS, SOURCE, num_inference_steps=8, output_type="latent")
    assert_untouched(untrained, before)
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())
    assert torch.equal(scheduler.timesteps, timesteps)
    assert set(vars(untrained)) == {"backbone", "name", "_bar", "_frugal"}


@pytest.mark.parametrize("steps", [T, 4 * T])
def test_diffusers_looks_through_the_model_once_a_call_however_many_its_steps(
    untrained: EditPipeline, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    asked: list[str] = []
    for kind, name in ((type(untrained.backbone.pipe), "_execution_device"), (type(untrained.backbone.network), "dtype")):
        usual = getattr(kind, name).fget
        monkeypatch.setattr(kind, name, property(lambda self, usual=usual, name=name: asked.append(name) or usual(self)))
    trajectory = untrained.invert(picture, method="ddim", num_inference_steps=steps)
    untrained.reconstruct(trajectory)
    assert asked.count("_execution_device") == 2
    few = len(asked)
    untrained.edit(trajectory, TARGETS, control="none", output_type="latent")
    assert asked.count("_execution_device") == 3
    assert few < 10, "beside ours, diffusers' own questions when it encodes a prompt"


def test_a_model_moved_between_two_calls_is_asked_again(untrained: EditPipeline, picture: Image.Image) -> None:
    options: dict[str, Any] = {"method": "ddim", "num_inference_steps": T}
    assert untrained.invert(picture, **options).latents.dtype == torch.float32
    with pytest.raises(InputError):
        untrained.invert(picture, num_inference_steps=0)
    untrained.backbone.pipe.to(torch.float64)
    assert untrained.invert(picture, **options).latents.dtype == torch.float64


def test_calls_that_overlap_leave_nothing_settled(untrained: EditPipeline) -> None:
    """As two threads enter and leave them: the first to come is the first to go."""
    backbone = untrained.backbone
    first, second = backbone.settled(), backbone.settled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    backbone.pipe.to(torch.float64)
    assert backbone.network_dtype == torch.float64
    second.__exit__(None, None, None)
    backbone.pipe.to(torch.float32)
    assert backbone.network_dtype == torch.float32


def test_works_inside_inference_mode(untrained: EditPipeline, picture: Image.Image) -> None:
    with torch.inference_mode():
        inside = untrained(picture, TARGETS, inversion="ddim", num_inference_steps=T)
    outside = untrained(picture, TARGETS, inversion="ddim", num_inference_steps=T)
    assert np.array_equal(np.asarray(inside.comparison), np.asarray(outside.comparison))
    again = untrained.edit(inside.trajectory, TARGETS)  # made in inference mode, used outside
    assert np.array_equal(np.asarray(again.comparison), np.asarray(outside.comparison))
    assert not outside.trajectory.latents.requires_grad


def test_the_progress_bar_can_be_turned_off(untrained: EditPipeline, picture: Image.Image, capsys: Any) -> None:
    untrained(picture, "x", inversion="ddim", num_inference_steps=2, output_type="latent")
    assert capsys.readouterr() == ("", "")
    untrained.set_progress_bar_config()
    untrained(picture, "x", inversion="ddim", num_inference_steps=2, output_type="latent")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "inverting" in printed.err
    assert "editing" in printed.err


# What it refuses


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "ddom"}, "'ddom' is unknown; choose easyinv.*did you mean 'ddim'"),
        ({"method": {"name": "easyinv", "et": 1}}, "et: unknown setting.*did you mean 'eta'"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be at least 1"),
        ({"num_inference_steps": 1001}, "1001.*use fewer steps"),
        ({"guidance_scale": -1.0}, "guidance scale -1 is negative"),
        ({"size": 60}, "size 60 x 60: both sides must be positive multiples of 32"),
        ({"size": (64, 0)}, "size 64 x 0"),
        ({"size": -64}, "size -64"),
        ({"fit": "zoom"}, "'zoom'.*crop, pad, stretch"),
    ],
)
def test_invert_refuses_in_one_line(untrained: EditPipeline, picture: Image.Image, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        untrained.invert(picture, **options)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": []}, "give a target prompt"),
        ({"prompt": [3]}, "give a target prompt"),
        ({"control": "masactl"}, "controller 'masactl' is unknown.*did you mean 'masactrl'"),
        ({"guidance_scale": -2.0}, "guidance scale -2 is negative"),
        ({"source_guidance_scale": -2.0}, "guidance scale -2 is negative"),
        ({"noise_mix": 1.5}, "noise_mix is 1.5"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; choose pil, np, pt, latent"),
    ],
)
def test_edit_refuses_in_one_line(untrained: EditPipeline, inverted: Trajectory, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        untrained.edit(inverted, **{"prompt": "x", **options})
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("option", [{"num_inference_steps": 20}, {"size": 64}, {"inversion": "ddim"}, {"source_prompt": "a"}])
def test_an_edit_cannot_change_what_its_inversion_has_decided(
    untrained: EditPipeline, inverted: Trajectory, picture: Image.Image, option: dict[str, Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(EditPipeline, "invert", None)  # a picture is refused before it is inverted for nothing
    for source in (inverted, picture):
        with pytest.raises(
            TypeError, match=rf"^{next(iter(option))}: decided when the image is inverted.*invert the image again"
        ):
            untrained.edit(source, "x", **option)


def test_a_controller_that_hits_nothing_is_refused(untrained: EditPipeline, inverted: Trajectory) -> None:
    with pytest.raises(ControlError, match="match none"):
        untrained.edit(inverted, "x", control=MasaCtrl(sites="90-95"))
    with pytest.raises(ControlError, match="start earlier"):
        untrained.edit(inverted, "x", control=MasaCtrl(start_step=T))


def test_another_models_trajectory_is_refused(untrained: EditPipeline, inverted: Trajectory) -> None:
    with torch.no_grad():
        untrained.backbone.network.conv_in.weight.mul_(1.1)
    with pytest.raises(TrajectoryError, match="invert the image again with this model"):
        untrained.edit(inverted, "x")


def test_another_schedules_trajectory_is_refused(untrained: EditPipeline, inverted: Trajectory) -> None:
    scheduler = untrained.backbone.pipe.scheduler
    untrained.backbone.pipe.scheduler = type(scheduler).from_config(scheduler.config, beta_end=0.02)
    with pytest.raises(TrajectoryError, match="another noise schedule; invert the image again"):
        untrained.edit(inverted, "x")


def test_a_bad_image_is_refused(untrained: EditPipeline, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        untrained(tmp_path / "none.png", "x")


def test_a_latent_that_is_not_finite_names_where(untrained: EditPipeline, inverted: Trajectory) -> None:
    def spoil(_pipe: EditPipeline, step: int, _t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * float("nan")} if step == 1 else tensors

    with pytest.raises(NonFiniteError, match="sampling"):
        untrained.edit(inverted, "x", callback_on_step_end=spoil)


@pytest.mark.parametrize("name", [name for name, method in INVERSIONS.items() if method.fewest_steps > 1])
def test_a_method_that_makes_no_sense_at_four_steps_says_which_does(
    untrained: EditPipeline, picture: Image.Image, name: str
) -> None:
    with pytest.raises(InputError, match=rf"{name}: needs at least 10 steps, and 4 were asked; .* renoise"):
        untrained.invert(picture, method=name, num_inference_steps=4)
    assert len(untrained.invert(picture, method=name, num_inference_steps=10).schedule) == 10
