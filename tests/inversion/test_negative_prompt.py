"""Negative-prompt inversion: with the source prompt as the negative one, guidance is the identity for the source branch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from easyinv_edit.choices import build
from easyinv_edit.conditioning import Conditioning
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import InputError
from easyinv_edit.inversion import INVERSIONS, InversionMethod, NegativePrompt, sampler_of
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory
from tests.helpers import Output, ToyBackbone, denoiser_like, make_schedule, relative_error, seeded, smooth_latent, toy_denoiser

T = 20
SCHEDULE = make_schedule(T)
OUTPUT = denoiser_like(SCHEDULE, 0.3)
SOLVED: dict[str, Any] = {"name": "fixed_point", "iterations": 60}
SCALES = pytest.mark.parametrize("guidance", [1.0, 7.5, 15.0])
BASES = ["ddim", "easyinv", "fixed_point", "renoise", "edit_friendly", "edict", "bdia", "obelm"]
QUIET = pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")


def toy(guidance: float = 1.0) -> Denoiser:
    """Conditioned on 1, its negative prompt on 0: guidance is not the identity by itself."""
    return toy_denoiser(OUTPUT, SCHEDULE, guidance=[guidance])


def inverted(method: InversionMethod) -> Trajectory:
    return method.invert(toy(), smooth_latent(), generator=seeded(0))


def back(trajectory: Trajectory, guidance: float) -> Tensor:
    """The source branch alone, sampled at `guidance` and not pinned."""
    sampler = sampler_of(trajectory)
    return sample(toy(guidance), trajectory.latents[sampler.start or T], sampler=sampler)


@QUIET
@SCALES
@pytest.mark.parametrize("base", BASES)
def test_the_source_branch_is_the_bases_at_guidance_one(base: str, guidance: float) -> None:
    plain, ours = inverted(INVERSIONS[base]()), inverted(NegativePrompt(base=base))
    assert torch.equal(ours.latents, plain.latents), "the inversion is the base's"
    assert relative_error(back(ours, guidance), back(plain, 1.0)) < 1e-12
    if guidance != 1:
        assert relative_error(back(plain, guidance), back(plain, 1.0)) > 1e-2, "the base alone leaves it"


def test_over_a_fixed_point_the_round_trip_is_exact_at_guidance() -> None:
    z0 = smooth_latent()
    assert relative_error(back(inverted(NegativePrompt(base=SOLVED)), 7.5), z0) < 1e-9
    assert relative_error(back(inverted(build(INVERSIONS, SOLVED, "inversion method")), 7.5), z0) > 0.05


@SCALES
def test_over_edict_it_stays_exact(guidance: float) -> None:
    trajectory = inverted(NegativePrompt(base="edict"))
    assert set(trajectory.extras) == {"companion"}
    assert relative_error(back(trajectory, guidance), smooth_latent()) < 1e-12


# In an edit


def editing(guidance: float, output: Output = OUTPUT) -> Denoiser:
    """The source of `toy` and two targets; the edit's own negative prompts are -1, -2 and -3."""
    numbers = torch.tensor([[1.0, 5.0, -4.0], [-1.0, -2.0, -3.0]], dtype=torch.float64)
    conditioning, negative = (Conditioning(row.reshape(3, 1, 1)) for row in numbers)
    return Denoiser(ToyBackbone(output), SCHEDULE, conditioning, (guidance,) * 3, negative)


def edited(trajectory: Trajectory, guidance: float = 7.5) -> tuple[Tensor, list[Tensor]]:
    """(latents of source and targets, embeddings of every UNet batch)."""
    seen: list[Tensor] = []

    def output(z: Tensor, t: int, e: Tensor) -> Tensor:
        seen.append(e.flatten().clone())
        return OUTPUT(z, t, e)

    sampler = sampler_of(trajectory)
    z = trajectory.latents[sampler.start or T].repeat(3, 1, 1, 1)
    return sample(editing(guidance, output), z, sampler=sampler), seen


@QUIET
@pytest.mark.parametrize("base", BASES)
def test_without_interpolation_an_edit_is_the_bases(base: str) -> None:
    ours, theirs = (edited(inverted(m))[0] for m in (NegativePrompt(base=base, interpolation=0.0), INVERSIONS[base]()))
    assert torch.equal(ours, theirs)
    assert relative_error(edited(inverted(NegativePrompt(base=base)))[0], theirs) > 1e-2


@pytest.mark.parametrize(
    ("interpolation", "negatives"), [(0.0, [-1.0, -2.0, -3.0]), (0.5, [0.0, -0.5, -1.0]), (1.0, [1.0, 1.0, 1.0])]
)
def test_the_negative_embedding_is_blended_linearly_with_the_source_prompts(
    interpolation: float, negatives: list[float]
) -> None:
    _, seen = edited(inverted(NegativePrompt(interpolation=interpolation)))
    assert [e.tolist() for e in seen] == [[*negatives, 1.0, 5.0, -4.0]] * T


def test_the_targets_are_guided_from_the_source_prompt() -> None:
    """A negative embedding written in by hand gives the same edit."""
    trajectory = inverted(NegativePrompt())
    by_hand = replace(editing(7.5), negative=Conditioning(torch.ones(3, 1, 1, dtype=torch.float64)))
    expected = sample(by_hand, trajectory.noise.repeat(3, 1, 1, 1))
    assert torch.equal(edited(trajectory)[0], expected)


# What it can be based on


@pytest.mark.parametrize("base", ["negative_prompt", "proximal", "null_text", "prompt_tuning"])
def test_a_composed_base_is_refused(base: str) -> None:
    with pytest.raises(InputError, match=f"negative_prompt: base: {base} decides the guidance itself; give its base") as caught:
        build(INVERSIONS, {"name": "negative_prompt", "base": base}, "inversion method")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "settings", [{"interpolation": 1.5}, {"interpolation": -0.1}, {"base": "ddom"}, {"base": {"name": "ddim", "x": 1}}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        NegativePrompt(**settings)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_it_costs_what_its_base_costs(base: str, guided: bool) -> None:
    assert NegativePrompt(base=base).evaluations(T, guided) == INVERSIONS[base]().evaluations(T, guided)
