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
from easyinv_edit.inversion import INVERSIONS, InversionMethod, sampler_of
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory
from tests.helpers import denoiser_like, make_schedule, relative_error, seeded, smooth_latent, toy_denoiser

pytestmark = [
    pytest.mark.parametrize("name", INVERSIONS),
    pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning"),
]
T = 10
KINDS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])


def toy(steps: int = T, kind: str = "epsilon", rows: int = 1, guidance: float = 1.0) -> Denoiser:
    schedule = make_schedule(steps, kind)
    return toy_denoiser(denoiser_like(schedule), schedule, rows, [guidance] * rows)


def inverted(name: str, z0: Tensor, denoiser: Denoiser, seeds: tuple[int, ...] = (0,)) -> Trajectory:
    return INVERSIONS[name]().invert(denoiser, z0, generator=seeded(*seeds))


def without_early_stop(name: str) -> InversionMethod:
    """The method with the tolerance off, if it has one: then `evaluations` is exact."""
    fields = {f.name for f in dataclasses.fields(INVERSIONS[name])}  # type: ignore[arg-type]
    return INVERSIONS[name](**({"tolerance": 0.0} if "tolerance" in fields else {}))


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


def test_every_setting_is_explained(name: str) -> None:
    method = INVERSIONS[name]
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        assert re.search(rf"\b{field.name}\b", method.__doc__ or ""), field.name


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


def test_extras_have_levels_and_rows_first(name: str) -> None:
    """So that a batch can be taken apart."""
    trajectory = inverted(name, smooth_latent(rows=3), toy(rows=3), (0, 1, 2))
    for key, extra in trajectory.extras.items():
        assert extra.shape[0] in (1, T, T + 1), key
        assert extra.shape[1] == 3, key
        assert extra.isfinite().all(), key


def test_every_extra_is_explained(name: str) -> None:
    text = f"{INVERSIONS[name].__doc__} {inspect.getmodule(INVERSIONS[name]).__doc__}"
    for key in inverted(name, smooth_latent(), toy(4)).extras:
        assert f'`extras["{key}"]`' in text, key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_network_gives_float32_latents_near_the_exact_ones(name: str, dtype: torch.dtype) -> None:
    """Half precision is the network's business: latents and steps are not rounded to it."""
    schedule = make_schedule(T)
    exact = denoiser_like(schedule)
    rounded = toy_denoiser(lambda z, t, e: exact(z, t, e).to(dtype).to(z), schedule)
    rounded.backbone.network.to(dtype)
    trajectory, reference = (inverted(name, smooth_latent().float(), d) for d in (rounded, toy()))
    assert trajectory.latents.dtype == torch.float32
    assert relative_error(trajectory.latents, reference.latents) < {torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    assert all(extra.dtype == torch.float32 for key, extra in trajectory.extras.items() if "embeddings" not in key)


def test_a_batch_comes_apart_into_its_rows(name: str) -> None:
    denoiser, z0 = toy(rows=2), smooth_latent(rows=2)
    both = inverted(name, z0, denoiser, (0, 1))
    for r, row in enumerate(both.rows()):
        assert torch.equal(row.latents[:, 0], both.latents[:, r])
        back = sample(denoiser.select([r]), row.latents[sampler_of(row).start or T], sampler=sampler_of(row))
        assert back.shape == z0[:1].shape


def test_its_settings_build_it_again(name: str, tmp_path: Path) -> None:
    trajectory = inverted(name, smooth_latent(), toy())
    trajectory.save(tmp_path / "a.safetensors")
    for settings in (trajectory.settings, Trajectory.load(tmp_path / "a.safetensors").settings):
        assert INVERSIONS[name](**settings) == INVERSIONS[name]()


@pytest.mark.parametrize("steps", [1, 4, 5, 10, 30])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_evaluations_are_the_rows_the_network_saw(name: str, steps: int, guidance: float) -> None:
    denoiser, method = toy(steps, guidance=guidance), without_early_stop(name)
    with measured(denoiser.backbone.network) as cost:
        method.invert(denoiser, smooth_latent())
    assert cost.evaluations == method.evaluations(steps, guided=guidance != 1) > 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_never_costs_more_than_it_says(name: str, guidance: float) -> None:
    denoiser, method = toy(guidance=guidance), INVERSIONS[name]()
    with measured(denoiser.backbone.network) as cost:
        method.invert(denoiser, smooth_latent())
    assert 0 < cost.evaluations <= method.evaluations(T, guided=guidance != 1)


def test_two_rows_cost_twice(name: str) -> None:
    denoiser, method = toy(rows=2), without_early_stop(name)
    with measured(denoiser.backbone.network) as cost:
        method.invert(denoiser, smooth_latent(rows=2))
    assert cost.evaluations == 2 * method.evaluations(T)


def test_the_guidance_it_was_made_at_is_kept(name: str) -> None:
    assert inverted(name, smooth_latent(), toy(guidance=3.0)).guidance_scale == 3.0


def test_a_second_run_of_the_same_object_is_bitwise_the_first(name: str) -> None:
    method, denoiser, z0 = INVERSIONS[name](), toy(), smooth_latent()
    first = method.invert(denoiser, z0, generator=seeded(0))
    method.invert(denoiser, smooth_latent(seed=5), generator=seeded(1))
    assert_same(method.invert(denoiser, z0, generator=seeded(0)), first)


def test_rows_are_independent(name: str) -> None:
    denoiser, z0 = toy(rows=2), smooth_latent(rows=2)
    both = inverted(name, z0, denoiser, (0, 1))
    for r, row in enumerate(both.rows()):
        single = inverted(name, z0[r : r + 1], denoiser.select([r]), (r,))
        assert relative_error(row.latents, single.latents) < 1e-12
        for key in single.extras:
            assert relative_error(row.extras[key], single.extras[key]) < 1e-9, key


def test_the_prompt_matters(name: str) -> None:
    """Rows 0 and 1 of the toy differ in conditioning alone."""
    denoiser, z0 = toy(rows=2), smooth_latent()
    first, second = (inverted(name, z0, denoiser.select([r])) for r in range(2))
    same = [
        torch.equal(first.noise, second.noise),
        *(torch.equal(first.extras[key], second.extras[key]) for key in first.extras),
    ]
    assert not all(same)


@KINDS
def test_float32_latents_stay_float32(name: str, kind: str) -> None:
    z0 = smooth_latent()
    single, double = inverted(name, z0.float(), toy(kind=kind)), inverted(name, z0, toy(kind=kind))
    assert single.latents.dtype == torch.float32
    assert relative_error(single.latents.double(), double.latents) < 1e-4


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_it_works_with_and_without_gradients(name: str, context: type[torch.no_grad]) -> None:
    denoiser = toy()
    with context():
        trajectory = inverted(name, smooth_latent(), denoiser)
    assert not trajectory.latents.requires_grad
    assert not any(extra.requires_grad for extra in trajectory.extras.values())
    assert_same(trajectory, inverted(name, smooth_latent(), toy()))


def test_the_network_is_left_as_it_was(name: str) -> None:
    denoiser = toy()
    before = [(p.requires_grad, p.grad) for p in denoiser.backbone.network.parameters()]
    inverted(name, smooth_latent(), denoiser)
    assert [(p.requires_grad, p.grad) for p in denoiser.backbone.network.parameters()] == before
    assert before[0][0], "so that this test can fail"


def test_saved_and_reloaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    trajectory = inverted(name, smooth_latent(), toy())
    trajectory.save(tmp_path / "a.safetensors")
    again = Trajectory.load(tmp_path / "a.safetensors")
    assert_same(again, trajectory)
    assert (again.schedule, again.method) == (trajectory.schedule, name)


@KINDS
def test_reloaded_it_is_sampled_to_the_same_latent(name: str, kind: str, tmp_path: Path) -> None:
    denoiser = toy(kind=kind)
    trajectory = inverted(name, smooth_latent(), denoiser)
    trajectory.save(tmp_path / "a.safetensors")
    again = Trajectory.load(tmp_path / "a.safetensors")
    first, second = (sample(denoiser, t.latents[sampler_of(t).start or T], sampler=sampler_of(t)) for t in (trajectory, again))
    assert torch.equal(first, second)


@KINDS
@pytest.mark.parametrize("size", [(8, 12), (6, 4), (2, 2)])
def test_latents_need_not_be_square(name: str, size: tuple[int, int], kind: str) -> None:
    z0 = smooth_latent(size=size)
    trajectory = inverted(name, z0, toy(kind=kind))
    assert trajectory.latents.shape == (T + 1, 1, 4, *size)
    assert torch.equal(trajectory.clean, z0)


def test_on_level_is_told_every_level_once_per_pass(name: str) -> None:
    """The first pass goes up; a second one, of methods that refine, comes down."""
    told: list[tuple[int, Tensor]] = []
    method = INVERSIONS[name]()
    trajectory = method.invert(toy(), smooth_latent(), lambda level, z: told.append((level, z.clone())), seeded(0))
    up, down = list(range(1, T + 1)), list(range(T, 0, -1))
    assert [level for level, _ in told] == (up + down if method.passes == 2 else up)
    for level, z in told[:T]:
        assert torch.equal(z, trajectory.latents[level])


def test_an_exception_in_on_level_stops_the_work(name: str) -> None:
    class Cancelled(Exception):
        pass

    levels: list[int] = []
    stop = T * INVERSIONS[name]().passes - 2

    def cancel(level: int, _z: Tensor) -> None:
        levels.append(level)
        if len(levels) == stop:
            raise Cancelled

    denoiser = toy()
    with pytest.raises(Cancelled):
        INVERSIONS[name]().invert(denoiser, smooth_latent(), cancel)
    assert len(levels) == stop
    assert all(p.requires_grad for p in denoiser.backbone.network.parameters())


def test_the_clean_latent_is_left_unchanged(name: str) -> None:
    z0 = smooth_latent()
    inverted(name, z0, toy())
    assert torch.equal(z0, smooth_latent())
