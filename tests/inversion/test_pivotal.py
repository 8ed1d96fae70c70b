"""Null-text and prompt tuning: embeddings fitted per level so that guided sampling follows the inversion."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from easyinv_edit.choices import build
from easyinv_edit.conditioning import Conditioning
from easyinv_edit.cost import measured
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import EasyInvWarning, InputError, NonFiniteError
from easyinv_edit.inversion import DDIM, INVERSIONS, EasyInv, NullText, PromptTuning, sampler_of
from easyinv_edit.inversion.pivotal import Fit
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory
from tests.helpers import Output, ToyBackbone, gaussian, make_schedule, relative_error, seeded, smooth_latent

T, TOKENS, DIM = 10, 2, 3
SCHEDULE = make_schedule(T)
BASIS = 0.3 * torch.randn(TOKENS * DIM, 4, 8, 8, generator=seeded(3)[0], dtype=torch.float64)
"""How the toy's output moves with each entry of the embedding."""
METHODS = pytest.mark.parametrize("method", [NullText, PromptTuning])
KEYS = {"null_text": "null_embeddings", "prompt_tuning": "prompt_embeddings"}
Method = type[NullText] | type[PromptTuning]


def linear_in_embeddings(z: Tensor, t: int, e: Tensor) -> Tensor:
    """The Gaussian optimum plus a field that is linear in the embedding."""
    field = torch.einsum("rk,kchw->rchw", e.flatten(1).double(), BASIS)
    return gaussian(SCHEDULE)(z, t, e) + field.to(z)


def embedded(rows: int, seed: int, spread: float = 0.05) -> Conditioning:
    return Conditioning(spread * torch.randn(rows, TOKENS, DIM, generator=seeded(seed)[0], dtype=torch.float64))


def toy(rows: int = 1, guidance: float = 1.0, output: Output = linear_in_embeddings) -> Denoiser:
    """Every row with its own prompt and its own negative one."""
    return Denoiser(ToyBackbone(output), SCHEDULE, embedded(rows, 4), (guidance,) * rows, embedded(rows, 5))


def fitted(trajectory: Trajectory) -> Tensor:
    return trajectory.extras[KEYS[trajectory.method]]


def losses_below(denoiser: Denoiser, trajectory: Trajectory, guidance: float = 7.5) -> list[float]:
    """Mean squared distance to the pivot at levels T-1 .. 0 of the source branch, sampled alone and without a pin."""
    distances = []

    def compare(level: int, z: Tensor) -> Tensor:
        distances.append((z - trajectory.latents[level]).square().mean().item())
        return z

    guided = replace(denoiser, guidance=(guidance,) * trajectory.latents.shape[1])
    sample(guided, trajectory.noise, sampler=sampler_of(trajectory), after_step=compare)
    return distances


def furthest(denoiser: Denoiser, trajectory: Trajectory, guidance: float = 7.5) -> float:
    return math.sqrt(max(losses_below(denoiser, trajectory, guidance)))


@METHODS
@pytest.mark.parametrize("guidance", [3.0, 7.5])
def test_the_guided_source_branch_follows_the_pivots(method: Method, guidance: float) -> None:
    denoiser, z0 = toy(), smooth_latent()
    without = furthest(denoiser, DDIM().invert(denoiser, z0), guidance)
    tuned = method(guidance_scale=guidance).invert(denoiser, z0)
    assert furthest(denoiser, tuned, guidance) < without / 5
    assert sampler_of(tuned).source_guidance == guidance


@METHODS
def test_it_is_fitted_for_one_guidance_scale(method: Method) -> None:
    denoiser = toy()
    tuned = method(guidance_scale=3.0).invert(denoiser, smooth_latent())
    assert furthest(denoiser, tuned, 15.0) > 2 * furthest(denoiser, tuned, 3.0)


@METHODS
def test_more_iterations_fit_better(method: Method) -> None:
    denoiser = toy()
    errors = [furthest(denoiser, method(iterations=n, tolerance=0.0).invert(denoiser, smooth_latent())) for n in (1, 3, 9, 27)]
    assert all(after < 0.9 * before for before, after in pairwise(errors))


@METHODS
def test_one_embedding_per_level_and_row(method: Method) -> None:
    trajectory = method(iterations=2).invert(toy(rows=3), smooth_latent(rows=3))
    assert fitted(trajectory).shape == (T, 3, TOKENS, DIM)
    changes = (fitted(trajectory)[1:] - fitted(trajectory)[:-1]).abs().amax(dim=(2, 3))
    assert (changes > 0).all(), "every level and row has one of its own"


# The fit itself


def pushed(method: Method, guidance: float) -> float:
    """d(guided output) / d(output of the half that is fitted)."""
    return 1 - guidance if method is NullText else guidance


def by_hand(method: Method, denoiser: Denoiser, pivots: Trajectory, iterations: int, guidance: float = 7.5) -> Tensor:
    """The published loop on the linear toy, gradient and Adam written out; entry i is of level i + 1."""
    assert denoiser.negative is not None
    uncond, cond = denoiser.negative.embeddings, denoiser.conditioning.embeddings
    u = (uncond if method is NullText else cond).clone()
    z, stored = pivots.noise, []
    for n in range(T):
        level = T - n
        keep, push, label = SCHEDULE.keep[level], SCHEDULE.push[level], SCHEDULE.timesteps[level]

        def down(u: Tensor, z: Tensor = z, keep: float = keep, push: float = push, label: int = label) -> Tensor:
            e_u, e_c = (u, cond) if method is NullText else (uncond, u)
            low, high = linear_in_embeddings(z, label, e_u), linear_in_embeddings(z, label, e_c)
            return keep * z + push * (low + guidance * (high - low))

        m, v = torch.zeros_like(u), torch.zeros_like(u)
        for k in range(1, iterations + 1):
            off = down(u) - pivots.latents[level - 1]
            slope = 2 / off[0].numel() * push * pushed(method, guidance)
            gradient = slope * torch.einsum("kchw,rchw->rk", BASIS, off).reshape(u.shape)
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
            rate = 1e-2 * (1 - n / (2 * T))
            u = u - rate * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
        stored.insert(0, u)
        z = down(u)
    return torch.stack(stored)


@METHODS
def test_the_first_step_is_adams_on_the_gradient_worked_out_by_hand(method: Method) -> None:
    denoiser, z0 = toy(), smooth_latent()
    trajectory = method(iterations=1, tolerance=0.0).invert(denoiser, z0)
    ours, start = fitted(trajectory)[T - 1], denoiser.negative if method is NullText else denoiser.conditioning
    assert start is not None
    assert relative_error(ours, by_hand(method, denoiser, trajectory, 1)[T - 1]) < 1e-12
    assert (ours - start.embeddings).abs().max().item() == pytest.approx(1e-2, rel=1e-3), "Adam's first step is its step size"


@METHODS
@pytest.mark.parametrize("iterations", [1, 4])
def test_every_level_is_the_published_loop(method: Method, iterations: int) -> None:
    """Each starts from the embedding and the latent that the level above ended with, and is stored at its level - 1."""
    denoiser = toy(rows=2)
    trajectory = method(iterations=iterations, tolerance=0.0).invert(denoiser, smooth_latent(rows=2))
    assert relative_error(fitted(trajectory), by_hand(method, denoiser, trajectory, iterations)) < 1e-10


def test_step_size_and_stopping_rule_are_the_authors_at_fifty_steps() -> None:
    fit = NullText()._fit
    for n in range(50):
        assert fit.rate(n, 50) == pytest.approx(1e-2 * (1 - n / 100), rel=1e-12)
        assert fit.enough(n, 50) == pytest.approx(1e-5 + n * 2e-5, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 10, 200])
def test_step_size_and_stopping_rule_scale_with_the_steps(steps: int) -> None:
    """The same share of the way down, the same values."""
    fit = PromptTuning()._fit
    for n in range(steps):
        assert fit.rate(n, steps) == pytest.approx(fit.rate(50 * n, 50 * steps), rel=1e-12)
        assert fit.enough(n, steps) == pytest.approx(fit.enough(50 * n, 50 * steps), rel=1e-12)
    assert fit.rate(steps - 1, steps) > 5e-3
    assert fit.enough(0, steps) == 1e-5


def test_without_a_tolerance_nothing_but_an_exact_hit_stops() -> None:
    fit = Fit("unconditional", 7.5, 10, 1e-2, 0.0)
    assert [fit.enough(n, 50) for n in (0, 25, 49)] == [0.0] * 3


# Stopping early


def cost_and_result(method: Method, denoiser: Denoiser, rows: int = 1, **settings: float) -> tuple[int, Trajectory]:
    with measured(denoiser.backbone.network) as cost:
        trajectory = method(**settings).invert(denoiser, smooth_latent(rows=rows))  # type: ignore[arg-type]
    return cost.evaluations, trajectory


@METHODS
def test_a_tolerance_stops_early_and_none_does_every_iteration(method: Method) -> None:
    full, _ = cost_and_result(method, toy(), iterations=8, tolerance=0.0)
    some, loose = cost_and_result(method, toy(), iterations=8, tolerance=2e-3)
    least, none = cost_and_result(method, toy(), iterations=8, tolerance=1e6)
    assert full == T + T * (8 + 2)
    assert least == T + T * 2, "the other half and one look"
    assert least < some < full
    start = toy().negative if method is NullText else toy().conditioning
    assert start is not None
    assert torch.equal(fitted(none), start.embeddings.expand(T, -1, -1, -1))
    assert not torch.equal(fitted(loose), fitted(none))


@METHODS
def test_where_it_stops_the_step_meets_the_pivot_within_the_tolerance(method: Method) -> None:
    denoiser, tolerance = toy(), 1e-2
    spent, trajectory = cost_and_result(method, denoiser, iterations=200, tolerance=tolerance)
    limits = [tolerance + 2e-5 * n * 50 / T for n in range(T)]
    losses = losses_below(denoiser, trajectory)
    assert spent < T * 100, "no level ran out of iterations"
    assert all(loss <= limit for loss, limit in zip(losses, limits, strict=True))
    assert max(losses) > tolerance / 4, "it does not go on for longer than it must"


@METHODS
def test_rows_are_fitted_alone_and_stop_alone(method: Method) -> None:
    denoiser, z0, tolerance = toy(rows=3), smooth_latent(rows=3), 2e-3
    rows = [2, 0, 1]
    spent, both = cost_and_result(method, denoiser, rows=3, iterations=8, tolerance=tolerance)
    singles, costs = [], []
    for r in rows:
        own = denoiser.select([r])
        with measured(own.backbone.network) as cost:
            singles.append(method(iterations=8, tolerance=tolerance).invert(own, z0[r : r + 1]))
        costs.append(cost.evaluations)
    assert len(set(costs)) > 1, "so that rows stop at different iterations"
    assert spent == sum(costs)
    for r, single in zip(rows, singles, strict=True):
        assert relative_error(fitted(both)[:, r : r + 1], fitted(single)) < 1e-10


# What it can be based on


@METHODS
@pytest.mark.parametrize("base", ["easyinv", "ddim", "fixed_point"])
def test_the_bases_latents_are_the_pivots_bit_for_bit(method: Method, base: str) -> None:
    denoiser, z0 = toy(), smooth_latent()
    pivots = INVERSIONS[base]().invert(denoiser, z0)
    trajectory = method(base=base, iterations=1).invert(denoiser, z0)
    assert torch.equal(trajectory.latents, pivots.latents)
    assert trajectory.settings["base"]["name"] == base
    assert set(pivots.extras) < set(trajectory.extras)


@METHODS
def test_a_base_may_be_given_with_its_settings(method: Method) -> None:
    denoiser, z0 = toy(), smooth_latent()
    settings = {"name": "easyinv", "eta": 0.7, "window": (0.1, 0.6)}
    trajectory = method(base=settings, iterations=1).invert(denoiser, z0)
    assert torch.equal(trajectory.latents, EasyInv(eta=0.7, window=(0.1, 0.6)).invert(denoiser, z0).latents)
    assert not torch.equal(trajectory.latents, EasyInv().invert(denoiser, z0).latents)


@METHODS
@pytest.mark.parametrize(
    "base", ["edict", "edit_friendly", "bdia", "obelm", "renoise", "proximal", "negative_prompt", "null_text", "prompt_tuning"]
)
def test_a_base_with_a_sampler_of_its_own_is_refused(method: Method, base: str) -> None:
    with pytest.raises(ValueError, match=f"{base} has a sampler of its own"):
        method(base=base)
    with pytest.raises(
        InputError, match=rf"{method.name}: base: {base} has a sampler of its own.*use ddim or easyinv"
    ) as caught:
        build(INVERSIONS, {"name": method.name, "base": base}, "inversion method")
    assert len(str(caught.value).splitlines()) == 1


@METHODS
@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 0},
        {"guidance_scale": 1.0},
        {"learning_rate": 0.0},
        {"tolerance": -1.0},
        {"base": "ddom"},
        {"base": 3},
    ],
)
def test_settings_out_of_range_are_refused(method: Method, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        method(**settings)


# Precision


@METHODS
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_half_precision_network_is_warned_of(method: Method, half: torch.dtype) -> None:
    denoiser = toy()
    denoiser.backbone.network.to(half)
    with pytest.warns(EasyInvWarning, match=rf"{method.name}.*{str(half).removeprefix('torch.')}.*float32"):
        method(iterations=1).invert(denoiser, smooth_latent())


@METHODS
def test_embeddings_are_fitted_in_float32_at_least(method: Method) -> None:
    denoiser = toy()
    assert denoiser.negative is not None
    conditioning, negative = (Conditioning(c.embeddings.half()) for c in (denoiser.conditioning, denoiser.negative))
    denoiser = replace(denoiser, conditioning=conditioning, negative=negative)
    trajectory = method(iterations=2).invert(denoiser, smooth_latent().float())
    assert fitted(trajectory).dtype == torch.float32
    assert not torch.equal(fitted(trajectory), fitted(trajectory).half().float()), "the fit is finer than half precision"


@METHODS
def test_a_gradient_that_is_not_finite_names_the_level(method: Method) -> None:
    bad = SCHEDULE.timesteps[4]

    def output(z: Tensor, t: int, e: Tensor) -> Tensor:
        """Finite everywhere, with an infinite slope at the embeddings that the fit of level 4 starts from."""
        kink = (e - e.detach()).sum((1, 2)).sqrt() if t == bad and e.requires_grad else torch.zeros(len(e)).to(z)
        return linear_in_embeddings(z, t, e) + kink[:, None, None, None]

    with pytest.raises(NonFiniteError, match=r"gradient at level 4 .*float32"):
        method(iterations=2, tolerance=0.0).invert(toy(output=output), smooth_latent())


@METHODS
def test_an_output_that_is_not_a_number_is_no_perfect_fit(method: Method) -> None:
    """The network fails on the negative embedding alone, so the base's inversion is sound and the first loss is no number."""
    sound = toy()
    assert sound.negative is not None
    fatal = sound.negative.embeddings

    def output(z: Tensor, t: int, e: Tensor) -> Tensor:
        fails = torch.tensor([torch.equal(row, fatal[0]) for row in e.detach()])
        return torch.where(fails[:, None, None, None], torch.nan, linear_in_embeddings(z, t, e))

    with pytest.raises(NonFiniteError, match="level"):
        method(iterations=2).invert(toy(output=output), smooth_latent())


@METHODS
def test_it_needs_a_negative_conditioning(method: Method) -> None:
    with pytest.raises(ValueError, match="negative conditioning"):
        method().invert(replace(toy(), negative=None), smooth_latent())


# In an edit


def recorded(trajectory: Trajectory, targets: int, pinned: bool, guidance: float = 7.5) -> list[tuple[int, Tensor]]:
    """(level, embeddings of the UNet batch) of an edit of source and targets; order: all negative rows, then all others."""
    seen: list[tuple[int, Tensor]] = []

    def output(z: Tensor, t: int, e: Tensor) -> Tensor:
        seen.append((SCHEDULE.timesteps.index(t), e.clone()))
        return linear_in_embeddings(z, t, e)

    editing = edited(targets, guidance, output)
    z = trajectory.noise.repeat(1 + targets, 1, 1, 1)
    sample(editing, z, sampler=sampler_of(trajectory), pin=trajectory if pinned else None)
    return seen


def edited(targets: int, guidance: float = 7.5, output: Output = linear_in_embeddings) -> Denoiser:
    """The source of `toy` and some targets, all guided."""
    rows = 1 + targets
    others = embedded(targets, 6, spread=1.0).embeddings
    conditioning = Conditioning(torch.cat([toy().conditioning.embeddings, others]))
    return Denoiser(ToyBackbone(output), SCHEDULE, conditioning, (guidance,) * rows, embedded(rows, 7))


@pytest.mark.parametrize("pinned", [True, False])
def test_every_row_of_an_edit_moves_away_from_the_levels_null_embedding(pinned: bool) -> None:
    trajectory = NullText(iterations=3).invert(toy(), smooth_latent())
    seen = recorded(trajectory, 2, pinned)
    assert [level for level, _ in seen] == list(range(T, 0, -1))
    for level, e in seen:
        assert torch.equal(e[:3], fitted(trajectory)[level - 1].expand(3, -1, -1))
        assert torch.equal(e[3:], edited(2).conditioning.embeddings)


@pytest.mark.parametrize(
    ("blend", "mixed"),
    [
        (0.0, lambda own, target: own),
        (1.0, lambda own, target: target),
        (0.25, lambda own, target: own + (target - own) / 4),
    ],
)
def test_prompt_tuning_blends_the_levels_embedding_with_the_targets(
    blend: float, mixed: Callable[[Tensor, Tensor], Tensor]
) -> None:
    trajectory = PromptTuning(iterations=3, blend=blend).invert(toy(), smooth_latent())
    denoiser = edited(2)
    assert denoiser.negative is not None
    for level, e in recorded(trajectory, 2, pinned=False):
        own = fitted(trajectory)[level - 1]
        targets = [mixed(own, denoiser.conditioning.embeddings[r : r + 1]) for r in (1, 2)]
        assert torch.equal(e[:3], denoiser.negative.embeddings), "the negative prompt stays the edit's"
        assert torch.equal(e[3:4], own)
        assert relative_error(e[4:], torch.cat(targets)) < 1e-14


def test_blend_is_how_far_the_targets_go_from_the_source() -> None:
    away = []
    for blend in (0.0, 0.5, 1.0):
        trajectory = PromptTuning(blend=blend, iterations=3).invert(toy(), smooth_latent())
        same = replace(edited(1), negative=toy().negative.select([0, 0]))  # type: ignore[union-attr]
        out = sample(same, trajectory.noise.repeat(2, 1, 1, 1), sampler=sampler_of(trajectory))
        away.append(relative_error(out[1], out[0]))
    assert away[0] < 1e-12
    assert 0.1 < away[1] < 0.8 * away[2]
