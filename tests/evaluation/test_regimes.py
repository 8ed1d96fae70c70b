"""Where EasyInv helps: the paired test against scipy, the comparison's arithmetic, and the command in small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from easyinv_edit.evaluation import regimes
from easyinv_edit.evaluation.ledger import Ledger
from easyinv_edit.inversion import EasyInv
from easyinv_edit.pipeline import EditPipeline
from tests.helpers import Command


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.4])
def test_the_paired_test_agrees_with_scipys(shift: float) -> None:
    values = (torch.randn(40, generator=torch.Generator().manual_seed(1)) + shift).tolist()
    exact = stats.permutation_test(
        (np.array(values),), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(0)
    )
    assert regimes.paired_test(values) == pytest.approx(exact.pvalue, abs=0.02)


def test_the_paired_test_is_exact_on_three_equal_differences() -> None:
    """Of the eight assignments of signs two are as far from 0."""
    assert regimes.paired_test([1.0, 1.0, 1.0]) == pytest.approx(0.25, abs=0.02)
    assert regimes.paired_test([0.0, 0.0]) == 1.0
    assert regimes.paired_test([1.0, -1.0]) == 1.0
    assert regimes.paired_test([-1.0] * 30) == 1 / (regimes.FLIPS + 1)


def test_differences_are_taken_picture_by_picture_and_by_background() -> None:
    row = regimes.compared([30.0, 40.0, 20.0, 10.0], [31.0, 42.0, 20.0, 8.0], [True, True, False, False])
    assert row["ddim"] == 25.0
    assert [row[kind]["pictures"] for kind in ("all", "white", "other")] == [4, 2, 2]
    assert [row[kind]["difference"] for kind in ("all", "white", "other")] == [0.25, 1.5, -1.0]
    assert row["white"]["error"] == pytest.approx(0.5)
    assert regimes.compared([1.0, 2.0], [1.0, 2.0], [True, False])["white"] is None


def test_the_defaults_are_among_the_settings() -> None:
    assert {EasyInv(preset="sd").resolved(), EasyInv(preset="sdxl").resolved()} <= set(regimes.SETTINGS)


def test_eta_one_would_be_ddim(monkeypatch: pytest.MonkeyPatch, untrained: EditPipeline, tmp_path: Path) -> None:
    """The comparison measures the method alone: with eta 1, which is DDIM inversion, every difference is 0."""
    monkeypatch.setattr(regimes, "SETTINGS", ((1.0, (0.05, 0.95)),))
    given = regimes.scenes(2, untrained.backbone.native_size[0])
    ledger = Ledger(tmp_path, {}, regimes.KEY)
    rows = list(regimes.measure(untrained, given, [3], 2, ledger, lambda line: None))
    assert [(row["invert"], row["sample"]) for row in rows] == [(1.0, 1.0), (1.0, 3.0), (1.0, 7.5), (3.0, 3.0)]
    assert all(row["all"]["difference"] == 0 for row in rows)


def test_the_command_writes_what_it_prints(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained_folder: Path
) -> None:
    monkeypatch.setattr(regimes, "SETTINGS", regimes.SETTINGS[:1])
    options = ["--model", str(untrained_folder), "--scenes", "2", "--steps", "10", "-o", str(tmp_path / "out")]
    code, printed, _ = command("bench", "regimes", *options, "--json")
    assert code == 0
    content = json.loads((tmp_path / "out" / "regimes.json").read_text())
    assert len(content["rows"]) == 4
    assert json.loads(printed) == content["rows"]
    table = (tmp_path / "out" / "regimes.md").read_text().strip()
    assert len(table.splitlines()) == 2 + 4


def test_a_comparison_cut_short_is_gone_on_with(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained_folder: Path
) -> None:
    """Only what is missing is measured, another T is added to what is there, and other pictures are another comparison."""
    monkeypatch.setattr(regimes, "SETTINGS", ((0.5, (0.05, 0.95)),))
    out = tmp_path / "out"

    def run(steps: str, scenes: int = 2) -> tuple[int, str]:
        options = ["--model", str(untrained_folder), "--scenes", str(scenes), "--steps", steps, "-o", str(out)]
        code, _, told = command("bench", "regimes", *options)
        return code, told

    run("3")
    before = json.loads((out / "regimes.json").read_text())["rows"]
    kept = (out / "results.jsonl").read_text().splitlines()
    assert len(kept) == 4, "DDIM inversion and one setting, inverted at two guidance scales"
    (out / "results.jsonl").write_text("\n".join([*kept[:3], kept[3][:20]]))
    code, told = run("3,4")
    assert code == 0
    measured = [line.split(":")[0] for line in told.splitlines() if line.startswith("T = ")]
    assert measured == [
        "T = 3, inverted at guidance 3",
        *["T = 4, inverted at guidance 1"] * 2,
        *["T = 4, inverted at guidance 3"] * 2,
    ]
    rows = json.loads((out / "regimes.json").read_text())["rows"]
    assert [row["steps"] for row in rows] == [3] * 4 + [4] * 4
    assert rows[:4] == before
    code, told = run("3", scenes=3)
    assert code == 2
    assert "holds another run" in told


@pytest.mark.parametrize("options", [["--scenes", "1"], ["--steps", "ten"], ["--steps", ""], ["--model", "nowhere"]])
def test_bad_options_are_told_without_a_traceback(command: Command, options: list[str], tmp_path: Path) -> None:
    code, _, told = command("bench", "regimes", *options, "-o", str(tmp_path / "out"))
    assert code == 2
    assert told
    assert "Traceback" not in told
