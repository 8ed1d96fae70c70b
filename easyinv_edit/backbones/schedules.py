"""DDIM's schedule from the configuration of whatever scheduler a pipeline holds: DDIM, PNDM, Euler, DPM-Solver, LCM, TCD.

The models were trained on the same noising process whatever their scheduler's class is, so its betas, prediction type,
spacing and offset are taken, and its own step, sigmas in Euler's units and second order are not. LCM's and TCD's timesteps are
their own: the ones they were distilled at.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from diffusers import DDIMScheduler

from easyinv_edit.choices import nearest
from easyinv_edit.errors import InputError, ModelError, first_line
from easyinv_edit.models import OVERRIDES
from easyinv_edit.schedule import NoiseSchedule

BETAS = ("beta_start", "beta_end", "beta_schedule")
SPACING = ("steps_offset", "timestep_spacing")
DISTILLED = "original_inference_steps"  # a setting of schedulers with timesteps of their own


def check_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides, or InputError where one is unknown."""
    if wrong := [key for key in given if key not in OVERRIDES]:
        raise InputError(f"schedule: {wrong[0]!r} is unknown{nearest(wrong[0], OVERRIDES)}; allowed: {', '.join(OVERRIDES)}")
    return dict(given)


def ddim_schedule(scheduler: Any, steps: int, overrides: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule of `steps` levels. Raises ModelError where the scheduler has no betas or not that many levels."""
    if "beta_start" not in scheduler.config:
        name = type(scheduler).__name__
        raise ModelError(f"{name} has no betas; Stable Diffusion models need a scheduler of the DDPM family, e.g. DDIM")
    try:
        ddim = _ddim(scheduler, overrides)
        levels = ddim.config.num_train_timesteps
        labels = _labels(scheduler, ddim, steps, respaced=any(key in overrides for key in SPACING))
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(f"the scheduler's configuration cannot be used: {first_line(error)}") from error
    if steps > levels or max(labels) >= levels:  # an offset can run over the end
        raise ModelError(f"num_inference_steps is {steps}; this model was trained with {levels} levels, so use fewer steps")
    return NoiseSchedule.from_alphas(ddim.alphas_cumprod, labels, float(ddim.final_alpha_cumprod), ddim.config.prediction_type)


def _ddim(scheduler: Any, overrides: Mapping[str, Any]) -> DDIMScheduler:
    """The DDIM scheduler that does what the user and the pipeline's scheduler say.

    Not by `from_config`: that drops what a configuration left to its class, and whatever is put in its place, for DDIM's own
    defaults, which are others.
    """
    own = {"trained_betas": None} if any(key in overrides for key in BETAS) else {}
    # clip_sample and thresholding are for pixels and wreck latents; SD's own value is the default of set_alpha_to_one.
    config = {"set_alpha_to_one": False, **scheduler.config, **own, **overrides, "clip_sample": False, "thresholding": False}
    ddim = DDIMScheduler(**{key: config[key] for key in signature(DDIMScheduler).parameters if key in config})
    if not (ddim.betas.min() >= 0 and ddim.betas.max() <= 1):
        raise ValueError(f"its betas run from {ddim.betas.min():g} to {ddim.betas.max():g}, but lie between 0 and 1")
    return ddim


def _labels(scheduler: Any, ddim: DDIMScheduler, steps: int, *, respaced: bool) -> list[int]:
    """The timesteps of `steps` levels, in any order."""
    if respaced or DISTILLED not in signature(type(scheduler)).parameters:
        ddim.set_timesteps(min(steps, ddim.config.num_train_timesteps))
        return [int(t) for t in ddim.timesteps]
    distilled = scheduler.config[DISTILLED]
    if steps > distilled:
        raise ValueError(f"this model was distilled at {distilled} timesteps and {steps} steps were asked; use up to 8")
    own = type(scheduler).from_config(scheduler.config)  # the pipeline's own scheduler is never changed
    own.set_timesteps(steps)
    return [int(t) for t in own.timesteps]
