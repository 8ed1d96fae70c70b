"""EDICT, BDIA, O-BELM and edit-friendly DDPM: inverses by construction, for any network and guidance.

Each against its paper's formulas, rewritten here from inversion.md 6 and 7, on the way up and, from a latent that is not the
source's (as in an edit), on the way down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from easyinv_edit.conditioning import Conditioning
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import ScheduleError
from easyinv_edit.inversion import BDIA, DDIM, EDICT, OBELM, EditFriendly, InversionMethod, sampler_of
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory
from tests.helpers import (
    ToyBackbone,
    denoiser_like,
    make_schedule,
    relative_error,
    seeded,
    smooth_latent,
    tiny_unet,
    toy_denoiser,
)

METHODS = {
    "edict": EDICT(),
    "edict in one order": EDICT(leapfrog=False),
    "edict unmixed": EDICT(mix=1),
    "bdia": BDIA(),
    "bdia at its lower end": BDIA(gamma=0.9),
    "obelm": OBELM(),
    "edit_friendly": EditFriendly(),
    "edit_friendly from the top": EditFriendly(skip=0),
    "edit_friendly with less noise": EditFriendly(skip=0, eta=0.5),
}
DEFAULTS = ("edict", "bdia", "obelm", "edit_friendly")
EXACT = {torch.float64: 1e-10, torch.float32: 1e-4}
HALF = {torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""How far a round trip may end from its start where the network's own rounding comes in: about four units of it."""
ALL = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
EACH = pytest.mark.parametrize("name", DEFAULTS)
KINDS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
DTYPES = pytest.mark.parametrize("dtype", EXACT, ids=str)
GUIDANCE = pytest.mark.parametrize("guidance", [1.0, 7.5])
STEPS = pytest.mark.parametrize("steps", [4, 20, 50])


@dataclass
class UNetBackbone:
    """A UNet of random weights behind the Backbone protocol."""

    network: UNet2DConditionModel
    family: str = "sd"

    @property
    def device(self) -> torch.device:
        return self.network.device

    def predict(self, z: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
        with torch.no_grad():
            return self.network(z, timestep, encoder_hidden_states=conditioning.embeddings.to(z)).sample


@pytest.fixture(scope="module")
def unets() -> dict[torch.dtype, UNet2DConditionModel]:
    """The same random network in double and in single precision."""
    return {dtype: tiny_unet(dtype=dtype) for dtype in EXACT}


@pytest.fixture(scope="module")
def small_unets() -> dict[torch.dtype, UNet2DConditionModel]:
    """Two levels of a UNet: a quarter of the time, for many steps."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    return {dtype: deepcopy(unet).to(dtype) for dtype in (*EXACT, *HALF)}


@dataclass
class RoundingBackbone(UNetBackbone):
    """A network in half precision under single-precision latents, as backbones run it; it keeps what the network saw."""

    seen: list[tuple[int, Tensor]] = field(default_factory=list)

    def predict(self, z: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
        rounded = z.to(self.network.dtype)
        self.seen.append((timestep, rounded))
        return super().predict(rounded, timestep, conditioning).to(z)


def random_denoiser(unet: UNet2DConditionModel, steps: int, kind: str, guidance: float) -> Denoiser:
    """Guided denoising by a network that is none."""
    generator = torch.Generator().manual_seed(3)
    prompt, empty = (Conditioning(torch.randn(1, 3, 16, generator=generator, dtype=torch.float64)) for _ in range(2))
    return Denoiser(UNetBackbone(unet), make_schedule(steps, kind), prompt, (guidance,), empty)  # type: ignore[arg-type]


def toy(steps: int = 20, kind: str = "epsilon", guidance: float = 1.0, strength: float = 0.3, **schedule: Any) -> Denoiser:
    levels = make_schedule(steps, kind, **schedule)
    return toy_denoiser(denoiser_like(levels, strength), levels, guidance=[guidance])


def inverted(method: InversionMethod, denoiser: Denoiser, z0: Tensor | None = None, seed: int = 0) -> Trajectory:
    return method.invert(denoiser, smooth_latent() if z0 is None else z0, generator=seeded(seed))


def returned(denoiser: Denoiser, trajectory: Trajectory) -> Tensor:
    """The clean latent its own sampler comes back to."""
    sampler = sampler_of(trajectory)
    return sample(denoiser, trajectory.latents[sampler.start or len(trajectory.schedule)], sampler=sampler)


def round_trip(method: InversionMethod, denoiser: Denoiser, dtype: torch.dtype = torch.float64) -> float:
    z0 = smooth_latent().to(dtype)
    back = returned(denoiser, inverted(method, denoiser, z0))
    assert back.dtype == dtype
    return relative_error(back.double(), smooth_latent())


@ALL
@STEPS
@KINDS
@GUIDANCE
@DTYPES
def test_the_round_trip_is_exact(method: InversionMethod, steps: int, kind: str, guidance: float, dtype: torch.dtype) -> None:
    assert round_trip(method, toy(steps, kind, guidance), dtype) < EXACT[dtype]


@EACH
@KINDS
@GUIDANCE
@DTYPES
def test_it_is_exact_with_a_random_network(
    name: str, kind: str, guidance: float, dtype: torch.dtype, unets: dict[torch.dtype, UNet2DConditionModel]
) -> None:
    """Exactness must not depend on the network being a denoiser: where DDIM inversion ends beside the image, these do not."""
    denoiser = random_denoiser(unets[dtype], 4, kind, guidance)
    assert round_trip(METHODS[name], denoiser, dtype) < EXACT[dtype]


@EACH
@pytest.mark.parametrize("steps", [pytest.param(20, marks=pytest.mark.slow), 50])
@pytest.mark.parametrize(
    ("kind", "guidance", "dtype"),
    [("epsilon", 7.5, torch.float64), ("v_prediction", 7.5, torch.float32)],
    ids=str,
)
def test_it_is_exact_with_a_random_network_over_many_steps(
    name: str,
    steps: int,
    kind: str,
    guidance: float,
    dtype: torch.dtype,
    small_unets: dict[torch.dtype, UNet2DConditionModel],
) -> None:
    """Not at guidance 7.5, epsilon and single precision: there a random network itself amplifies rounding to 1e-4."""
    denoiser = random_denoiser(small_unets[dtype], steps, kind, guidance)
    assert round_trip(METHODS[name], denoiser, dtype) < EXACT[dtype]


@EACH
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_half_precision_network_rounds_no_more_than_it_must(
    name: str, dtype: torch.dtype, seed: int, small_unets: dict[torch.dtype, UNet2DConditionModel]
) -> None:
    """Exact while the network sees on the way down what it saw on the way up; else within its own rounding."""
    backbone = RoundingBackbone(small_unets[dtype])
    denoiser = replace(random_denoiser(small_unets[dtype], 10, "epsilon", 1.0), backbone=backbone)
    z0 = smooth_latent(seed).float()
    trajectory = inverted(METHODS[name], denoiser, z0)
    up = list(backbone.seen)
    backbone.seen.clear()
    back = returned(denoiser, trajectory)
    same = all(any(t == s and torch.equal(x, y) for s, y in up) for t, x in backbone.seen)
    assert back.dtype == trajectory.latents.dtype == torch.float32
    assert relative_error(back, z0) < (1e-5 if same else HALF[dtype])


def test_ddim_is_far_off_with_a_random_network(unets: dict[torch.dtype, UNet2DConditionModel]) -> None:
    """So that the tests above can fail."""
    assert round_trip(DDIM(), random_denoiser(unets[torch.float64], 4, "epsilon", 1.0)) > 0.1


SCHEDULES: dict[str, dict[str, Any]] = {
    "offset 0": {"steps_offset": 0},
    "alpha to one": {"set_alpha_to_one": True},
    "offset 0, alpha to one": {"steps_offset": 0, "set_alpha_to_one": True},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "zero terminal SNR": {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
}


@EACH
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_it_is_exact_on_a_schedule_or_says_that_it_cannot_serve_it(name: str, schedule: dict[str, Any]) -> None:
    denoiser = toy(kind="v_prediction", **schedule)
    try:
        trajectory = inverted(METHODS[name], denoiser)
    except ScheduleError:
        return
    assert relative_error(returned(denoiser, trajectory), smooth_latent()) < 1e-10


def test_zero_terminal_snr_is_refused_and_names_what_serves_it() -> None:
    denoiser = toy(kind="v_prediction", **SCHEDULES["zero terminal SNR"])
    assert denoiser.schedule.signal[-1] == 0
    for method in (OBELM(), EDICT()):
        with pytest.raises(ScheduleError, match=rf"{method.name}.*use bdia or fixed_point"):
            method.invert(denoiser, smooth_latent())
    assert round_trip(BDIA(), denoiser) < 1e-10


@pytest.mark.parametrize("name", ["edict", "edict in one order", "bdia", "obelm"])
@STEPS
@KINDS
def test_the_noise_keeps_the_size_of_noise(name: str, steps: int, kind: str) -> None:
    """BDIA at gamma 0.5 reached 1e12 at 50 steps, and O-BELM's growing mode is damped on the way down only."""
    assert inverted(METHODS[name], toy(steps, kind)).noise.std() < 3


@EACH
def test_from_the_noise_alone_it_is_not_exact(name: str) -> None:
    """What DDIM's sampler makes of z_T: the second latent, or the noises, are no ornament."""
    denoiser = toy()
    assert relative_error(sample(denoiser, inverted(METHODS[name], denoiser).noise), smooth_latent()) > 1e-2


@pytest.mark.parametrize("name", ["edict", "bdia", "obelm"])
def test_its_own_sampler_needs_the_extra_latent_too(name: str) -> None:
    denoiser = toy()
    trajectory = inverted(METHODS[name], denoiser)
    lost = {"companion": trajectory.latents} if name == "edict" else {"correction": 0 * trajectory.extras["correction"]}
    assert trajectory.extras.keys() == lost.keys()
    assert relative_error(returned(denoiser, replace(trajectory, extras=lost)), smooth_latent()) > 1e-2


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.89, 1.01, math.nan])
def test_a_gamma_that_amplifies_rounding_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        BDIA(gamma=gamma)


@pytest.mark.parametrize("mix", [0.0, 0.89, 1.01, math.nan])
def test_a_mix_that_amplifies_rounding_is_refused(mix: float) -> None:
    with pytest.raises(ValueError, match="mix"):
        EDICT(mix=mix)


@pytest.mark.parametrize("setting", [{"skip": -0.1}, {"skip": 1}, {"eta": 0}, {"eta": 1.1}])
def test_edit_friendly_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        EditFriendly(**setting)


@pytest.mark.parametrize(("method", "value"), [(EDICT, {"mix": 0.95}), (EDICT, {"leapfrog": False}), (BDIA, {"gamma": 0.9})])
def test_its_settings_matter(method: type[InversionMethod], value: dict[str, Any]) -> None:
    denoiser = toy()
    assert relative_error(inverted(method(**value), denoiser).noise, inverted(method(), denoiser).noise) > 1e-5


# The formulas. Names as in inversion.md: s, g the signal and noise of a level, h = g / s, D a step down, N a step up.


@dataclass
class Levels:
    """The steps of a deterministic sampler in eps form (inversion.md, section 1)."""

    denoiser: Denoiser

    def __post_init__(self) -> None:
        self.s, self.g = self.denoiser.schedule.signal, self.denoiser.schedule.noise
        self.h = [g / s for s, g in zip(self.s, self.g, strict=True)]

    def eps(self, z: Tensor, i: int) -> Tensor:
        """The noise predicted on latents z of level i, straight from the toy's output."""
        backbone = self.denoiser.backbone
        assert isinstance(backbone, ToyBackbone)
        out = backbone.output(z, self.denoiser.schedule.timesteps[i], self.denoiser.conditioning.embeddings)
        return out if self.denoiser.schedule.prediction_type == "epsilon" else self.s[i] * out + self.g[i] * z

    def down(self, i: int, z: Tensor, e: Tensor) -> Tensor:
        """D_i: level i -> i - 1."""
        return self.s[i - 1] * (z / self.s[i] - (self.h[i] - self.h[i - 1]) * e)

    def up(self, i: int, z: Tensor, e: Tensor) -> Tensor:
        """N_i: level i - 1 -> i."""
        return self.s[i] * (z / self.s[i - 1] + (self.h[i] - self.h[i - 1]) * e)


T = 20
Down = Callable[[Levels, Trajectory, Tensor], Tensor]


def assert_levels(actual: Tensor, expected: list[Tensor]) -> None:
    for level, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert relative_error(a, b) < 1e-12, level


@KINDS
@pytest.mark.parametrize("mix", [0.93, 1.0])
@pytest.mark.parametrize("leapfrog", [True, False])
def test_edict_goes_up_by_the_papers_formula(leapfrog: bool, mix: float, kind: str) -> None:
    """Equation 15; with leapfrog the two change places at every odd step, counted from the noise."""
    f = Levels(toy(kind=kind))
    x = y = smooth_latent()
    xs, ys = [x], [y]
    for i in range(1, T + 1):
        turned = leapfrog and (T - i) % 2 == 1
        if turned:
            x, y = y, x
        y_inner = (y - (1 - mix) * x) / mix
        x_inner = (x - (1 - mix) * y_inner) / mix
        y = f.up(i, y_inner, f.eps(x_inner, i))
        x = f.up(i, x_inner, f.eps(y, i))
        if turned:
            x, y = y, x
        xs.append(x)
        ys.append(y)
    trajectory = inverted(EDICT(mix=mix, leapfrog=leapfrog), f.denoiser)
    assert_levels(trajectory.latents, xs)
    assert_levels(trajectory.extras["companion"], ys)


def edict_down(f: Levels, trajectory: Trajectory, x: Tensor) -> Tensor:
    """Equation 14, leapfrog, from a pair that is as far apart as the source's."""
    p, y = 0.93, x + trajectory.extras["companion"][-1] - trajectory.noise
    for i in range(T, 0, -1):
        turned = (T - i) % 2 == 1
        if turned:
            x, y = y, x
        x_inner = f.down(i, x, f.eps(y, i))
        y_inner = f.down(i, y, f.eps(x_inner, i))
        x = p * x_inner + (1 - p) * y_inner
        y = p * y_inner + (1 - p) * x
        if turned:
            x, y = y, x
    return x


@pytest.mark.parametrize("leapfrog", [True, False])
@KINDS
def test_the_two_latents_of_edict_stay_together(kind: str, leapfrog: bool) -> None:
    """inversion.md 6.1 has them 1 to 4 % of their norm apart at z_T; the mixing is there to keep them so."""
    trajectory = inverted(EDICT(leapfrog=leapfrog), toy(50, kind))
    assert 1e-4 < relative_error(trajectory.extras["companion"][-1], trajectory.noise) < 0.05


@KINDS
@pytest.mark.parametrize("gamma", [1.0, 0.96, 0.9])
def test_bdia_goes_up_by_the_papers_formula(gamma: float, kind: str) -> None:
    f = Levels(toy(kind=kind))
    trajectory = inverted(BDIA(gamma=gamma), f.denoiser)
    z = trajectory.latents
    for i in range(1, T):
        e = f.eps(z[i], i)
        expected = z[i - 1] / gamma - f.down(i, z[i], e) / gamma + f.up(i + 1, z[i], e)
        assert relative_error(z[i + 1], expected) < 1e-12, i
    assert relative_error(trajectory.extras["correction"][0], z[T - 1] - f.down(T, z[T], f.eps(z[T], T))) < 1e-10


def bdia_down(f: Levels, trajectory: Trajectory, z: Tensor) -> Tensor:
    """With gamma 1, from a first step by DDIM and the stored correction."""
    above, z = z, f.down(T, z, f.eps(z, T)) + trajectory.extras["correction"][0]
    for i in range(T - 1, 0, -1):
        e = f.eps(z, i)
        above, z = z, above + f.down(i, z, e) - f.up(i + 1, z, e)
    return z


@KINDS
def test_obelm_goes_up_by_the_papers_formula(kind: str) -> None:
    f = Levels(toy(kind=kind))
    trajectory = inverted(OBELM(), f.denoiser)
    z, s = trajectory.latents, f.s
    for i in range(2, T + 1):
        wide, narrow = f.h[i] - f.h[i - 1], f.h[i - 1] - f.h[i - 2]
        expected = (
            s[i] / s[i - 2] * (wide / narrow) ** 2 * z[i - 2]
            + s[i] / s[i - 1] * (narrow**2 - wide**2) / narrow**2 * z[i - 1]
            + s[i] * (narrow + wide) * wide / narrow * f.eps(z[i - 1], i - 1)
        )
        assert relative_error(z[i], expected) < 1e-12, i
    assert relative_error(trajectory.extras["correction"][0], z[T - 1] - f.down(T, z[T], f.eps(z[T], T))) < 1e-10


def obelm_down(f: Levels, trajectory: Trajectory, z: Tensor) -> Tensor:
    """The same identity solved for the lowest latent."""
    s = f.s
    above, z = z, f.down(T, z, f.eps(z, T)) + trajectory.extras["correction"][0]
    for i in range(T, 1, -1):
        wide, narrow = f.h[i] - f.h[i - 1], f.h[i - 1] - f.h[i - 2]
        rest = above - s[i] / s[i - 1] * (narrow**2 - wide**2) / narrow**2 * z
        rest = rest - s[i] * (narrow + wide) * wide / narrow * f.eps(z, i - 1)
        above, z = z, rest * s[i - 2] / s[i] * (narrow / wide) ** 2
    return z


@pytest.mark.parametrize("method", [BDIA(), OBELM()], ids=["bdia", "obelm"])
@KINDS
def test_a_two_step_inverse_starts_with_ddims_step(method: InversionMethod, kind: str) -> None:
    denoiser = toy(kind=kind)
    assert torch.equal(inverted(method, denoiser).latents[:2], inverted(DDIM(), denoiser).latents[:2])


def posterior(f: Levels, z: Tensor, i: int, eta: float) -> tuple[Tensor, float]:
    """(mu, sigma) of the stochastic step i -> i - 1 (inversion.md 7; DDIM's eta ** 2 where the authors have eta)."""
    below, here = f.s[i - 1] ** 2, f.s[i] ** 2
    sigma = eta * math.sqrt((1 - below) / (1 - here) * (1 - here / below))
    e = f.eps(z, i)
    return f.s[i - 1] * (z - f.g[i] * e) / f.s[i] + math.sqrt(1 - below - sigma**2) * e, sigma


@KINDS
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_edit_friendly_noises_are_the_papers(eta: float, kind: str) -> None:
    """zeta_i = (x_{i-1} - mu) / sigma; ours travels scaled by sigma."""
    f = Levels(toy(kind=kind))
    trajectory = inverted(EditFriendly(eta=eta), f.denoiser)
    x = trajectory.latents
    for i in range(1, T + 1):
        mu, sigma = posterior(f, x[i], i, eta)
        assert relative_error(trajectory.extras["noises"][i - 1] / sigma, (x[i - 1] - mu) / sigma) < 1e-10, i


def test_edit_friendly_latents_are_noised_independently_of_each_other() -> None:
    """Equation 5: no Markov chain. The noises come from the generator, from level 1 up."""
    f = Levels(toy())
    x = inverted(EditFriendly(), f.denoiser, seed=7).latents
    generator = torch.Generator().manual_seed(7)
    for i in range(1, T + 1):
        n = torch.randn(1, 4, 8, 8, generator=generator)
        assert relative_error(x[i], f.s[i] * smooth_latent() + f.g[i] * n.double()) < 1e-12, i


def test_edit_friendly_noises_are_larger_than_noise() -> None:
    """By design: 2.6 at 20 steps in inversion.md, where it would be 1 for a Markov chain."""
    f = Levels(toy())
    trajectory = inverted(EditFriendly(), f.denoiser)
    deviations = [posterior(f, trajectory.latents[i], i, 1)[1] for i in range(1, T + 1)]
    zetas = torch.stack([n / d for n, d in zip(trajectory.extras["noises"], deviations, strict=True)])
    assert 1.5 < zetas.std() < 4


def edit_friendly_down(f: Levels, trajectory: Trajectory, z: Tensor) -> Tensor:
    """DDPM's steps with the stored noises, from level 20 - 7 = 13."""
    for i in range(13, 0, -1):
        z = posterior(f, z, i, 1)[0] + trajectory.extras["noises"][i - 1]
    return z


DOWN: dict[str, Down] = {"edict": edict_down, "bdia": bdia_down, "obelm": obelm_down, "edit_friendly": edit_friendly_down}


@pytest.mark.parametrize("name", DOWN)
@KINDS
def test_another_start_goes_down_by_the_papers_formula(name: str, kind: str) -> None:
    """From a latent that is not the source's, as the target branch of an edit is: the round trip says nothing about it."""
    f = Levels(toy(kind=kind))
    trajectory = inverted(METHODS[name], f.denoiser)
    sampler = sampler_of(trajectory)
    start = trajectory.latents[sampler.start or T] + 0.1 * smooth_latent(seed=9)
    ours = sample(f.denoiser, start, sampler=sampler)
    assert relative_error(ours, DOWN[name](f, trajectory, start)) < 1e-10
    assert relative_error(ours, smooth_latent()) > 1e-3, "so that this test can fail"


def test_the_last_noise_map_is_kept() -> None:
    """The authors zero it, which alone costs several per cent."""
    denoiser = toy()
    trajectory = inverted(EditFriendly(), denoiser)
    noises = trajectory.extras["noises"].clone()
    noises[0] = 0
    assert relative_error(returned(denoiser, replace(trajectory, extras={"noises": noises})), smooth_latent()) > 1e-3


@pytest.mark.parametrize(
    ("steps", "skip", "start"),
    [(100, 0.36, 64), (50, 0.36, 32), (50, 0.24, 38), (20, 0.36, 13), (4, 0.36, 3), (20, 0, 20), (20, 0.99, 1), (1, 0.36, 1)],
)
def test_skip_leaves_the_noisiest_steps_out(steps: int, skip: float, start: int) -> None:
    denoiser = toy(steps)
    trajectory = inverted(EditFriendly(skip=skip), denoiser)
    assert sampler_of(trajectory).start == start
    levels: list[int] = []

    def heard(level: int, z: Tensor) -> Tensor:
        levels.append(level)
        return z

    back = sample(denoiser, trajectory.latents[start], sampler=sampler_of(trajectory), after_step=heard)
    assert levels == list(range(start - 1, -1, -1))
    assert relative_error(back, smooth_latent()) < 1e-10


@pytest.mark.parametrize(("steps", "percent"), [(100, 29), (100, 57), (50, 58), (100, 36)])
def test_a_share_that_is_a_whole_number_of_steps_skips_that_many(steps: int, percent: int) -> None:
    """Where 0.29 * 100 is 28.999999999999996 in floating point."""
    trajectory = inverted(EditFriendly(skip=percent / 100), toy(steps))
    assert sampler_of(trajectory).start == steps - steps * percent // 100


def test_the_generator_alone_decides_the_noise() -> None:
    denoiser = toy()
    first, again, other = (inverted(EditFriendly(), denoiser, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.extras["noises"], again.extras["noises"])
    for level in range(1, T + 1):
        assert relative_error(other.latents[level], first.latents[level]) > 1e-2, level


@pytest.mark.parametrize("name", ["edict", "bdia", "obelm"])
def test_without_noise_of_its_own_the_generator_does_not_matter(name: str) -> None:
    denoiser = toy()
    first, other = (inverted(METHODS[name], denoiser, seed=seed) for seed in (0, 1))
    assert torch.equal(first.latents, other.latents)
