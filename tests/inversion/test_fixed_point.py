"""Fixed point: the more it iterates, the nearer the sampler's own step leads back."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from easyinv_edit.inversion import DDIM, FixedPoint
from easyinv_edit.sampling import sample
from tests.helpers import denoiser_like, make_schedule, relative_error, smooth_latent, toy_denoiser

STEPS = 20


def round_trip(iterations: int, strength: float = 0.3, prediction_type: str = "epsilon") -> float:
    schedule = make_schedule(STEPS, prediction_type)
    denoiser = toy_denoiser(denoiser_like(schedule, strength), schedule)
    z0 = smooth_latent()
    trajectory = FixedPoint(iterations=iterations).invert(denoiser, z0)
    return relative_error(sample(denoiser, trajectory.noise), z0)


def test_without_iterations_it_is_ddim_bit_for_bit() -> None:
    schedule = make_schedule(STEPS)
    denoiser = toy_denoiser(denoiser_like(schedule), schedule)
    ours = FixedPoint(iterations=0).invert(denoiser, smooth_latent())
    assert torch.equal(ours.latents, DDIM().invert(denoiser, smooth_latent()).latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_two_iterations_win_at_least_a_factor_of_four(prediction_type: str) -> None:
    errors = [round_trip(n, prediction_type=prediction_type) for n in (0, 2, 4, 6, 8)]
    assert all(after < before / 4 for before, after in pairwise(errors))


def test_it_converges_to_the_exact_inverse() -> None:
    assert round_trip(60) < 1e-12


def test_each_level_solves_the_samplers_step() -> None:
    """Against the definition, not the round trip: denoising level i with the output AT level i gives level i - 1."""
    schedule = make_schedule(STEPS)
    denoiser = toy_denoiser(denoiser_like(schedule), schedule)
    latents = FixedPoint(iterations=60).invert(denoiser, smooth_latent()).latents
    for level in range(1, STEPS + 1):
        z = latents[level]
        back = schedule.keep[level] * z + schedule.push[level] * denoiser(z, level)
        assert relative_error(back, latents[level - 1]) < 1e-12


@pytest.mark.parametrize("iterations", [-1, 101, 2.5])
def test_settings_out_of_range_are_refused(iterations: float) -> None:
    with pytest.raises(ValueError, match="iterations"):
        FixedPoint(iterations=iterations)  # type: ignore[arg-type]
