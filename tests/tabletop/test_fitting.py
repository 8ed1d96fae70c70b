"""The training loop: its schedule, and that an interruption changes nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from easyinv_edit.errors import EasyInvError
from easyinv_edit.tabletop import fitting
from easyinv_edit.tabletop.fitting import Fit, Loss, fit

SHORT = Fit(samples=60, batch=4, rate=1e-2, warmup=3, seed=5)


OUTPUTS = fitting.LEAST_OUTPUTS
"""A layer that Muon trains, where it is asked for."""


class Interrupted(Exception):
    """Stands for a killed process; KeyboardInterrupt would end pytest itself."""


def line(outputs: int = 1) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, outputs)


def loss_of(model: nn.Module, fail_at: int | None = None) -> Loss:
    """A loss that draws its data from the step's generator; optionally interrupted at one step."""
    seen = [0]

    def loss(generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, float]]:
        seen[0] += 1
        if seen[0] == fail_at:
            raise Interrupted
        x = torch.randn(4, 4, generator=generator)
        return (model(x) - x.sum(-1, keepdim=True)).square().mean(), {"progress": progress}

    return loss


def test_the_rate_warms_up_holds_and_falls_to_two_percent() -> None:
    settings = Fit(samples=100, warmup=10, constant_until=0.4)
    assert settings.pace(0, 0.0) == pytest.approx(0.1)
    assert settings.pace(50, 0.2) == settings.pace(50, 0.4) == pytest.approx(1.0)
    assert settings.pace(50, 0.7) == pytest.approx(0.51)
    assert settings.pace(50, 1.0) == pytest.approx(0.02)


def test_muon_trains_the_matrices_and_adamw_the_rest_each_at_its_own_rate(tmp_path: Path) -> None:
    """One step of a warm-up of one: AdamW moves what it trains by about its rate, Muon by `RMS` of its own."""
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, OUTPUTS), nn.Linear(OUTPUTS, 1))
    start = [p.detach().clone() for p in model.parameters()]
    settings = Fit(samples=4, batch=4, rate=1e-3, muon_rate=1.0, warmup=1, ema=0.0)
    fit("net", model, lambda g, p: (model(torch.arange(4)).square().sum(), {}), settings, tmp_path)
    moved = [(a.detach() - b).square().mean().sqrt().item() for a, b in zip(model.parameters(), start, strict=True)]
    embedding, matrix, bias, last, last_bias = moved
    assert matrix > 0.05
    assert [embedding, bias, last, last_bias] == pytest.approx([settings.rate] * 4, rel=0.05)


def test_progress_is_the_budget_that_runs_out_first() -> None:
    settings = Fit(samples=100, minutes=1.0)
    assert settings.progress(50, 6.0) == 0.5
    assert settings.progress(10, 30.0) == 0.5
    assert settings.progress(10, 600.0) == 1.0


@pytest.mark.parametrize("settings", [SHORT, replace(SHORT, muon_rate=1e-2)], ids=["AdamW", "Muon"])
def test_an_interrupted_run_resumes_to_the_very_same_weights(
    settings: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)
    whole, broken = line(OUTPUTS), line(OUTPUTS)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    fit("net", whole, loss_of(whole), settings, tmp_path / "a")
    with pytest.raises(Interrupted):
        fit("net", broken, loss_of(broken, fail_at=8), settings, tmp_path / "b")
    resumed = nn.Linear(4, OUTPUTS)  # other weights than `line`: what it ends with can only come from the checkpoint
    record = fit("net", resumed, loss_of(resumed, fail_at=9), settings, tmp_path / "b")
    assert (record["step"], record["samples"]) == (15, 60)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_of_another_recipe_or_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.checkpoint"
    fit("net", line(OUTPUTS), lambda g, p: (nn.Parameter(torch.ones(())).square(), {}), SHORT, tmp_path)
    other = line(OUTPUTS)
    refused = f"{re.escape(str(path))}: is damaged or of another recipe.*remove it"
    with pytest.raises(EasyInvError, match=refused):
        fit("net", other, loss_of(other), replace(SHORT, muon_rate=1e-2), tmp_path)
    with pytest.raises(EasyInvError, match=refused):
        fit("net", line(OUTPUTS + 1), loss_of(other), SHORT, tmp_path)
    for damaged in (b"", b"no checkpoint", path.read_bytes()[:100]):
        path.write_bytes(damaged)
        with pytest.raises(EasyInvError, match=refused):
            fit("net", other, loss_of(other), SHORT, tmp_path)


@pytest.mark.parametrize(
    "setting",
    [{"samples": 0}, {"minutes": 0}, {"batch": 0}, {"rate": 0}, {"muon_rate": 0}, {"warmup": 0}, {"constant_until": 1}],
)
def test_a_setting_that_divides_by_zero_is_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(setting))):
        Fit(**{"samples": 1, **setting})


def test_every_step_and_every_seed_draws_afresh(tmp_path: Path) -> None:
    drawn: list[float] = []
    for seed in (5, 6):
        model = line()

        def loss(generator: torch.Generator, _progress: float, model: nn.Module = model) -> tuple[Tensor, dict[str, float]]:
            drawn.append(torch.rand((), generator=generator).item())
            return model(torch.ones(1, 4)).sum(), {}

        fit(f"net{seed}", model, loss, Fit(samples=20, batch=4, seed=seed), tmp_path)
    assert len(set(drawn)) == len(drawn) == 10


def test_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    model, again = line(), line()
    first = fit("net", model, loss_of(model), SHORT, tmp_path)
    assert fit("net", again, loss_of(again, fail_at=1), SHORT, tmp_path) == first
    assert torch.equal(model.weight, again.weight)


def test_it_learns_and_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "LOG_STEPS", 50)
    model = line()
    fit("net", model, loss_of(model), Fit(samples=1600, batch=4, rate=3e-2, warmup=3, ema=0.9), tmp_path)
    losses = [json.loads(row)["loss"] for row in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 8
    assert losses[-1] < 0.05 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = line()
    with pytest.raises(FloatingPointError, match="net: loss is nan at step 0"):
        fit("net", model, lambda g, p: (model(torch.ones(1, 4)).sum() * float("nan"), {}), SHORT, tmp_path)


def test_on_save_sees_the_averaged_weights_and_training_goes_on_from_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)
    plain, watched, seen = line(), line(), []
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    fit("net", plain, loss_of(plain), SHORT, tmp_path / "a")
    fit("net", watched, loss_of(watched), SHORT, tmp_path / "b", lambda step: seen.append(watched.weight.detach().clone()))
    assert torch.equal(plain.weight, watched.weight)
    assert len(seen) == 16
    assert torch.equal(seen[-1], watched.weight)


def test_the_first_average_is_a_twentieth_of_the_way(tmp_path: Path) -> None:
    """Decay 1/20 after the first step: what is left in the model is 0.05 start + 0.95 stepped, not the stepped weights."""
    model, start = line(), line().weight.detach()
    fit("net", model, loss_of(model), Fit(samples=4, batch=4, rate=1e-2, warmup=1), tmp_path)
    stepped = torch.load(tmp_path / "net.checkpoint", weights_only=True)["model"]["weight"]
    assert not torch.equal(model.weight, stepped)
    torch.testing.assert_close(model.weight, start.lerp(stepped, 1 - 1 / 20))
