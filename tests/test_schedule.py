"""The schedule's line against diffusers' own schedulers, and its refusals."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, PNDMScheduler
from torch import Tensor

from easyinv_edit.errors import EasyInvError, NonFiniteError, ScheduleError
from easyinv_edit.schedule import NoiseSchedule, require_finite
from tests.helpers import ddim_scheduler, make_schedule, relative_error, smooth_latent

TYPES = ("epsilon", "v_prediction")
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SETUPS = [(steps, spacing) for steps in (50, 20, 25, 10) for spacing in ("leading", "trailing")] + [(30, "leading")]
FLOAT32_ALPHAS = 1e-5
"""diffusers does its arithmetic with float32 alphas."""


def from_scheduler(scheduler: DDIMScheduler) -> NoiseSchedule:
    return NoiseSchedule.from_alphas(
        scheduler.alphas_cumprod,
        scheduler.timesteps.tolist(),
        float(scheduler.final_alpha_cumprod),
        scheduler.config.prediction_type,
    )


def latent_and_output(seed: int = 0) -> tuple[Tensor, Tensor]:
    return smooth_latent(seed), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("steps", "spacing"), SETUPS)
def test_denoise_equals_diffusers_ddim_step(steps: int, spacing: str, kind: str, to_one: bool) -> None:
    scheduler = ddim_scheduler(steps, kind, timestep_spacing=spacing, set_alpha_to_one=to_one)
    schedule = from_scheduler(scheduler)
    assert len(schedule) == steps
    z, output = latent_and_output()
    for level in range(1, steps + 1):
        theirs = scheduler.step(output, schedule.timesteps[level], z, eta=0.0).prev_sample
        assert relative_error(schedule.denoise(z, output, level), theirs) < FLOAT32_ALPHAS, level


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("steps", [50, 20, 30])
def test_renoise_equals_diffusers_inverse_step_for_epsilon(steps: int, to_one: bool) -> None:
    forward = ddim_scheduler(steps, set_alpha_to_one=to_one)
    inverse = DDIMInverseScheduler.from_config(forward.config)
    inverse.set_timesteps(steps)
    schedule = from_scheduler(forward)
    assert inverse.timesteps.tolist() == list(schedule.timesteps[1:]), "both count labels from the clean end"
    z, output = latent_and_output()
    for level in range(1, steps + 1):
        theirs = inverse.step(output, schedule.timesteps[level], z).prev_sample
        assert relative_error(schedule.renoise(z, output, level), theirs) < FLOAT32_ALPHAS, level


@pytest.mark.parametrize("changes", [{}, ZERO_SNR])
def test_renoise_differs_from_diffusers_inverse_step_for_v(changes: dict[str, object]) -> None:
    """Theirs reads v at the cleaner level; the docstring of `renoise` says so."""
    forward = ddim_scheduler(20, "v_prediction", **changes)
    inverse = DDIMInverseScheduler.from_config(forward.config)
    inverse.set_timesteps(20)
    schedule = from_scheduler(forward)
    z, output = latent_and_output()
    theirs = inverse.step(output, schedule.timesteps[10], z).prev_sample
    assert relative_error(schedule.renoise(z, output, 10), theirs) > 1e-3


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("steps", [50, 30, 7, 1])
def test_renoise_is_the_inverse_of_denoise(steps: int, kind: str, spacing: str) -> None:
    schedule = make_schedule(steps, kind, timestep_spacing=spacing)
    z, output = latent_and_output()
    for level in range(1, steps + 1):
        assert relative_error(schedule.renoise(schedule.denoise(z, output, level), output, level), z) < 1e-12, level
        assert relative_error(schedule.denoise(schedule.renoise(z, output, level), output, level), z) < 1e-12, level


def test_zero_terminal_snr_is_refused_with_epsilon() -> None:
    with pytest.raises(ScheduleError, match="zero terminal SNR"):
        make_schedule(10, "epsilon", **ZERO_SNR)


def test_zero_terminal_snr_is_served_with_v_prediction() -> None:
    scheduler = ddim_scheduler(10, "v_prediction", **ZERO_SNR)
    schedule = from_scheduler(scheduler)
    assert schedule.signal[-1] == 0
    z, output = latent_and_output()
    for level in range(1, 11):
        theirs = scheduler.step(output, schedule.timesteps[level], z, eta=0.0).prev_sample
        assert relative_error(schedule.denoise(z, output, level), theirs) < FLOAT32_ALPHAS
        assert relative_error(schedule.renoise(schedule.denoise(z, output, level), output, level), z) < 1e-12


@pytest.mark.parametrize("kind", ["sample", "flow_prediction", ""])
def test_other_prediction_types_are_refused(kind: str) -> None:
    with pytest.raises(ScheduleError, match="epsilon and v_prediction") as caught:
        NoiseSchedule.from_alphas([0.9, 0.5], [0, 1], 1.0, kind)
    assert repr(kind) in str(caught.value)
    assert isinstance(caught.value, EasyInvError)


def test_pndm_timesteps_are_refused_because_they_repeat() -> None:
    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(50)
    with pytest.raises(ScheduleError, match="repeat"):
        NoiseSchedule.from_alphas(scheduler.alphas_cumprod, scheduler.timesteps.tolist(), 1.0, "epsilon")


def test_no_timesteps_are_refused() -> None:
    with pytest.raises(ScheduleError, match="empty"):
        NoiseSchedule.from_alphas([0.9, 0.5], [], 1.0, "epsilon")


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_timesteps_may_come_in_any_order(order: str) -> None:
    expected = make_schedule(10)
    labels = sorted(expected.timesteps[1:], reverse=order == "descending")
    alphas = ddim_scheduler(10).alphas_cumprod
    assert NoiseSchedule.from_alphas(alphas, labels, float(alphas[0]), "epsilon") == expected


@pytest.mark.parametrize("to_one", [False, True])
def test_levels_are_the_scheduler_s_alphas(to_one: bool) -> None:
    scheduler = ddim_scheduler(50, set_alpha_to_one=to_one)
    schedule = from_scheduler(scheduler)
    alphas = [
        1.0 if to_one else float(scheduler.alphas_cumprod[0]),
        *(float(scheduler.alphas_cumprod[t]) for t in range(1, 1000, 20)),
    ]
    assert [s * s for s in schedule.signal] == pytest.approx(alphas, rel=1e-14)
    assert [n * n for n in schedule.noise] == pytest.approx([1 - a for a in alphas], rel=1e-12)


@pytest.mark.parametrize("changes", [{}, {"set_alpha_to_one": True}, {"timestep_spacing": "trailing"}])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("steps", [50, 30, 1])
def test_as_dict_survives_json_bit_for_bit(steps: int, kind: str, changes: dict[str, object]) -> None:
    schedule = make_schedule(steps, kind, **changes)
    again = NoiseSchedule.from_dict(json.loads(json.dumps(schedule.as_dict())))
    assert again == schedule
    for name in ("timesteps", "signal", "noise", "prediction_type"):
        assert getattr(again, name) == getattr(schedule, name)
    assert (again.keep[1:], again.push[1:]) == (schedule.keep[1:], schedule.push[1:])


@pytest.mark.parametrize(
    "other", [make_schedule(20), make_schedule(10, "v_prediction"), make_schedule(10, set_alpha_to_one=True)]
)
def test_schedules_that_differ_are_not_equal(other: NoiseSchedule) -> None:
    assert make_schedule(10) != other
    assert make_schedule(10) == make_schedule(10)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_latents_keep_their_dtype(dtype: torch.dtype, kind: str) -> None:
    schedule = make_schedule(10, kind)
    z, output = (x.to(dtype) for x in latent_and_output())
    assert schedule.denoise(z, output, 5).dtype == dtype
    assert schedule.renoise(z, output, 5).dtype == dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_latent_that_is_not_finite_is_named(bad: float) -> None:
    z = smooth_latent()
    assert require_finite(z, "ddim", 3) is z
    z[0, 1, 2, 3] = bad
    with pytest.raises(NonFiniteError, match=r"ddim.*level 3.*float32"):
        require_finite(z, "ddim", 3)
