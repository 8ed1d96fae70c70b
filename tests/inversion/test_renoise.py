"""ReNoise against its own algebra, and its regulariser against the failure that made the authors' pictures black."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from easyinv_edit.cost import measured
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import EasyInvWarning
from easyinv_edit.inversion import DDIM, FixedPoint, ReNoise, sampler_of
from easyinv_edit.inversion.regularise import correlation, patch_divergence, regularise
from easyinv_edit.inversion.renoise import Preset
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory
from tests.helpers import denoiser_like, gaussian, make_schedule, relative_error, seeded, smooth_latent, toy_denoiser

T = 20
KINDS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
FEW = Preset((0,) * 8 + (1, 1), (1,) * 5, 4, 1.0, 0.14)
MANY = Preset((0, 1), (1, 1), 0, 0.0, 0.0)


def toy(steps: int = T, kind: str = "epsilon", rows: int = 1, guidance: float = 1.0) -> Denoiser:
    schedule = make_schedule(steps, kind)
    return toy_denoiser(denoiser_like(schedule, 0.3), schedule, rows, [guidance] * rows)


def weighted(*weights: float, **settings: Any) -> ReNoise:
    """The same weights at every level, and nothing else of a preset."""
    return ReNoise(**{"preset": "many_step", "weights": weights, "low_noise_weights": weights, **settings})


def inverted(method: ReNoise, denoiser: Denoiser, z0: Tensor | None = None, seed: int = 0) -> Trajectory:
    return method.invert(denoiser, smooth_latent() if z0 is None else z0, generator=seeded(seed))


def round_trip(method: ReNoise, denoiser: Denoiser) -> float:
    trajectory = inverted(method, denoiser)
    return relative_error(sample(denoiser, trajectory.noise, sampler=sampler_of(trajectory)), smooth_latent())


# The average.


@KINDS
def test_one_prediction_is_ddim(kind: str) -> None:
    denoiser = toy(kind=kind)
    assert relative_error(inverted(weighted(1), denoiser).latents, DDIM().invert(denoiser, smooth_latent()).latents) < 1e-14


@KINDS
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_last_prediction_alone_is_fixed_point_iteration(iterations: int, kind: str) -> None:
    denoiser = toy(kind=kind)
    plain = FixedPoint(acceleration="none", iterations=iterations).invert(denoiser, smooth_latent())
    ours = inverted(weighted(*[0] * iterations, 1), denoiser)
    assert relative_error(ours.latents, plain.latents) < 1e-13
    assert relative_error(ours.latents, inverted(weighted(1), denoiser).latents) > 1e-3, "so that this test can fail"


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (0, 1, 1), (1, 0, 2), (0.5, 0.5)])
def test_the_step_takes_the_weighted_average_of_the_predictions(weights: tuple[float, ...]) -> None:
    denoiser = toy()
    latents = inverted(weighted(*weights), denoiser).latents
    for level in range(1, T + 1):
        z = x = latents[level - 1]
        predictions = []
        for _ in weights:
            predictions.append(denoiser(x, level))
            x = denoiser.schedule.renoise(z, predictions[-1], level)
        average = sum(w * e for w, e in zip(weights, predictions, strict=True)) / sum(weights)
        assert relative_error(latents[level], denoiser.schedule.renoise(z, average, level)) < 1e-13, level


def test_only_the_proportions_of_the_weights_matter() -> None:
    denoiser = toy()
    assert relative_error(inverted(weighted(1, 3), denoiser).latents, inverted(weighted(2, 6), denoiser).latents) < 1e-14
    assert relative_error(inverted(weighted(1, 3), denoiser).latents, inverted(weighted(3, 1), denoiser).latents) > 1e-4


@pytest.mark.parametrize(("steps", "low"), [(20, 5), (50, 13), (4, 1), (10, 3)])
def test_the_lowest_quarter_of_the_levels_has_its_own_weights(steps: int, low: int) -> None:
    """At 50 steps those are the labels below 250, as the authors have it."""
    denoiser = toy(steps)
    mixed = inverted(weighted(0, 1, low_noise_weights=(1, 1)), denoiser).latents
    bottom, top = (inverted(weighted(*w), denoiser, mixed[level]).latents for w, level in (((1, 1), 0), ((0, 1), low)))
    assert torch.equal(mixed[: low + 1], bottom[: low + 1])
    assert not torch.equal(mixed[low + 1], bottom[low + 1])
    assert top.shape == mixed.shape
    expected = denoiser.schedule.renoise(mixed[low], denoiser(mixed[low], low + 1), low + 1)
    expected = denoiser.schedule.renoise(mixed[low], denoiser(expected, low + 1), low + 1)
    assert relative_error(mixed[low + 1], expected) < 1e-13
    if steps == 50:
        assert [t < 250 for t in denoiser.schedule.timesteps[1:]] == [True] * low + [False] * (steps - low)


@KINDS
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_it_reduces_the_error_of_ddim(steps: int, kind: str) -> None:
    denoiser = toy(steps, kind)
    ddim = DDIM().invert(denoiser, smooth_latent())
    assert round_trip(ReNoise(), denoiser) < relative_error(sample(denoiser, ddim.noise), smooth_latent())


# Settings.


@pytest.mark.parametrize(
    ("steps", "settings", "resolved"),
    [
        (1, {}, FEW),
        (8, {}, FEW),
        (9, {}, MANY),
        (50, {}, MANY),
        (50, {"preset": "few_step"}, FEW),
        (4, {"preset": "many_step"}, MANY),
        (4, {"regularisation": 0}, replace(FEW, regularisation=0)),
        (4, {"eta": 0, "noise_correction": 0}, replace(FEW, eta=0, noise_correction=0)),
        (50, {"weights": [0, 2]}, replace(MANY, weights=(0, 2))),
        (50, {"low_noise_weights": (1,), "regularisation": 2}, replace(MANY, low_noise_weights=(1,), regularisation=2)),
        (50, {"eta": 1, "noise_correction": 0.5}, replace(MANY, eta=1, noise_correction=0.5)),
    ],
)
def test_the_preset_follows_the_steps_and_is_overridden_by_what_is_given(
    steps: int, settings: dict[str, Any], resolved: Preset
) -> None:
    assert ReNoise(**settings).resolved(steps) == resolved


@pytest.mark.parametrize("setting", ["weights", "low_noise_weights"])
@pytest.mark.parametrize("value", [[], [-1], [0, 0], [1, -0.5], [float("nan")], [1, float("inf")], "many", 2])
def test_weights_without_an_average_are_refused(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=setting):
        ReNoise(**{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("preset", "turbo"),
        ("regularisation", -1),
        ("regularisation", 0.5),
        ("correlation_strength", -1),
        ("patch_strength", -1),
        ("eta", 1.1),
        ("eta", -0.1),
        ("noise_correction", 2),
        ("rolls", 5),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=setting):
        ReNoise(**{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "settings", "evaluations"),
    [
        (50, {}, 100),
        (20, {"weights": (1, 1, 1)}, 5 * 2 + 15 * 3),
        (20, {"low_noise_weights": (1,)}, 5 + 15 * 2),
        (20, {"regularisation": 1}, 20 * 2 + 20),
        (20, {"eta": 1}, 20 * 2),
        (20, {"eta": 1, "noise_correction": 0.1}, 20 * 2 + 20),
        (20, {"noise_correction": 0.1}, 20 * 2),
        (4, {}, 5 + 3 * 10 + 4 + 4),
        (8, {}, 2 * 5 + 6 * 10 + 8 + 8),
        (4, {"regularisation": 0}, 5 + 3 * 10 + 4),
    ],
)
@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")
def test_it_costs_what_it_says(steps: int, settings: dict[str, Any], evaluations: int, guidance: float) -> None:
    denoiser, method = toy(steps, guidance=guidance), ReNoise(**settings)
    with measured(denoiser.backbone.network) as cost:
        inverted(method, denoiser)
    guided = guidance != 1
    assert cost.evaluations == method.evaluations(steps, guided=guided) == evaluations * (1 + guided)


# The stochastic sampler and its noise.


def ancestral(**settings: Any) -> ReNoise:
    """Stochastic, two predictions a level, without the regulariser."""
    return ReNoise(**{"preset": "many_step", "eta": 1, **settings})


@KINDS
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_uncorrected_noise_is_the_generators_at_the_samplers_deviation(eta: float, kind: str) -> None:
    denoiser = toy(kind=kind)
    trajectory = inverted(ancestral(eta=eta, noise_correction=0), denoiser, seed=7)
    generator = torch.Generator().manual_seed(7)
    alphas = [s * s for s in denoiser.schedule.signal]
    for level in range(1, T + 1):
        below, here = alphas[level - 1], alphas[level]
        deviation = eta * ((1 - below) / (1 - here) * (1 - here / below)) ** 0.5
        expected = deviation * torch.randn(1, 4, 8, 8, generator=generator).double()
        assert relative_error(trajectory.extras["noises"][level - 1], expected) < 1e-12, level


def test_a_level_solves_the_stochastic_step_for_its_start() -> None:
    """z = s x0 + sqrt(g ** 2 - sigma ** 2) e + noise, x0 = (x - g e) / s, with one prediction at z itself."""
    denoiser = toy()
    s, g = denoiser.schedule.signal, denoiser.schedule.noise
    trajectory = inverted(weighted(1, eta=1, noise_correction=0), denoiser)
    for i in range(1, T + 1):
        x, z, noise = trajectory.latents[i], trajectory.latents[i - 1], trajectory.extras["noises"][i - 1]
        e, sigma = denoiser(z, i), denoiser.schedule.deviation(i, 1)
        back = s[i - 1] * (x - g[i] * e) / s[i] + (g[i - 1] ** 2 - sigma**2) ** 0.5 * e + noise
        assert relative_error(back, z) < 1e-12, i


def test_without_eta_no_noise_travels() -> None:
    assert "noises" not in inverted(ReNoise(preset="few_step", eta=0), toy(4)).extras


@KINDS
@pytest.mark.parametrize(("steps", "preset"), [(4, "few_step"), (T, "many_step"), (50, "many_step")])
def test_noise_corrected_in_full_makes_the_round_trip_exact(steps: int, preset: str, kind: str) -> None:
    """Where less is missing than the noise's usual norm, which is as far as it is moved."""
    assert round_trip(ancestral(preset=preset, regularisation=0, noise_correction=1), toy(steps, kind)) < 1e-10


@pytest.mark.parametrize("steps", [T, 50])
def test_noise_corrected_by_the_authors_share_helps_and_is_not_exact(steps: int) -> None:
    denoiser = toy(steps)
    errors = [round_trip(ancestral(noise_correction=share), denoiser) for share in (0, 0.05, 0.14)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.5 * errors[2] > 1e-4
    assert FEW.noise_correction == 0.14


@pytest.mark.parametrize("share", [0.05, 0.14])
def test_noise_moves_straight_to_what_fits_by_at_most_its_share(share: float) -> None:
    denoiser = toy()
    s, g = denoiser.schedule.signal, denoiser.schedule.noise
    free, corrected = (inverted(ancestral(noise_correction=c), denoiser) for c in (0, share))
    assert torch.equal(free.latents, corrected.latents), "the noise is corrected after the step"
    reached, bounded = 0, 0
    for i in range(1, T + 1):
        x, z = free.latents[i], free.latents[i - 1]
        e, sigma = denoiser(x, i), denoiser.schedule.deviation(i, 1)
        fits = z - s[i - 1] * (x - g[i] * e) / s[i] - (g[i - 1] ** 2 - sigma**2) ** 0.5 * e
        start, now = free.extras["noises"][i - 1], corrected.extras["noises"][i - 1]
        way, limit = (fits - start).norm(), share * sigma * 256**0.5
        assert relative_error(now, start + min(1, (limit / way).item()) * (fits - start)) < 1e-10, i
        reached, bounded = reached + (way < limit).item(), bounded + (way > limit).item()
    assert min(reached, bounded) > 0, "both cases occur"


def test_the_generator_decides_the_noise() -> None:
    denoiser, method = toy(), ancestral()
    first, again, other = (inverted(method, denoiser, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.extras["noises"], again.extras["noises"])
    assert relative_error(other.noise, first.noise) > 1e-2


def test_the_prediction_regularised_toward_comes_from_a_noised_latent() -> None:
    """The authors' code takes the clean one on SD, whose prediction is flat where the picture is."""
    denoiser = toy()
    inverted(weighted(1, regularisation=1), denoiser)
    calls = denoiser.backbone.calls  # type: ignore[attr-defined]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    for level in range(1, T + 1):
        label, seen = calls[2 * (level - 1)]
        assert label == denoiser.schedule.timesteps[level]
        expected = denoiser.schedule.signal[level] * smooth_latent() + denoiser.schedule.noise[level] * noise
        assert relative_error(seen, expected) < 1e-12, level


# The regulariser.


def healthy(seed: int, size: int = 16, rows: int = 1) -> Tensor:
    return torch.randn(rows, 4, size, size, generator=torch.Generator().manual_seed(seed))


def regularised(
    epsilon: Tensor, target: Tensor, rounds: int = 4, correlation_strength: float = 20, patch_strength: float = 0.065
) -> Tensor:
    return regularise(epsilon, target, rounds, correlation_strength, patch_strength, torch.Generator().manual_seed(0))


def correlations(x: Tensor) -> float:
    """Over all shifts there are."""
    return sum(correlation(x, pixels / x.shape[-1]).item() for pixels in range(1, x.shape[-1] // 2 + 1))


def divergence_by_hand(x: Tensor, target: Tensor) -> float:
    """Twice the divergence of two Gaussians per 4 x 4 patch and channel, each variance guarded."""
    total = 0.0
    for channel in range(x.shape[1]):
        for top in range(0, x.shape[2] - 3, 4):
            for left in range(0, x.shape[3] - 3, 4):
                (m, v), (n, w) = (
                    (p.mean().item(), p.var(correction=0).item() + 1e-4)
                    for p in (t[0, channel, top : top + 4, left : left + 4] for t in (x, target))
                )
                total += (
                    2
                    * torch.distributions.kl_divergence(
                        torch.distributions.Normal(torch.tensor(m, dtype=torch.float64), v**0.5),
                        torch.distributions.Normal(torch.tensor(n, dtype=torch.float64), w**0.5),
                    ).item()
                )
    return total


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (6, 10)])
def test_the_patch_divergence_is_that_of_gaussians(size: tuple[int, int]) -> None:
    """Whole patches only."""
    x, target = (healthy(seed)[..., : size[0], : size[1]].double() for seed in (0, 1))
    assert patch_divergence(x, target).item() == pytest.approx(divergence_by_hand(x, target), rel=1e-10)
    assert patch_divergence(x, x).item() == pytest.approx(0, abs=1e-10)


def correlation_by_hand(x: Tensor, share: float) -> float:
    """Squared mean products with the neighbour so many pixels back, with wrap-around, at every scale down to 8 pixels."""
    total = 0.0
    while True:
        height, width = x.shape[-2:]
        rows, columns = torch.arange(height), torch.arange(width)
        down, right = max(1, round(share * height)), max(1, round(share * width))
        for shifted in (x[:, :, (rows - down) % height], x[:, :, :, (columns - right) % width]):
            total += sum((x[0, c] * shifted[0, c]).mean().item() ** 2 for c in range(x.shape[1]))
        if min(height, width) <= 8:
            return total
        x = functional.interpolate(x, scale_factor=0.5, mode="area")


@pytest.mark.parametrize(("size", "share"), [(8, 1 / 8), (16, 3 / 16), (32, 1 / 2), (32, 1 / 32), (64, 5 / 64)])
def test_the_correlation_is_that_of_shifted_copies_at_every_scale(size: int, share: float) -> None:
    x = healthy(0, size).double()
    assert correlation(x, share).item() == pytest.approx(correlation_by_hand(x, share), rel=1e-10)


def test_a_pattern_is_correlated_and_noise_is_not() -> None:
    stripes = torch.ones(1, 4, 16, 16)
    stripes[..., ::2] = -1
    assert correlation(stripes, 2 / 16) > 100 * correlation(healthy(0), 2 / 16)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [16, 32])
def test_a_healthy_prediction_stays_healthy_and_gets_nearer_to_noise(size: int, seed: int) -> None:
    epsilon, target = healthy(seed, size), healthy(seed + 10, size)
    done = regularised(epsilon, target)
    assert done.isfinite().all()
    assert done.abs().max() < 6
    assert 0.9 < done.std() / epsilon.std() < 1.1
    assert patch_divergence(done, target) < 0.95 * patch_divergence(epsilon, target)
    assert correlations(done) < 0.97 * correlations(epsilon)


def test_each_part_does_its_own() -> None:
    epsilon, target = healthy(0), healthy(10)
    patches, pairs = regularised(epsilon, target, 1, 0), regularised(epsilon, target, 1, 20, 0)
    assert patch_divergence(patches, target) < patch_divergence(pairs, target) < 1.01 * patch_divergence(epsilon, target)
    assert correlations(pairs) < correlations(patches) < 1.01 * correlations(epsilon)
    assert torch.equal(regularised(epsilon, target, 4, 0, 0), epsilon)
    assert torch.equal(regularised(epsilon, target, 0), epsilon)


def test_a_round_is_a_gradient_step_on_the_patch_divergence() -> None:
    epsilon, target = healthy(0).requires_grad_(True), healthy(10)
    (gradient,) = torch.autograd.grad(patch_divergence(epsilon, target), epsilon)
    expected = epsilon.detach() - 0.065 * gradient
    assert relative_error(regularised(epsilon.detach(), target, 1, 0), expected) < 1e-6
    assert gradient.abs().max() < 100, "not clipped"


def test_gradients_are_clipped() -> None:
    """A step of 0.065 * 100 at most, however degenerate the target."""
    epsilon, target = healthy(0), torch.zeros(1, 4, 16, 16)
    moved = (regularised(epsilon, target, 1, 0) - epsilon).abs()
    assert moved.max().item() == pytest.approx(6.5, rel=1e-5)
    huge = 1e4 * healthy(0)
    moved = (regularised(huge, target, 1, 20, 0) - huge).abs()
    assert 1000 < moved.max() <= 2000.5, "five shifts of 20 / 5 * 100"


@pytest.mark.parametrize("spread", [0, 1e-3, 5e-3, 2e-2, 0.1])
@pytest.mark.parametrize("target", ["as flat", "healthy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_flat_region_gives_numbers(dtype: torch.dtype, target: str, spread: float) -> None:
    """Three quarters flat, as in a white picture: in float16 the authors' loss is infinite and then everything NaN."""
    epsilon = healthy(0, 32)
    epsilon[..., 8:] *= spread
    aim = epsilon + 1e-3 * healthy(1, 32) if target == "as flat" else healthy(1, 32)
    done = regularised(epsilon.to(dtype), aim.to(dtype))
    assert done.dtype == dtype
    assert done.isfinite().all()
    assert done.abs().max() < 20


@pytest.mark.parametrize("method", [ReNoise(), ReNoise(preset="many_step", regularisation=4)], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_white_picture_is_inverted_to_numbers(dtype: torch.dtype, method: ReNoise) -> None:
    """By the default for few steps, and by the regulariser on the optimal model, whose prediction is flat there too."""
    z0 = smooth_latent(size=(16, 16))
    z0[..., 4:] = 0.7
    schedule = make_schedule(4)
    denoiser = toy_denoiser(gaussian(schedule), schedule)
    trajectory = inverted(method, denoiser, z0.to(dtype))
    assert trajectory.latents.dtype == dtype
    assert trajectory.latents.isfinite().all()


def test_rows_are_regularised_on_their_own() -> None:
    """The scale of one must not reach the other."""
    epsilon, target = torch.cat([healthy(0), 3 * healthy(1), 0.1 * healthy(2)]), healthy(10, rows=3)
    together = regularised(epsilon, target)
    for r in range(3):
        assert torch.equal(together[r : r + 1], regularised(epsilon[r : r + 1], target[r : r + 1])), r


def test_the_regulariser_works_where_gradients_are_off() -> None:
    epsilon, target = healthy(0), healthy(10)
    expected = regularised(epsilon, target)
    with torch.no_grad():
        assert torch.equal(regularised(epsilon, target), expected)
    with torch.inference_mode():
        assert torch.equal(regularised(epsilon.clone(), target.clone()), expected)
    assert not expected.requires_grad


def test_a_regularised_noise_that_is_no_number_is_refused_with_a_warning() -> None:
    """And nothing else happens: the inversion is the one without the regulariser."""
    denoiser = toy(4)
    wild = weighted(0, 1, regularisation=1, correlation_strength=1e38, patch_strength=0)
    with pytest.warns(EasyInvWarning, match=r"renoise: .*level \d was not finite.*strength") as caught:
        refused = inverted(wild, denoiser)
    assert len(caught) == 4
    assert torch.equal(refused.latents, inverted(weighted(0, 1), denoiser).latents)
    mild = inverted(replace(wild, correlation_strength=1.0), denoiser)
    assert relative_error(mild.latents, refused.latents) > 1e-4, "so that this test can fail"


def test_only_the_row_that_is_no_number_is_refused() -> None:
    """Row 0's predictions are so large that their products are infinite in single precision."""
    schedule = make_schedule(4)
    z0, noise, scales = smooth_latent(rows=2), healthy(5, 8).double(), torch.tensor([1e20, 1]).double()[:, None, None, None]
    denoiser = toy_denoiser(lambda _z, _t, _e: noise * scales, schedule, 2)
    method = weighted(1, regularisation=1, patch_strength=0)
    plain = inverted(weighted(1), denoiser, z0).latents
    with pytest.warns(EasyInvWarning, match="not finite"):
        ours = inverted(method, denoiser, z0).latents
    assert torch.equal(ours[:, 0], plain[:, 0])
    assert relative_error(ours[-1, 1], plain[-1, 1]) > 1e-3
