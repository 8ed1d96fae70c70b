"""DDIM inversion: order, label, cost, and the warning above guidance 1."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch

from easyinv_edit.cost import measured
from easyinv_edit.errors import EasyInvWarning, NonFiniteError
from easyinv_edit.inversion import DDIM
from easyinv_edit.sampling import sample
from tests.helpers import constant, denoiser_like, make_schedule, relative_error, smooth_latent, toy_denoiser

KINDS = ("epsilon", "v_prediction")


def round_trip_error(steps: int, kind: str) -> float:
    """Relative error of z0 after inverting and sampling again."""
    schedule = make_schedule(steps, kind)
    denoiser = toy_denoiser(denoiser_like(schedule), schedule)
    z0 = smooth_latent()
    return relative_error(sample(denoiser, DDIM().invert(denoiser, z0).noise), z0)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_of_first_order(kind: str) -> None:
    """Doubling T about halves the error; a rule that used the sampler's own outputs would have none at all."""
    errors = [round_trip_error(steps, kind) for steps in (20, 40, 80)]
    assert errors[-1] > 1e-4
    for coarse, fine in pairwise(errors):
        assert 0.4 < fine / coarse < 0.65


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_that_ignores_its_input_is_inverted_exactly(kind: str) -> None:
    """Then the output on the way up is the output on the way down."""
    schedule = make_schedule(20, kind)
    denoiser = toy_denoiser(constant(smooth_latent(seed=1)), schedule)
    z0 = smooth_latent()
    assert relative_error(sample(denoiser, DDIM().invert(denoiser, z0).noise), z0) < 1e-12


def test_the_unet_is_given_the_latent_at_hand_and_the_higher_label() -> None:
    schedule = make_schedule(20)
    denoiser = toy_denoiser(denoiser_like(schedule), schedule)
    trajectory = DDIM().invert(denoiser, smooth_latent())
    calls = denoiser.backbone.calls  # type: ignore[attr-defined]
    assert [label for label, _ in calls] == [1 + 50 * j for j in range(20)]
    for level, (_, seen) in enumerate(calls):
        assert torch.equal(seen, trajectory.latents[level])


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 1), (7.5, 2)])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")
def test_one_evaluation_per_level_and_row_of_guidance(steps: int, guidance: float, rows: int) -> None:
    schedule = make_schedule(steps)
    denoiser = toy_denoiser(denoiser_like(schedule), schedule, guidance=[guidance])
    with measured(denoiser.backbone.network) as cost:
        DDIM().invert(denoiser, smooth_latent())
    assert (cost.evaluations, cost.calls) == (steps * rows, steps)


@pytest.mark.parametrize("guidance", [(7.5,), (1.0, 1.01)])
def test_guidance_above_one_warns_with_the_remedy(guidance: tuple[float, ...]) -> None:
    schedule = make_schedule(4)
    denoiser = toy_denoiser(denoiser_like(schedule), schedule, len(guidance), guidance)
    with pytest.warns(EasyInvWarning, match=rf"ddim.*guidance {max(guidance):g}.*1 is the value") as caught:
        DDIM().invert(denoiser, smooth_latent(rows=len(guidance)))
    assert len(caught) == 1


@pytest.mark.parametrize("guidance", [1.0, 0.5])
def test_guidance_up_to_one_does_not_warn(guidance: float) -> None:
    schedule = make_schedule(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDIM().invert(toy_denoiser(denoiser_like(schedule), schedule, guidance=[guidance]), smooth_latent())


def test_a_latent_that_is_not_finite_names_method_and_level() -> None:
    schedule = make_schedule(10)
    denoiser = toy_denoiser(lambda z, t, _e: z * (float("nan") if t == schedule.timesteps[7] else 1), schedule)
    with pytest.raises(NonFiniteError, match=r"ddim.*level 7 "):
        DDIM().invert(denoiser, smooth_latent())


def test_there_are_no_settings() -> None:
    with pytest.raises(ValueError, match="eta"):
        DDIM(eta=0.5)  # type: ignore[call-arg]
