"""Fixed point: the more it iterates, the nearer the sampler's own step leads back."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from easyinv_edit.cost import measured
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import EasyInvWarning, NonFiniteError
from easyinv_edit.inversion import DDIM, FixedPoint
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.running import source_image
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory
from tests.helpers import Output, denoiser_like, gaussian, make_schedule, relative_error, smooth_latent, toy_denoiser

STEPS = 20
Acceleration = Literal["none", "empirical", "anderson"]
ACCELERATIONS: tuple[Acceleration, ...] = ("none", "empirical", "anderson")
EACH = pytest.mark.parametrize("acceleration", ACCELERATIONS)
KINDS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])


def toy(strength: float = 0.3, kind: str = "epsilon", rows: int = 1, steps: int = STEPS) -> Denoiser:
    schedule = make_schedule(steps, kind)
    return toy_denoiser(denoiser_like(schedule, strength), schedule, rows)


def round_trip(iterations: int, strength: float = 0.3, prediction_type: str = "epsilon", **settings: Any) -> float:
    denoiser, z0 = toy(strength, prediction_type), smooth_latent()
    trajectory = FixedPoint(iterations=iterations, **settings).invert(denoiser, z0)
    return relative_error(sample(denoiser, trajectory.noise), z0)


@EACH
def test_without_iterations_it_is_ddim_bit_for_bit(acceleration: Acceleration) -> None:
    denoiser = toy()
    ours = FixedPoint(acceleration=acceleration, iterations=0).invert(denoiser, smooth_latent())
    assert torch.equal(ours.latents, DDIM().invert(denoiser, smooth_latent()).latents)


@EACH
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_two_iterations_win_at_least_a_factor_of_four(prediction_type: str, acceleration: Acceleration) -> None:
    errors = [round_trip(n, prediction_type=prediction_type, acceleration=acceleration) for n in (0, 2, 4, 6, 8)]
    assert all(after < before / 4 for before, after in pairwise(errors))


@EACH
def test_it_converges_to_the_exact_inverse(acceleration: Acceleration) -> None:
    assert round_trip(60, acceleration=acceleration) < 1e-12


@EACH
@KINDS
def test_each_level_solves_the_samplers_step(kind: str, acceleration: Acceleration) -> None:
    """Against the definition, not the round trip: denoising level i with the output AT level i gives level i - 1."""
    denoiser = toy(kind=kind)
    schedule = denoiser.schedule
    latents = FixedPoint(acceleration=acceleration, iterations=60).invert(denoiser, smooth_latent()).latents
    for level in range(1, STEPS + 1):
        z = latents[level]
        back = schedule.keep[level] * z + schedule.push[level] * denoiser(z, level)
        assert relative_error(back, latents[level - 1]) < 1e-12


@pytest.mark.parametrize("iterations", [5, 7])
def test_anderson_beats_plain_iteration_and_averaging_loses_to_it(iterations: int) -> None:
    """On a map that contracts, AIDI's empirical average halves the rate."""
    anderson, none, empirical = (round_trip(iterations, acceleration=a) for a in ("anderson", "none", "empirical"))
    assert anderson < none / 10
    assert none < empirical / 10


def test_eleven_iterations_of_anderson_are_as_good_as_exact() -> None:
    assert round_trip(11, acceleration="anderson") < 1e-8 < round_trip(11, acceleration="empirical")


def test_by_default_it_is_anderson_with_five_iterations() -> None:
    assert FixedPoint() == FixedPoint(acceleration="anderson", iterations=5, tolerance=0)


@pytest.mark.filterwarnings("ignore:fixed_point:easyinv_edit.errors.EasyInvWarning")
def test_averaging_pays_where_the_map_oscillates() -> None:
    """There F has a negative eigenvalue, and the average of two images is nearer to the fixed point than either."""

    def error(acceleration: Acceleration) -> float:
        denoiser = toy_denoiser(lambda z, _t, _e: -3.5 * z, make_schedule(STEPS))
        trajectory = FixedPoint(acceleration=acceleration, iterations=15).invert(denoiser, smooth_latent())
        return relative_error(sample(denoiser, trajectory.noise), smooth_latent())

    assert error("empirical") < error("none") / 5


# What it does on a model whose output is a multiple of the latent: everything is a number there.


def linear_map(steps: int) -> list[tuple[float, float]]:
    """(contraction r, sampler's factor c) of F(x) = a z + r x with fixed point z / c per level, for data that is one point.

    That model's output is z / noise, so r = 1 - h[i - 1] / h[i] (inversion.md, section 4) and c = g[i - 1] / g[i].
    """
    schedule = make_schedule(steps)
    g, h = schedule.noise, [n / s for n, s in zip(schedule.noise, schedule.signal, strict=True)]
    return [(1 - h[i - 1] / h[i], g[i - 1] / g[i]) for i in range(1, steps + 1)]


def on_one_point(steps: int, **settings: Any) -> Trajectory:
    schedule = make_schedule(steps)
    return FixedPoint(**settings).invert(toy_denoiser(gaussian(schedule, variance=0), schedule), smooth_latent())


@pytest.mark.parametrize(("steps", "rate"), [(50, 0.71), (20, 0.82), (10, 0.88), (4, 0.94)])
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_plain_iteration_contracts_by_the_published_figures(steps: int, rate: float, iterations: int) -> None:
    """Slowest at low noise, the more so the fewer steps: the second level's rate is the table's of inversion.md."""
    levels = linear_map(steps)
    assert levels[1][0] == pytest.approx(rate, abs=0.006)
    assert max(r for r, _ in levels) == levels[1][0]
    residuals = on_one_point(steps, acceleration="none", iterations=iterations).extras["residuals"]
    for (r, c), residual in zip(levels, residuals, strict=True):
        x = 1 / c + r**iterations * (1 - 1 / c)  # in units of the latent below
        assert residual.item() == pytest.approx(abs((1 - r) * (x - 1 / c) / x), rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("iterations", [1, 2, 3, 6])
def test_the_empirical_scheme_averages_the_last_two_images(iterations: int) -> None:
    residuals = on_one_point(STEPS, acceleration="empirical", iterations=iterations).extras["residuals"]
    for (r, c), residual in zip(linear_map(STEPS), residuals, strict=True):
        x, images = 1.0, [(1 - r) / c + r]
        for n in range(iterations):
            x = images[0] if n == 0 else (images[-1] + images[-2]) / 2
            images.append((1 - r) / c + r * x)
        assert residual.item() == pytest.approx(abs(images[-1] - x) / abs(x), rel=1e-6, abs=1e-15)


def test_anderson_solves_a_linear_map_in_two_steps() -> None:
    """Where plain iteration at 20 steps has gained a factor of 0.82 ** 2."""
    assert on_one_point(STEPS, iterations=2).extras["residuals"].max() < 1e-6
    assert on_one_point(STEPS, iterations=2, acceleration="none").extras["residuals"].max() > 1e-2


# The residual.


@EACH
@KINDS
@pytest.mark.parametrize("iterations", [0, 1, 3, 5])
def test_the_residual_tells_the_error_of_the_round_trip(iterations: int, kind: str, acceleration: Acceleration) -> None:
    denoiser, z0 = toy(kind=kind), smooth_latent()
    trajectory = FixedPoint(acceleration=acceleration, iterations=iterations).invert(denoiser, z0)
    residuals = trajectory.extras["residuals"]
    assert residuals.shape == (STEPS, 1)
    assert (residuals > 0).all()
    ratio = residuals.max().item() / relative_error(sample(denoiser, trajectory.noise), z0)
    assert 0.1 < ratio < (10 if kind == "epsilon" else 100)


def test_the_residual_is_that_of_the_kept_iterate() -> None:
    """|F(x) - x| / |x| with x the latent that F was applied to, level by level."""
    denoiser = toy()
    trajectory = FixedPoint(acceleration="none", iterations=1).invert(denoiser, smooth_latent())
    for level in range(1, STEPS + 1):
        z = trajectory.latents[level - 1]
        x = denoiser.schedule.renoise(z, denoiser(z, level), level)
        image = denoiser.schedule.renoise(z, denoiser(x, level), level)
        assert relative_error(trajectory.latents[level], image) < 1e-14
        assert trajectory.extras["residuals"][level - 1].item() == pytest.approx(((image - x).norm() / x.norm()).item())


@EACH
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
def test_a_tolerance_stops_early(tolerance: float, acceleration: Acceleration) -> None:
    denoiser, method = toy(), FixedPoint(acceleration=acceleration, iterations=40, tolerance=tolerance)
    with measured(denoiser.backbone.network) as cost:
        trajectory = method.invert(denoiser, smooth_latent())
    residuals = trajectory.extras["residuals"]
    assert STEPS <= cost.evaluations < method.evaluations(STEPS) / 2
    assert (residuals < tolerance).all()
    assert residuals.max() > tolerance / 1000, "it does not iterate on"


def test_a_smaller_tolerance_costs_more_and_reconstructs_better() -> None:
    costs, errors = [], []
    for tolerance in (1e-2, 1e-4, 1e-6, 1e-8):
        denoiser = toy()
        with measured(denoiser.backbone.network) as cost:
            trajectory = FixedPoint(iterations=40, tolerance=tolerance).invert(denoiser, smooth_latent())
        costs.append(cost.evaluations)
        errors.append(relative_error(sample(denoiser, trajectory.noise), smooth_latent()))
        assert errors[-1] < 10 * tolerance
    assert costs == sorted(set(costs))
    assert errors == sorted(set(errors), reverse=True)


def test_a_tolerance_out_of_reach_costs_what_was_announced() -> None:
    denoiser, method = toy(), FixedPoint(iterations=2, tolerance=1e-12)
    with measured(denoiser.backbone.network) as cost:
        trajectory = method.invert(denoiser, smooth_latent())
    assert cost.evaluations == method.evaluations(STEPS) == 3 * STEPS
    assert (trajectory.extras["residuals"] > 1e-12).all()


@EACH
def test_a_row_that_is_done_is_frozen_while_the_others_go_on(acceleration: Acceleration) -> None:
    """So that an image's inversion does not depend on which others are in the batch."""
    method = FixedPoint(acceleration=acceleration, iterations=20, tolerance=1e-4)
    denoiser = toy(rows=3)
    z0 = torch.cat([smooth_latent(), 2 * smooth_latent(1), 0.2 * smooth_latent(2)])
    both, costs = method.invert(denoiser, z0), []
    for r in range(3):
        with measured(denoiser.backbone.network) as cost:
            single = method.invert(denoiser.select([r]), z0[r : r + 1])
        costs.append(cost.evaluations)
        assert relative_error(both.latents[:, r], single.latents[:, 0]) < 1e-12
        torch.testing.assert_close(both.extras["residuals"][:, r], single.extras["residuals"][:, 0], rtol=1e-6, atol=1e-15)
    assert len(set(costs)) == 3, "the rows are done at different times"


# Where it fails.


def inverted(output: Output, acceleration: Acceleration, iterations: int, guidance: float = 1.0) -> tuple[Trajectory, str]:
    """(trajectory, what was warned about contraction)."""
    denoiser = toy_denoiser(output, make_schedule(STEPS), guidance=[guidance])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EasyInvWarning)
        trajectory = FixedPoint(acceleration=acceleration, iterations=iterations).invert(denoiser, smooth_latent())
    return trajectory, "\n".join(str(w.message) for w in caught if "does not contract" in str(w.message))


@EACH
@pytest.mark.parametrize("iterations", [3, 5, 10, 20])
def test_a_map_that_does_not_contract_is_warned_of_and_stays_finite(iterations: int, acceleration: Acceleration) -> None:
    denoiser = toy_denoiser(lambda z, _t, _e: 40 * torch.sin(z), make_schedule(STEPS))
    method = FixedPoint(acceleration=acceleration, iterations=iterations)
    with pytest.warns(EasyInvWarning, match=r"fixed_point: .*does not contract at level \d+.*use more steps") as caught:
        trajectory = method.invert(denoiser, smooth_latent())
    assert len(caught) == 1
    assert trajectory.latents.isfinite().all()
    assert trajectory.latents.abs().max() < 1e3
    assert trajectory.extras["residuals"].max() > 0.1


@EACH
def test_the_best_iterate_is_kept(acceleration: Acceleration) -> None:
    """At the first level, where all start alike: more iterations are never worse."""
    residuals = [
        inverted(lambda z, _t, _e: 40 * torch.sin(z), acceleration, n)[0].extras["residuals"][0].item() for n in range(12)
    ]
    assert residuals == sorted(residuals, reverse=True)


@EACH
def test_guidance_that_makes_it_expand_is_named_as_the_cause(acceleration: Acceleration) -> None:
    schedule = make_schedule(STEPS)
    exact = gaussian(schedule)

    def output(z: Tensor, t: int, e: Tensor) -> Tensor:
        return exact(z, t, e) + 0.3 * torch.sin(3 * z + e.mean((1, 2))[:, None, None, None])

    trajectory, warning = inverted(output, acceleration, 10, guidance=15)
    assert "invert at guidance 1" in warning
    assert trajectory.latents.isfinite().all()
    trajectory, warning = inverted(output, acceleration, 10)
    assert not warning, "the same model without guidance"


BAD: dict[str, Output] = {
    "its neighbour's sign": lambda z, _t, _e: 40 * torch.tanh(z.roll(1, -1)),
    "a negative multiple": lambda z, _t, _e: -6 * z,
    "a large multiple": lambda z, _t, _e: 40 * z,
    "a strong field": denoiser_like(make_schedule(STEPS), 20),
    "a sine": lambda z, _t, _e: 40 * torch.sin(z),
}


@EACH
@pytest.mark.parametrize("output", BAD.values(), ids=BAD)
def test_an_inversion_that_failed_is_never_silent(output: Output, acceleration: Acceleration) -> None:
    """After twenty iterations either the residual is small or the user is told that the map does not contract."""
    trajectory, warning = inverted(output, acceleration, 20)
    assert trajectory.extras["residuals"].max() < 0.1 or warning


@EACH
@KINDS
@pytest.mark.parametrize(("steps", "dtype"), [(4, torch.float64), (10, torch.float32)], ids=str)
def test_a_map_that_contracts_is_not_warned_of(steps: int, dtype: torch.dtype, kind: str, acceleration: Acceleration) -> None:
    """Sixty iterations are far beyond rounding, where residuals go up and down; this package's warnings are errors here."""
    trajectory = FixedPoint(acceleration=acceleration, iterations=60).invert(
        toy(kind=kind, steps=steps), smooth_latent().to(dtype)
    )
    assert trajectory.extras["residuals"].max() < 1e-6


@EACH
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)], ids=str)
def test_a_half_precision_network_is_no_reason_to_warn(dtype: torch.dtype, floor: float, acceleration: Acceleration) -> None:
    """Its rounding bounds the residual, and the latents stay single."""
    schedule = make_schedule(STEPS)
    exact = denoiser_like(schedule, 0.3)

    def rounded(z: Tensor, t: int, e: Tensor) -> Tensor:
        return exact(z.to(dtype).double(), t, e).to(dtype).to(z)

    method = FixedPoint(acceleration=acceleration, iterations=15)
    trajectory = method.invert(toy_denoiser(rounded, schedule), smooth_latent().float())
    assert trajectory.latents.dtype == torch.float32
    assert trajectory.extras["residuals"].max() < floor


@EACH
@pytest.mark.parametrize(
    ("dtype", "silent", "warned"),
    [(torch.bfloat16, 0.02, 0.4), (torch.float16, 0.008, 0.08), (torch.float32, 0, 0.02)],
    ids=str,
)
def test_going_up_and_down_by_its_rounding_is_no_reason_either(
    dtype: torch.dtype, silent: float, warned: float, acceleration: Acceleration
) -> None:
    """A network that is off by as much as its dtype rounds, at random: only more than that is worth a warning."""
    schedule = make_schedule(10)
    exact, method = gaussian(schedule), FixedPoint(acceleration=acceleration, iterations=15)

    def residual(off: float) -> float:
        denoiser = toy_denoiser(lambda z, t, e: exact(z, t, e) + off * torch.sin(1e6 * z), schedule)
        denoiser.backbone.network.to(dtype)
        return method.invert(denoiser, smooth_latent()).extras["residuals"].max().item()

    assert (residual(silent) > 1e-3) == (silent > 0), "so that a threshold for all dtypes would warn"
    with pytest.warns(EasyInvWarning, match="does not contract"):
        residual(warned)


def test_the_embedded_model_in_bfloat16_is_no_reason_to_warn() -> None:
    """Its second level of ten steps comes down to a residual of about its rounding, and no further."""
    pipe = EditPipeline.embedded(dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    scene = source_image("scene:26100001", pipe.backbone.native_size)
    trajectory = pipe.invert(scene, method=FixedPoint(), num_inference_steps=10, size=64)
    assert trajectory.extras["residuals"].max() > 1e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("first", [0, 300])
def test_a_network_that_returns_no_numbers_is_an_error(first: int, value: float) -> None:
    """As for every other method: not a latent that silently stays where it was."""
    denoiser = toy_denoiser(lambda z, t, _e: 0.1 * z if t < first else value * z, make_schedule(STEPS))
    with pytest.raises(NonFiniteError, match="fixed_point"):
        FixedPoint().invert(denoiser, smooth_latent())


@pytest.mark.parametrize("iterations", [-1, 101, 2.5])
def test_settings_out_of_range_are_refused(iterations: float) -> None:
    with pytest.raises(ValueError, match="iterations"):
        FixedPoint(iterations=iterations)  # type: ignore[arg-type]


@pytest.mark.parametrize("tolerance", [-1e-3, 1, torch.nan])
def test_a_tolerance_out_of_range_is_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        FixedPoint(tolerance=tolerance)


def test_an_unknown_acceleration_is_refused() -> None:
    with pytest.raises(ValueError, match="acceleration"):
        FixedPoint(acceleration="aitken")  # type: ignore[arg-type]
