"""DDIM's schedule from the configuration of any scheduler: the labels and alphas of a DDIMScheduler written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from easyinv_edit.backbones import wrap
from easyinv_edit.backbones.schedules import check_overrides, ddim_schedule
from easyinv_edit.errors import EasyInvError, InputError, ModelError, ScheduleError
from easyinv_edit.models import OVERRIDES
from easyinv_edit.schedule import NoiseSchedule
from tests.models import BETAS, sd, sdxl

PUBLISHED = {**BETAS, "prediction_type": "epsilon", "steps_offset": 1}
"""What Stable Diffusion's own scheduler files say."""
DDPM_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {**DDPM_BETAS, "timestep_spacing": "leading", "set_alpha_to_one": True},
    "DDPMScheduler": {**DDPM_BETAS, "timestep_spacing": "leading"},
    "PNDMScheduler": {**DDPM_BETAS, "timestep_spacing": "leading"},
    "EulerDiscreteScheduler": {**DDPM_BETAS, "timestep_spacing": "linspace"},
    "EulerAncestralDiscreteScheduler": {**DDPM_BETAS, "timestep_spacing": "linspace"},
    "DPMSolverMultistepScheduler": {**DDPM_BETAS, "timestep_spacing": "linspace"},
    "UniPCMultistepScheduler": {**DDPM_BETAS, "timestep_spacing": "linspace"},
    "HeunDiscreteScheduler": {**BETAS, "beta_schedule": "linear", "timestep_spacing": "linspace"},
}
"""What each class means where its configuration says nothing, written by hand. Where a class has no `set_alpha_to_one`, it is
Stable Diffusion's: false."""
DISTILLED = ("LCMScheduler", "TCDScheduler")
SPACINGS = ("leading", "trailing", "linspace")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
EACH_CLASS = pytest.mark.parametrize("name", CLASS_DEFAULTS)


def make(name: str, **settings: Any) -> Any:
    return getattr(diffusers, name)(**settings)


def explicit(steps: int, **settings: Any) -> NoiseSchedule:
    """The schedule of DDIM with every setting given."""
    s = DDIMScheduler(**{"set_alpha_to_one": False, **settings, "clip_sample": False})
    s.set_timesteps(steps)
    kind = settings.get("prediction_type", "epsilon")
    return NoiseSchedule.from_alphas(s.alphas_cumprod, s.timesteps.tolist(), float(s.final_alpha_cumprod), kind)


def alphas(beta_start: float, beta_end: float) -> np.ndarray:
    """Cumulative alphas of "scaled_linear" betas, in double precision."""
    return np.cumprod(1 - np.linspace(beta_start**0.5, beta_end**0.5, 1000) ** 2)


# Against closed forms


@pytest.mark.parametrize(
    ("spacing", "steps", "labels"),
    [
        ("leading", 4, [1, 251, 501, 751]),
        ("leading", 3, [1, 334, 667]),
        ("trailing", 4, [249, 499, 749, 999]),
        ("trailing", 3, [332, 666, 999]),
        ("trailing", 1, [999]),
        ("linspace", 4, [0, 333, 666, 999]),
    ],
)
def test_labels_and_levels_in_closed_form(spacing: str, steps: int, labels: list[int]) -> None:
    """ "trailing" ends at 999 and every level leads to the next one that is really visited."""
    schedule = ddim_schedule(make("EulerDiscreteScheduler", **PUBLISHED, timestep_spacing=spacing), steps, {})
    levels = alphas(BETAS["beta_start"], BETAS["beta_end"])[[0, *labels]]
    assert schedule.timesteps == (-1, *labels)
    assert np.allclose(schedule.signal, np.sqrt(levels), rtol=1e-5)
    assert np.allclose(schedule.noise, np.sqrt(1 - levels), atol=1e-5)  # diffusers' alphas are float32
    ratios = np.sqrt(levels[:-1] / levels[1:])
    assert np.allclose(schedule.keep[1:], ratios, rtol=1e-5)
    assert np.allclose(schedule.push[1:], np.sqrt(1 - levels[:-1]) - ratios * np.sqrt(1 - levels[1:]), atol=1e-4)


# Whatever the class


@EACH_CLASS
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_it_is_that_of_ddim_with_the_same_settings(name: str, spacing: str, prediction_type: str) -> None:
    settings = {**PUBLISHED, "prediction_type": prediction_type, "timestep_spacing": spacing}
    if name in ("EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"):
        settings["steps_offset"] = 2  # a user's own
    own = {"set_alpha_to_one": False} if name == "DDIMScheduler" else {}
    for steps in (50, 7, 1):
        assert ddim_schedule(make(name, **settings, **own), steps, {}) == explicit(steps, **settings)


@EACH_CLASS
def test_what_a_configuration_leaves_out_is_its_own_class_default(name: str) -> None:
    for steps in (50, 8):
        assert ddim_schedule(make(name), steps, {}) == explicit(steps, **CLASS_DEFAULTS[name])


@EACH_CLASS
def test_a_configuration_read_from_a_file_means_the_same(name: str, tmp_path: Path) -> None:
    """A published file that leaves keys out, as those of Stable Diffusion 1.x do."""
    content = {"_class_name": name, "_diffusers_version": "0.6.0", **BETAS, "num_train_timesteps": 1000}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(content))
    scheduler = getattr(diffusers, name).from_pretrained(tmp_path)
    assert ddim_schedule(scheduler, 8, {}) == explicit(8, **{**CLASS_DEFAULTS[name], **BETAS})


@pytest.mark.parametrize("name", [*CLASS_DEFAULTS, *DISTILLED])
def test_a_scheduler_that_took_another_ones_place_keeps_its_betas(name: str) -> None:
    """As users change samplers: `from_config` of the old one. What the old one did not say, the new class says."""
    old = make("PNDMScheduler", **PUBLISHED, skip_prk_steps=True, set_alpha_to_one=False)
    schedule = ddim_schedule(getattr(diffusers, name).from_config(old.config), 8, {})
    new = {"timestep_spacing": CLASS_DEFAULTS.get(name, {}).get("timestep_spacing")}
    if name in DISTILLED:
        assert schedule.timesteps[-1] == 999
    else:
        assert schedule == explicit(8, **PUBLISHED, **new)
    assert schedule.signal[0] == explicit(8, **PUBLISHED).signal[0]


@pytest.mark.parametrize("name", CLASS_DEFAULTS)
def test_a_scheduler_that_took_a_distilled_ones_place_has_any_number_of_steps(name: str) -> None:
    old = make("LCMScheduler", **BETAS, original_inference_steps=50, timestep_spacing="leading", set_alpha_to_one=False)
    scheduler = getattr(diffusers, name).from_config(old.config)
    assert ddim_schedule(scheduler, 100, {}) == explicit(100, **BETAS)


def test_betas_of_a_users_own() -> None:
    trained = np.linspace(0.001, 0.01, 40).tolist()
    scheduler = make("DDPMScheduler", num_train_timesteps=40, trained_betas=trained)
    schedule = ddim_schedule(scheduler, 4, {})
    assert schedule.timesteps == (-1, 0, 10, 20, 30)
    assert np.allclose(np.square(schedule.signal[1:]), np.cumprod(1 - np.array(trained))[::10], rtol=1e-5)
    decided = ddim_schedule(scheduler, 4, {"beta_end": 0.03})
    assert decided == explicit(4, num_train_timesteps=40, **{**DDPM_BETAS, "beta_end": 0.03})


# Distilled models


@pytest.mark.parametrize("name", DISTILLED)
@pytest.mark.parametrize("original", [50, 100])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_distilled_models_visit_their_own_timesteps(name: str, original: int, steps: int) -> None:
    scheduler = make(name, original_inference_steps=original)
    schedule = ddim_schedule(scheduler, steps, {})
    scheduler.set_timesteps(steps)
    labels = sorted(scheduler.timesteps.tolist())
    assert schedule.timesteps == (-1, *labels)
    assert all((label + 1) % (1000 // original) == 0 for label in labels), "they are among those of the distillation"
    expected = NoiseSchedule.from_alphas(scheduler.alphas_cumprod, labels, 1.0, "epsilon")
    assert schedule == expected


@pytest.mark.parametrize("name", DISTILLED)
def test_more_steps_than_a_model_was_distilled_at_are_refused(name: str) -> None:
    says = "this model was distilled at 50 timesteps and 1001 steps were asked; use up to 8"
    with pytest.raises(ModelError, match=says):
        ddim_schedule(make(name), 1001, {})


@pytest.mark.parametrize("name", DISTILLED)
@pytest.mark.parametrize("given", [{"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}, {"steps_offset": 3}])
def test_a_distilled_model_can_be_spaced_otherwise(name: str, given: dict[str, Any]) -> None:
    settings = {**BETAS, "timestep_spacing": "leading", "set_alpha_to_one": True}
    assert ddim_schedule(make(name), 60, given) == explicit(60, **{**settings, **given})


# Overrides

OTHER: dict[str, tuple[Any, Any]] = {
    "beta_start": (0.001, 0.002),
    "beta_end": (0.02, 0.03),
    "beta_schedule": ("linear", "squaredcos_cap_v2"),
    "prediction_type": ("v_prediction", "epsilon"),
    "rescale_betas_zero_snr": (True, False),
    "set_alpha_to_one": (True, False),
    "steps_offset": (0, 3),
    "timestep_spacing": ("trailing", "leading"),
}
"""Two values each, of which one is not what a scheduler says."""
STARTS = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
UNSAID = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "set_alpha_to_one": False, "steps_offset": 0}


def test_every_override_is_tried() -> None:
    assert set(OTHER) == set(OVERRIDES)
    given = {key: first for key, (first, _) in OTHER.items()}
    assert check_overrides(given) == given


@pytest.mark.parametrize("key", OTHER)
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("said", [True, False], ids=["said", "left out"])
def test_an_override_acts(name: str, key: str, said: bool) -> None:
    """Whether the scheduler's configuration says something else or leaves it to its class."""
    settings: dict[str, Any] = PUBLISHED if said else {}
    spacing = {} if key == "timestep_spacing" else {"timestep_spacing": "leading"}  # the only one that knows an offset
    now = {**UNSAID, **CLASS_DEFAULTS[name], **settings, **spacing}
    value = next(other for other in OTHER[key] if other != now[key])
    scheduler = make(name, **settings)
    assert ddim_schedule(scheduler, 8, spacing) == explicit(8, **now)
    decided = ddim_schedule(scheduler, 8, {**spacing, key: value})
    assert decided == explicit(8, **{**now, key: value})
    assert decided != explicit(8, **now)


def test_ddim_can_end_like_stable_diffusion() -> None:
    scheduler = make("DDIMScheduler", **BETAS)
    assert ddim_schedule(scheduler, 8, {}).signal[0] == 1
    assert ddim_schedule(scheduler, 8, {"set_alpha_to_one": False}) == explicit(8, **BETAS)


@pytest.mark.parametrize(("key", "near"), [("timestep_spacin", "timestep_spacing"), ("beta_stat", "beta_start")])
def test_an_unknown_override_is_refused_with_the_nearest(key: str, near: str) -> None:
    with pytest.raises(InputError) as refusal:
        wrap(sd(), {"steps_offset": 1, key: 1})
    message = str(refusal.value)
    assert message.startswith(f"schedule: {key!r} is unknown - did you mean {near!r}?")
    assert all(name in message for name in OVERRIDES)
    assert "\n" not in message


def test_nothing_near_is_no_guess() -> None:
    with pytest.raises(InputError, match=r"^schedule: 'xyz' is unknown; allowed: beta_start, "):
        check_overrides({"xyz": 1})


@pytest.mark.parametrize("value", ["x", None])
@pytest.mark.parametrize("key", ["beta_start", "beta_schedule", "prediction_type", "steps_offset", "timestep_spacing"])
def test_an_unusable_value_is_one_line(key: str, value: Any) -> None:
    with pytest.raises(EasyInvError) as refusal:
        ddim_schedule(make("DDIMScheduler", **PUBLISHED), 8, {key: value})
    assert isinstance(refusal.value, InputError)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "given", [{"beta_end": 2.0}, {"beta_start": -0.1, "beta_schedule": "linear"}, {"beta_end": float("nan")}]
)
def test_betas_outside_of_0_and_1_are_refused(given: dict[str, Any], prediction_type: str) -> None:
    with pytest.raises(ModelError, match=r"its betas run from .* to .*, but lie between 0 and 1"):
        ddim_schedule(make("DDIMScheduler", **PUBLISHED), 8, {**given, "prediction_type": prediction_type})


def test_overrides_reach_the_backbone_and_nothing_else() -> None:
    pipe = sdxl()
    before = dict(pipe.scheduler.config)
    decided = wrap(pipe, {"timestep_spacing": "trailing"})
    assert decided.schedule(4).timesteps == (-1, 249, 499, 749, 999)
    assert wrap(pipe).schedule(4).timesteps == (-1, 1, 251, 501, 751)
    assert dict(pipe.scheduler.config) == before


# Zero terminal SNR

ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_zero_terminal_snr_with_v_prediction_goes_both_ways(name: str) -> None:
    """Lin et al., arXiv 2305.08891: the last level is pure noise, from where z[T-1] is what v says."""
    own = {"set_alpha_to_one": False} if name == "DDIMScheduler" else {}
    scheduler = make(name, **{**PUBLISHED, **ZERO}, **own)
    schedule = ddim_schedule(scheduler, 8, {})
    assert (schedule.timesteps[-1], schedule.signal[-1], schedule.noise[-1]) == (999, 0.0, 1.0)
    assert schedule == explicit(8, **{**PUBLISHED, **ZERO})
    z, v = (torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1))
    down = schedule.denoise(z, v, 8)
    assert torch.allclose(down, -schedule.signal[7] * v + schedule.noise[7] * z, atol=1e-12)
    assert torch.allclose(schedule.renoise(down, v, 8), z, atol=1e-12)


def test_zero_terminal_snr_steps_are_those_of_diffusers() -> None:
    own = DDIMScheduler(**{**PUBLISHED, **ZERO}, clip_sample=False, set_alpha_to_one=False)
    own.set_timesteps(8)
    schedule = ddim_schedule(own, 8, {})
    generator = torch.Generator().manual_seed(0)
    z = mine = torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64)
    for level, t in zip(range(8, 0, -1), own.timesteps, strict=True):
        v = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        z, mine = own.step(v, t, z).prev_sample, schedule.denoise(mine, v, level)
        assert torch.allclose(z, mine, atol=1e-5)


def test_zero_terminal_snr_with_epsilon_prediction_is_refused_only_where_it_is_visited() -> None:
    scheduler = make("EulerDiscreteScheduler", **PUBLISHED, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ScheduleError, match=r"zero terminal SNR with epsilon prediction has no inverse; use a v-prediction"):
        ddim_schedule(scheduler, 8, {})
    remedied = ddim_schedule(scheduler, 8, {"timestep_spacing": "leading"})
    assert remedied.signal[-1] > 0


# Refusals


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "CMStochasticIterativeScheduler",
    ],
)
@pytest.mark.parametrize("given", [{}, BETAS])
def test_schedulers_of_other_processes_are_refused(name: str, given: dict[str, Any]) -> None:
    """Betas of the user's own do not turn them into what they are not."""
    says = f"^{name} has no betas; Stable Diffusion models need a scheduler of the DDPM family, e.g. DDIM$"
    with pytest.raises(ModelError, match=says):
        ddim_schedule(make(name), 8, given)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_prediction_is_refused(name: str) -> None:
    scheduler = make(name, prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ScheduleError, match=r"prediction type is 'flow_prediction'; this sampler serves epsilon and v_predic"):
        ddim_schedule(scheduler, 8, {})


@pytest.mark.parametrize(
    ("name", "settings", "most"),
    [
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, 999),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, 1000),
        ("DDIMScheduler", {"num_train_timesteps": 20}, 20),
    ],
)
def test_more_steps_than_levels_are_refused(name: str, settings: dict[str, Any], most: int) -> None:
    scheduler, levels = make(name, **settings), settings.get("num_train_timesteps", 1000)
    assert len(ddim_schedule(scheduler, most, {})) == most
    for steps in (most + 1, 10**6):
        with pytest.raises(ModelError) as refusal:
            ddim_schedule(scheduler, steps, {})
        says = f"num_inference_steps is {steps}; this model was trained with {levels} levels, so use fewer steps"
        assert str(refusal.value) == says


# The scheduler stays the user's


@pytest.mark.parametrize("name", [*CLASS_DEFAULTS, *DISTILLED])
def test_the_pipelines_scheduler_is_left_alone(name: str) -> None:
    scheduler = make(name)
    scheduler.set_timesteps(5)
    config, labels = dict(scheduler.config), scheduler.timesteps.clone()
    ddim_schedule(scheduler, 4, {})
    ddim_schedule(scheduler, 4, {key: first for key, (first, _) in OTHER.items()})
    assert dict(scheduler.config) == config
    assert torch.equal(scheduler.timesteps, labels)
    assert scheduler.num_inference_steps == 5
