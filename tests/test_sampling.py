"""The one sampling loop: accuracy, the pinned source, and what it tells and costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from easyinv_edit.cost import measured
from easyinv_edit.denoiser import BatchRow, Denoiser
from easyinv_edit.errors import NonFiniteError
from easyinv_edit.inversion import DDIM
from easyinv_edit.sampling import Sampler, sample
from easyinv_edit.schedule import NoiseSchedule
from easyinv_edit.trajectory import Trajectory
from tests.helpers import Output, denoiser_like, gaussian, make_schedule, relative_error, smooth_latent, toy_denoiser

T = 10
SCHEDULE = make_schedule(T)
VARIANCE = 0.81


def never(_step: int) -> bool:
    return False


def inverted(rows: int = 1) -> Trajectory:
    return DDIM().invert(toy_denoiser(denoiser_like(SCHEDULE), SCHEDULE, rows), smooth_latent(rows=rows))


def reading_source(schedule: NoiseSchedule, steps: Sequence[int]) -> Output:
    """A field whose every row reads the first row of the batch at the given steps, as attention control does."""
    base = denoiser_like(schedule)
    labels = {schedule.timesteps[len(schedule) - step] for step in steps}
    return lambda z, t, e: base(z, t, e) + (0.3 * torch.tanh(z[:1]) if t in labels else 0)


def editing(guidance: tuple[float, ...] = (1.0, 7.5), steps: Sequence[int] = range(T)) -> Denoiser:
    return toy_denoiser(reading_source(SCHEDULE, steps), SCHEDULE, len(guidance), guidance)


def start(trajectory: Trajectory, rows: int = 2) -> Tensor:
    return trajectory.noise.repeat(rows, 1, 1, 1)


def flow_of_gaussian_data(schedule: NoiseSchedule, z: Tensor) -> Tensor:
    """The probability-flow ODE of N(0, v) data keeps a latent's quantile: it scales with the marginal deviation.

    Level 0 is not exactly clean (signal[0] < 1), so its deviation has a noise part too.
    """
    first, last = (math.sqrt(VARIANCE * schedule.signal[i] ** 2 + schedule.noise[i] ** 2) for i in (0, -1))
    return z * first / last


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sampling_converges_to_the_ode_with_order_one(kind: str) -> None:
    z, counts, errors = smooth_latent(), (10, 20, 40, 80), []
    for steps in counts:
        schedule = make_schedule(steps, kind)
        out = sample(toy_denoiser(gaussian(schedule, VARIANCE), schedule), z)
        errors.append(relative_error(out, flow_of_gaussian_data(schedule, z)))
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    slope = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
    assert -1.2 < slope < -0.8
    assert errors[-1] < 0.02


def test_each_level_feeds_its_own_label_and_latent() -> None:
    denoiser = toy_denoiser(denoiser_like(SCHEDULE), SCHEDULE)
    z = smooth_latent()
    out = sample(denoiser, z)
    calls = denoiser.backbone.calls  # type: ignore[attr-defined]
    assert [label for label, _ in calls] == list(SCHEDULE.timesteps[:0:-1])
    for level, (label, seen) in zip(range(T, 0, -1), calls, strict=True):
        assert torch.equal(seen, z)
        z = SCHEDULE.denoise(z, denoiser.backbone.output(z, label, denoiser.conditioning.embeddings), level)  # type: ignore[attr-defined]
    assert torch.equal(out, z)


@pytest.mark.parametrize("guidance", [(1.0, 7.5), (1.0, 1.0), (7.5, 7.5, 3.0)])
def test_the_unet_sees_the_pinned_row_bitwise_on_the_trajectory(guidance: tuple[float, ...]) -> None:
    trajectory, denoiser = inverted(), editing(guidance)
    out = sample(denoiser, start(trajectory, len(guidance)), pin=trajectory)
    source = [i for i, b in enumerate(denoiser.batch) if b.row == 0]
    calls = denoiser.backbone.calls  # type: ignore[attr-defined]
    assert len(calls) == T
    for level, (_, seen) in zip(range(T, 0, -1), calls, strict=True):
        for i in source:
            assert torch.equal(seen[i : i + 1], trajectory.latents[level]), level
    assert torch.equal(out[:1], trajectory.clean)


def test_unpinned_the_source_row_leaves_the_trajectory() -> None:
    """So that the tests of pinning can fail."""
    trajectory = inverted()
    assert relative_error(sample(editing(), start(trajectory))[:1], trajectory.clean) > 1e-3


def test_a_pinned_source_alone_is_reconstructed_bitwise() -> None:
    trajectory = inverted()
    out = sample(editing((1.0,)), start(trajectory, 1), pin=trajectory, reads_source=never)
    assert torch.equal(out, trajectory.clean)


@pytest.mark.parametrize(
    ("guidance", "full", "skipped"), [((1.0, 7.5), 3, 2), ((7.5, 7.5), 4, 2), ((1.0, 1.0, 1.0), 3, 2), ((1.0, 7.5, 7.5), 5, 4)]
)
@pytest.mark.parametrize("reading", [range(0), range(4), range(3, T)])
def test_steps_that_do_not_read_the_pinned_source_skip_its_rows(
    reading: range, guidance: tuple[float, ...], full: int, skipped: int
) -> None:
    """The targets come out bitwise the same as if every step had evaluated the source."""
    trajectory, denoiser = inverted(), editing(guidance, reading)
    expected = sample(denoiser, start(trajectory, len(guidance)), pin=trajectory)
    with measured(denoiser.backbone.network) as cost:
        out = sample(denoiser, start(trajectory, len(guidance)), pin=trajectory, reads_source=lambda step: step in reading)
    assert torch.equal(out, expected)
    assert cost.evaluations == full * len(reading) + skipped * (T - len(reading))
    assert cost.calls == T


def test_a_source_that_is_not_pinned_is_never_skipped() -> None:
    denoiser = editing()
    z = start(inverted())
    with measured(denoiser.backbone.network) as cost:
        out = sample(denoiser, z, reads_source=never)
    assert cost.evaluations == 3 * T
    assert torch.equal(out, sample(denoiser, z))


def moved(denoiser: Denoiser, z: Tensor, level: int) -> Tensor:
    return denoiser.schedule.denoise(z, denoiser(z, level), level)


def direct_inversion(denoiser: Denoiser, trajectory: Trajectory) -> Tensor:
    """PnPInversion's two passes as published: offsets to the stored latents first, then editing with them on the source row."""
    offsets, z = {}, start(trajectory)
    for level in range(T, 0, -1):
        z = moved(denoiser, z, level)
        offsets[level] = trajectory.latents[level - 1] - z
        z = z + offsets[level]
    z = start(trajectory)
    for level in range(T, 0, -1):
        z = moved(denoiser, z, level)
        z = torch.cat([z[:1] + offsets[level][:1], z[1:]])
    return z


@pytest.mark.parametrize("guidance", [(1.0, 7.5), (7.5, 7.5)])
def test_pinning_equals_direct_inversion(guidance: tuple[float, ...]) -> None:
    trajectory, denoiser = inverted(), editing(guidance)
    out, expected = sample(denoiser, start(trajectory), pin=trajectory), direct_inversion(denoiser, trajectory)
    assert relative_error(out[:1], expected[:1]) < 1e-12
    assert relative_error(out[1:], expected[1:]) < 1e-12
    assert relative_error(expected[1:], sample(denoiser, start(trajectory))[1:]) > 1e-3, "the source row matters to the target"


def test_control_wraps_every_call_and_is_told_its_rows() -> None:
    trajectory, denoiser = inverted(), editing()
    told: list[tuple[int, list[int]]] = []
    inside: list[int] = []

    @contextmanager
    def control(step: int, batch: Sequence[BatchRow]) -> Iterator[None]:
        before = len(denoiser.backbone.calls)  # type: ignore[attr-defined]
        yield
        told.append((step, [b.row for b in batch]))
        inside.append(len(denoiser.backbone.calls) - before)  # type: ignore[attr-defined]

    sample(denoiser, start(trajectory), pin=trajectory, reads_source=lambda step: step >= 6, control=control)
    assert told == [(step, [0, 1, 1] if step >= 6 else [1, 1]) for step in range(T)]
    assert inside == [1] * T


@pytest.mark.parametrize("reads", [never, lambda _step: True])
def test_after_step_is_given_all_rows_and_may_change_them(reads: Callable[[int], bool]) -> None:
    trajectory, denoiser, levels = inverted(), editing((1.0, 1.0)), []

    def after_step(level: int, z: Tensor) -> Tensor:
        levels.append(level)
        assert z.shape[0] == 2
        return torch.full_like(z, float(level))

    out = sample(denoiser, start(trajectory), pin=trajectory, reads_source=reads, after_step=after_step)
    assert levels == list(range(T - 1, -1, -1))
    seen = [latents[-1].unique().tolist() for _, latents in denoiser.backbone.calls[1:]]  # type: ignore[attr-defined]
    assert seen == [[float(level)] for level in range(T - 1, 0, -1)]
    assert torch.equal(out, torch.cat([trajectory.clean, torch.zeros_like(trajectory.clean)])), "the pin has the last word"


def test_another_step_may_be_taken() -> None:
    z = smooth_latent()
    out = sample(editing((1.0,)), z, sampler=Sampler(step=lambda _denoiser, z, _second, level: (z * level, None)))
    assert relative_error(out, z * math.factorial(T)) < 1e-12


@pytest.mark.parametrize("level", [T, 4, 1])
def test_a_latent_that_is_not_finite_names_the_level_reached(level: int) -> None:
    base = denoiser_like(SCHEDULE)
    denoiser = toy_denoiser(lambda z, t, e: base(z, t, e) * (float("inf") if t == SCHEDULE.timesteps[level] else 1), SCHEDULE)
    with pytest.raises(NonFiniteError, match=rf"sampling.*level {level - 1} .*float32"):
        sample(denoiser, smooth_latent())
    assert len(denoiser.backbone.calls) == T - level + 1, "it stops at the first bad level"  # type: ignore[attr-defined]


@pytest.mark.parametrize("pinned", [False, True])
def test_sampling_twice_is_bitwise_the_same(pinned: bool) -> None:
    trajectory, denoiser = inverted(), editing()
    pin = trajectory if pinned else None
    assert torch.equal(sample(denoiser, start(trajectory), pin=pin), sample(denoiser, start(trajectory), pin=pin))


def test_the_start_is_left_unchanged() -> None:
    trajectory = inverted()
    z, kept = start(trajectory), trajectory.latents.clone()
    before = z.clone()
    sample(editing(), z, pin=trajectory)
    assert torch.equal(z, before)
    assert torch.equal(trajectory.latents, kept)


def test_float32_latents_stay_float32() -> None:
    z = smooth_latent(rows=2).float()
    assert sample(editing(), z, pin=inverted()).dtype == torch.float32
