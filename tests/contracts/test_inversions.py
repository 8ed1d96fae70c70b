"""What every registered inversion method promises, whatever its paper."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from easyinv_edit.cost import measured
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.inversion import INVERSIONS, InversionMethod
from easyinv_edit.trajectory import Trajectory
from tests.helpers import denoiser_like, make_schedule, relative_error, smooth_latent, toy_denoiser

pytestmark = [
    pytest.mark.parametrize("name", INVERSIONS),
    pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning"),
]
T = 10
KINDS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])


def toy(steps: int = T, kind: str = "epsilon", rows: int = 1, guidance: float = 1.0) -> Denoiser:
    schedule = make_schedule(steps, kind)
    return toy_denoiser(denoiser_like(schedule), schedule, rows, [guidance] * rows)


def inverted(name: str, z0: Tensor, denoiser: Denoiser) -> Trajectory:
    return INVERSIONS[name]().invert(denoiser, z0)


def assert_same(a: Trajectory, b: Trajectory) -> None:
    """Bitwise, extras included."""
    assert torch.equal(a.latents, b.latents)
    assert a.extras.keys() == b.extras.keys()
    for key in a.extras:
        assert torch.equal(a.extras[key], b.extras[key]), key


def test_it_is_a_frozen_dataclass_registered_under_its_name(name: str) -> None:
    method = INVERSIONS[name]
    assert dataclasses.is_dataclass(method)
    assert method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert method.name == name
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name), "a word to type in YAML and on the command line"
    assert isinstance(method(), InversionMethod)
    assert method() == method(), "settings are compared, not identity"


def test_it_names_its_paper_and_tells_its_cost(name: str) -> None:
    method = INVERSIONS[name]
    assert method.paper.strip()
    text = f"{method.__doc__} {inspect.getmodule(method).__doc__}"
    assert "cost" in text.lower()
    assert method.paper.removeprefix("arXiv ") in text


@KINDS
def test_the_trajectory_has_every_level_from_the_clean_latent_up(name: str, kind: str) -> None:
    denoiser, z0 = toy(kind=kind), smooth_latent()
    trajectory = inverted(name, z0, denoiser)
    assert trajectory.latents.shape == (T + 1, 1, 4, 8, 8)
    assert torch.equal(trajectory.latents[0], z0)
    assert trajectory.latents.isfinite().all()
    assert trajectory.schedule == denoiser.schedule
    assert trajectory.method == name
    steps = (trajectory.latents[1:] - trajectory.latents[:-1]).flatten(1).norm(dim=1)
    assert (steps > 0).all(), "every level is a latent of its own"


def test_its_settings_build_it_again(name: str, tmp_path: Path) -> None:
    trajectory = inverted(name, smooth_latent(), toy())
    trajectory.save(tmp_path / "a.safetensors")
    for settings in (trajectory.settings, Trajectory.load(tmp_path / "a.safetensors").settings):
        assert INVERSIONS[name](**settings) == INVERSIONS[name]()


@pytest.mark.parametrize("steps", [4, 5, 10, 30])
def test_evaluations_are_the_rows_the_network_saw(name: str, steps: int) -> None:
    denoiser, method = toy(steps), INVERSIONS[name]()
    with measured(denoiser.backbone.network) as cost:
        method.invert(denoiser, smooth_latent())
    assert cost.evaluations == method.evaluations(steps) > 0


def test_a_guided_row_costs_twice(name: str) -> None:
    denoiser, method = toy(guidance=3.0), INVERSIONS[name]()
    with measured(denoiser.backbone.network) as cost:
        method.invert(denoiser, smooth_latent())
    assert cost.evaluations == 2 * method.evaluations(T)


def test_two_rows_cost_twice(name: str) -> None:
    denoiser, method = toy(rows=2), INVERSIONS[name]()
    with measured(denoiser.backbone.network) as cost:
        method.invert(denoiser, smooth_latent(rows=2))
    assert cost.evaluations == 2 * method.evaluations(T)


def test_the_guidance_it_was_made_at_is_kept(name: str) -> None:
    assert inverted(name, smooth_latent(), toy(guidance=3.0)).guidance_scale == 3.0


def test_a_second_run_of_the_same_object_is_bitwise_the_first(name: str) -> None:
    method, denoiser, z0 = INVERSIONS[name](), toy(), smooth_latent()
    first = method.invert(denoiser, z0)
    method.invert(denoiser, smooth_latent(seed=5))
    assert_same(method.invert(denoiser, z0), first)


def test_rows_are_independent(name: str) -> None:
    denoiser, z0 = toy(rows=2), smooth_latent(rows=2)
    both = inverted(name, z0, denoiser)
    for r in range(2):
        single = inverted(name, z0[r : r + 1], denoiser.select([r]))
        assert relative_error(both.latents[:, r : r + 1], single.latents) < 1e-12


def test_the_prompt_matters(name: str) -> None:
    """Rows 0 and 1 of the toy differ in conditioning alone."""
    denoiser, z0 = toy(rows=2), smooth_latent()
    first, second = (inverted(name, z0, denoiser.select([r])) for r in range(2))
    assert not torch.equal(first.noise, second.noise)


@KINDS
def test_float32_latents_stay_float32(name: str, kind: str) -> None:
    z0 = smooth_latent()
    single, double = inverted(name, z0.float(), toy(kind=kind)), inverted(name, z0, toy(kind=kind))
    assert single.latents.dtype == torch.float32
    assert relative_error(single.latents.double(), double.latents) < 1e-4


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_it_works_with_and_without_gradients(name: str, context: type[torch.no_grad]) -> None:
    with context():
        trajectory = inverted(name, smooth_latent(), toy())
    assert_same(trajectory, inverted(name, smooth_latent(), toy()))


def test_saved_and_reloaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    trajectory = inverted(name, smooth_latent(), toy())
    trajectory.save(tmp_path / "a.safetensors")
    again = Trajectory.load(tmp_path / "a.safetensors")
    assert_same(again, trajectory)
    assert (again.schedule, again.method) == (trajectory.schedule, name)


@KINDS
@pytest.mark.parametrize("size", [(8, 12), (6, 4)])
def test_latents_need_not_be_square(name: str, size: tuple[int, int], kind: str) -> None:
    z0 = smooth_latent(size=size)
    trajectory = inverted(name, z0, toy(kind=kind))
    assert trajectory.latents.shape == (T + 1, 1, 4, *size)
    assert torch.equal(trajectory.clean, z0)


def test_on_level_is_told_every_level_once_going_up(name: str) -> None:
    told: list[tuple[int, Tensor]] = []
    trajectory = INVERSIONS[name]().invert(toy(), smooth_latent(), lambda level, z: told.append((level, z.clone())))
    assert [level for level, _ in told] == list(range(1, T + 1))
    for level, z in told:
        assert torch.equal(z, trajectory.latents[level])


def test_an_exception_in_on_level_stops_the_work(name: str) -> None:
    class Cancelled(Exception):
        pass

    levels: list[int] = []

    def cancel(level: int, _z: Tensor) -> None:
        levels.append(level)
        if level == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        INVERSIONS[name]().invert(toy(), smooth_latent(), cancel)
    assert levels == [1, 2, 3]


def test_the_clean_latent_is_left_unchanged(name: str) -> None:
    z0 = smooth_latent()
    inverted(name, z0, toy())
    assert torch.equal(z0, smooth_latent())
