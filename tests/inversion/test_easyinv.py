"""EasyInv against its own algebra.

That it reconstructs better than DDIM is claimed nowhere: in exact arithmetic it does not.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from easyinv_edit.cost import measured
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import EasyInvWarning
from easyinv_edit.inversion import DDIM, EasyInv
from easyinv_edit.sampling import sample
from easyinv_edit.trajectory import Trajectory
from tests.helpers import ToyBackbone, constant, ddim_scheduler, denoiser_like, make_schedule, relative_error, smooth_latent
from tests.helpers import toy_denoiser as make_denoiser

Variant = Literal["repo", "paper"]
VARIANTS: tuple[Variant, ...] = ("repo", "paper")
PRESETS: dict[str, tuple[float, tuple[float, float]]] = {"sd": (0.5, (0.05, 0.25)), "sdxl": (0.8, (0.85, 0.95))}
HITS = {
    50: (range(3, 13), range(43, 48)),
    20: (range(2, 5), range(18, 19)),
    100: (range(6, 25), range(86, 95)),
    30: (range(2, 8), range(26, 29)),
    25: (range(2, 7), range(22, 24)),
    10: (range(1, 3), range(9, 10)),
    4: (range(0), range(0)),
}
"""T: step indices of the authors' code with their SD and SDXL settings (inversion.md, table 3.3)."""


def toy(steps: int = 20, kind: str = "epsilon", family: str = "sd") -> Denoiser:
    """A denoiser with an error to feed back, of a given family."""
    schedule = make_schedule(steps, kind)
    denoiser = make_denoiser(denoiser_like(schedule), schedule)
    return replace(denoiser, backbone=ToyBackbone(denoiser_like(schedule), family))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_eta_one_is_ddim_bit_for_bit(variant: Variant, kind: str) -> None:
    denoiser, z0 = toy(kind=kind), smooth_latent()
    easy = EasyInv(variant=variant, eta=1, window=(0, 1)).invert(denoiser, z0)
    assert torch.equal(easy.latents, DDIM().invert(denoiser, z0).latents)


@pytest.mark.parametrize(("steps", "window"), [(4, None), (20, (0.51, 0.54)), (20, (0.05, 0.1))])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_window_is_ddim_bit_for_bit_and_warns(
    variant: Variant, steps: int, window: tuple[float, float] | None
) -> None:
    denoiser, z0 = toy(steps), smooth_latent()
    with pytest.warns(EasyInvWarning, match=f"none of the {steps} steps.*plain DDIM") as caught:
        easy = EasyInv(variant=variant, window=window).invert(denoiser, z0)
    assert len(caught) == 1
    assert torch.equal(easy.latents, DDIM().invert(denoiser, z0).latents)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_blend_is_no_small_thing(variant: Variant) -> None:
    """So that the equalities with DDIM above can fail."""
    denoiser, z0 = toy(), smooth_latent()
    easy = EasyInv(variant=variant).invert(denoiser, z0)
    assert relative_error(easy.noise, DDIM().invert(denoiser, z0).noise) > 0.01


@pytest.mark.parametrize("steps", HITS)
def test_hit_steps_are_the_authors(steps: int) -> None:
    sd, sdxl = HITS[steps]
    assert EasyInv(preset="sd").hit_steps(steps) == list(sd)
    assert EasyInv(preset="sdxl").hit_steps(steps) == list(sdxl)
    assert EasyInv().hit_steps(steps, "sdxl") == list(sdxl)


@pytest.mark.parametrize("steps", [50, 20])
def test_hit_steps_follow_the_window_with_both_ends_out(steps: int) -> None:
    assert EasyInv(window=(0, 1)).hit_steps(steps) == list(range(1, steps)), "step 0 has no predecessor"
    assert EasyInv(window=(0.5, 0.6)).hit_steps(20) == [11]


def deviations(schedule_steps: int) -> tuple[list[float], list[float]]:
    """(s, h): signal scale and noise-to-signal per level, straight from diffusers' alphas."""
    scheduler = ddim_scheduler(schedule_steps)
    labels = sorted(scheduler.timesteps.tolist())
    alphas = [float(scheduler.final_alpha_cumprod), *(float(scheduler.alphas_cumprod[t]) for t in labels)]
    return [math.sqrt(a) for a in alphas], [math.sqrt(1 - a) / math.sqrt(a) for a in alphas]


def frozen_noise_coefficients(steps: int, variant: Variant, family: str) -> list[tuple[float, float]]:
    """(p, q) of every level: x = p z0/s0 + q e in the coordinate x = z/s, for a model that always outputs e.

    Written from inversion.md 3.5 alone: a step adds h[k+1] - h[k] to q; a blend takes eta of the level and 1 - eta of the
    blended level before it, which is worth s[k-1]/s[k] there. "repo" blends level j before step j, "paper" level j + 1 after.
    """
    s, h = deviations(steps)
    eta = PRESETS[family][0]
    hits = HITS[steps][list(PRESETS).index(family)]
    blended_levels = set(hits) if variant == "repo" else {j + 1 for j in hits}
    levels, blended = [(1.0, 0.0)], (1.0, 0.0)
    for k in range(1, steps + 1):
        reached = (blended[0], blended[1] + h[k] - h[k - 1])
        gain = (1 - eta) * s[k - 1] / s[k]
        mixed = (eta * reached[0] + gain * blended[0], eta * reached[1] + gain * blended[1])
        blended = mixed if k in blended_levels else reached
        levels.append(blended if variant == "paper" else reached)
    return levels


@pytest.mark.parametrize("family", PRESETS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("steps", [50, 20, 10])
def test_closed_form_with_a_frozen_noise(steps: int, variant: Variant, family: str) -> None:
    s, _ = deviations(steps)
    z0, noise = smooth_latent(), smooth_latent(seed=1)
    easy = EasyInv(variant=variant, preset=family).invert(make_denoiser(constant(noise), make_schedule(steps)), z0)  # type: ignore[arg-type]
    for level, (p, q) in enumerate(frozen_noise_coefficients(steps, variant, family)):
        assert relative_error(easy.latents[level], s[level] * (p * z0 / s[0] + q * noise)) < 1e-12, level


@pytest.mark.parametrize(
    ("family", "steps", "repo", "paper"),
    [
        ("sd", 50, (1.0803, -0.2213), (1.0873, -0.2099)),
        ("sd", 20, (1.0488, -0.2033), (1.0609, -0.1568)),
        ("sdxl", 50, (1.1086, -0.0184), (1.1126, -0.0175)),
        ("sdxl", 20, (1.0517, -0.0105), (1.0567, -0.0094)),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reconstruction_is_biased_as_published_in_our_reference(
    variant: Variant, family: str, steps: int, repo: tuple[float, float], paper: tuple[float, float]
) -> None:
    """More signal and less noise than the sampler expects: the measured table of inversion.md 3.5, to its four digits."""
    z0, noise = torch.zeros(1, 4, 2, 2).double(), torch.zeros(1, 4, 2, 2).double()
    z0[:, 0], noise[:, 1] = 1, 1
    denoiser = make_denoiser(constant(noise), make_schedule(steps))
    back = sample(denoiser, EasyInv(variant=variant, preset=family).invert(denoiser, z0).noise)  # type: ignore[arg-type]
    expected = repo if variant == "repo" else paper
    assert back[0, :2, 0, 0].tolist() == pytest.approx(expected, abs=6e-5)


def published(denoiser: Denoiser, z0: Tensor, variant: Variant, eta: float, hits: range) -> tuple[list[Tensor], list[Tensor]]:
    """(levels, what the UNet saw) of the authors' two listings (inversion.md 3.2) over this schedule's step."""
    schedule, z, previous = denoiser.schedule, z0, z0
    levels, seen = [z0], []
    for j in range(len(schedule)):
        seen.append(z)
        output = denoiser.backbone.output(z, schedule.timesteps[j + 1], denoiser.conditioning.embeddings)  # type: ignore[attr-defined]
        if variant == "repo":
            previous = eta * z + (1 - eta) * previous if j in hits else z
            z = schedule.renoise(previous, output, j + 1)
        else:
            reached = schedule.renoise(z, output, j + 1)
            z = eta * reached + (1 - eta) * z if j in hits else reached
        levels.append(z)
    return levels, seen


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", PRESETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_levels_and_unet_inputs_are_those_of_the_authors_listings(variant: Variant, family: str, kind: str) -> None:
    denoiser, z0 = toy(50, kind, family), smooth_latent()
    easy = EasyInv(variant=variant).invert(denoiser, z0)
    calls = list(denoiser.backbone.calls)  # type: ignore[attr-defined]
    levels, seen = published(denoiser, z0, variant, PRESETS[family][0], HITS[50][list(PRESETS).index(family)])
    assert relative_error(easy.latents, torch.stack(levels)) < 1e-12
    assert relative_error(torch.stack([z for _, z in calls]), torch.stack(seen)) < 1e-12
    assert [label for label, _ in calls] == list(denoiser.schedule.timesteps[1:]), "the higher label"


def inputs(variant: Variant) -> list[Tensor]:
    """What the UNet saw with one blend, at step 5 of 20."""
    denoiser = toy()
    EasyInv(variant=variant, eta=0.5, window=(0.2, 0.3)).invert(denoiser, smooth_latent())
    return [z for _, z in denoiser.backbone.calls]  # type: ignore[attr-defined]


def test_the_unet_sees_the_unblended_latent_in_repo_and_the_blended_one_in_paper() -> None:
    plain = DDIM().invert(toy(), smooth_latent()).latents
    repo, paper = inputs("repo"), inputs("paper")
    for j in range(6):
        assert torch.equal(repo[j], plain[j]), "level 5 is blended after the UNet has seen it"
        assert torch.equal(paper[j], plain[j])
    torch.testing.assert_close(paper[6], 0.5 * plain[6] + 0.5 * plain[5], rtol=1e-12, atol=1e-14)
    assert relative_error(repo[6], paper[6]) > 1e-4


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_costs_what_ddim_costs(variant: Variant, steps: int) -> None:
    denoiser, method = toy(steps), EasyInv(variant=variant)
    with measured(denoiser.backbone.network) as cost:
        method.invert(denoiser, smooth_latent())
    assert cost.evaluations == method.evaluations(steps) == DDIM().evaluations(steps) == steps


def same(a: Trajectory, b: Trajectory) -> bool:
    return torch.equal(a.latents, b.latents)


@pytest.mark.parametrize("family", PRESETS)
def test_auto_chooses_the_preset_of_the_model_s_family(family: Literal["sd", "sdxl"]) -> None:
    denoiser, z0 = toy(family=family), smooth_latent()
    other: Literal["sd", "sdxl"] = "sd" if family == "sdxl" else "sdxl"
    auto = EasyInv().invert(denoiser, z0)
    assert same(auto, EasyInv(preset=family).invert(denoiser, z0))
    assert not same(auto, EasyInv(preset=other).invert(denoiser, z0))


@pytest.mark.parametrize(
    ("settings", "family", "resolved"),
    [
        ({}, "sd", PRESETS["sd"]),
        ({}, "sdxl", PRESETS["sdxl"]),
        ({}, "something new", PRESETS["sd"]),
        ({"preset": "sdxl"}, "sd", PRESETS["sdxl"]),
        ({"preset": "sd"}, "sdxl", PRESETS["sd"]),
        ({"eta": 0.3}, "sdxl", (0.3, (0.85, 0.95))),
        ({"eta": 0}, "sd", (0.0, (0.05, 0.25))),
        ({"window": (0, 0.5)}, "sdxl", (0.8, (0.0, 0.5))),
        ({"eta": 0.9, "window": [0.1, 0.2], "preset": "sdxl"}, "sd", (0.9, (0.1, 0.2))),
    ],
)
def test_eta_and_window_override_the_preset(settings: dict[str, Any], family: str, resolved: object) -> None:
    assert EasyInv(**settings).resolved(family) == resolved


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("eta", -0.1),
        ("eta", 1.1),
        ("eta", math.nan),
        ("eta", "half"),
        ("window", (-0.1, 0.5)),
        ("window", (0.5, 1.5)),
        ("window", (0.25, 0.05)),
        ("window", (0.5, 0.5)),
        ("window", (0.1,)),
        ("window", (0.1, 0.2, 0.3)),
        ("window", 0.5),
        ("variant", "best"),
        ("preset", "flux"),
        ("gamma", 1),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(ValueError, match=setting):
        EasyInv(**{setting: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "hits"), [(4, [3]), (5, [3, 4]), (8, [5, 6, 7])])
def test_the_few_step_preset_blends_where_the_authors_windows_hold_nothing(steps: int, hits: list[int]) -> None:
    assert EasyInv(preset="few_step").hit_steps(steps, "sdxl") == hits
    assert EasyInv().hit_steps(4, "sd") == EasyInv().hit_steps(4, "sdxl") == []
