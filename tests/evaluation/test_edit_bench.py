"""The benchmarks of edits and of their cost: what they measure, that they resume, and what they print."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from easyinv_edit.cli_bench import COST_COLUMNS, EDIT_COLUMNS, markdown
from easyinv_edit.evaluation import cost_bench
from easyinv_edit.evaluation import edit_bench as bench
from easyinv_edit.evaluation.ground_truth import ALL_TASKS
from easyinv_edit.evaluation.ledger import Ledger
from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.images import load, to_tensor
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.tabletop import judge as judging
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import random_scene
from tests.helpers import Command

pytestmark = pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")
PLAN = bench.Plan(("shape", "background"), ("none", "masactrl"), ("ddim",), 2, 4, 3.0)
SEED = 100


def quiet(_text: str) -> None:
    pass


def ledger(place: Path) -> Ledger:
    return Ledger(place, {"plan": "test"}, bench.KEY)


@pytest.fixture(scope="module")
def judge() -> judging.Judge:
    torch.manual_seed(0)
    return judging.Judge().eval()


@pytest.fixture(scope="module")
def pipe(untrained_folder: Path) -> EditPipeline:
    made = EditPipeline.from_pretrained(untrained_folder, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def finished(pipe: EditPipeline, judge: judging.Judge, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    place = tmp_path_factory.mktemp("edits")
    made = ledger(place)
    bench.run(pipe, judge, PLAN, SEED, made, place / "pictures", quiet)
    return made


def test_every_control_edits_every_case_after_every_inversion(finished: Ledger) -> None:
    keys = [tuple(row[name] for name in bench.KEY) for row in finished.rows]
    expected = {(t, n, i, c) for t in PLAN.tasks for n in range(2) for i in PLAN.inversions for c in PLAN.controls}
    assert set(keys) == expected
    assert len(keys) == len(expected)


def test_a_row_says_what_the_kept_picture_shows(finished: Ledger) -> None:
    case = bench.cases_of(ALL_TASKS["shape"], SEED, 2)[1]
    truth, mask = render([case.truth], 64)
    picture = to_tensor(load(finished.file.parent / "pictures" / "shape-1-ddim-masactrl.png")) / 2 + 0.5
    row = next(r for r in finished.rows if tuple(r[k] for k in bench.KEY) == ("shape", 1, "ddim", "masactrl"))
    assert row["psnr"] == pytest.approx(psnr(picture, truth))
    assert row["inside"] == pytest.approx(psnr(picture, truth, mask))
    outside = mask[0, 0] < 0.5
    error = (picture - truth).square().mean(1)[0].double()
    assert row["outside"] == pytest.approx(-10 * torch.log10(error[outside].mean()).item(), abs=1e-3)
    assert row["evaluations"] == 4 * 2 + 3 * 2, "two rows a step, and both halves of the source's from step 1 on"


def test_a_stopped_run_goes_on_and_ends_with_the_same_numbers(
    pipe: EditPipeline, judge: judging.Judge, tmp_path: Path, finished: Ledger
) -> None:
    told: list[str] = []

    def stop(text: str) -> None:
        told.append(text)
        if len(told) == 4:
            raise KeyboardInterrupt

    place = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        bench.run(pipe, judge, PLAN, SEED, ledger(place), place / "pictures", stop)
    half = ledger(place)
    assert 0 < len(half.rows) < len(finished.rows)
    bench.run(pipe, judge, PLAN, SEED, half, place / "pictures", quiet)
    plain = [[{k: v for k, v in row.items() if k != "seconds"} for row in made.rows] for made in (half, finished)]
    assert plain[0] == plain[1]


def test_the_summary_compares_with_plain_sampling_case_by_case(finished: Ledger) -> None:
    table = bench.summary(finished.rows, PLAN)
    assert len(table) == 4
    line = next(r for r in table if (r["task"], r["inversion"], r["control"]) == ("shape", "ddim", "masactrl"))
    own, plain = (
        [r["inside"] for r in finished.rows if (r["task"], r["inversion"], r["control"]) == ("shape", "ddim", c)]
        for c in ("masactrl", "none")
    )
    gains = [a - b for a, b in zip(own, plain, strict=True)]
    assert line["gain"] == pytest.approx(sum(gains) / 2)
    assert line["better"] == sum(g > 0 for g in gains) / 2
    assert len(markdown(table, EDIT_COLUMNS).splitlines()) == 6


def test_a_figure_has_rows_for_source_truth_and_controls(finished: Ledger) -> None:
    one = bench.figure(PLAN, "shape", "ddim", SEED, 64, finished.file.parent / "pictures")
    less = bench.Plan(("shape",), ("none",), ("ddim",), 2, 4, 3.0)
    two = bench.figure(less, "shape", "ddim", SEED, 64, finished.file.parent / "pictures")
    assert one.width == two.width
    assert one.height * 3 == pytest.approx(two.height * 4, abs=6)


@pytest.mark.parametrize("name", bench.CONTROLS)
def test_every_control_can_be_built_for_every_case(name: str, pipe: EditPipeline) -> None:
    for task in ALL_TASKS.values():
        case = bench.cases_of(task, SEED, 1)[0]
        made = pipe.invert(random_picture(case), case.source_prompt, "ddim", num_inference_steps=4)
        result = pipe.edit(made, case.prompt, control=bench.CONTROLS[name](case), guidance_scale=3.0, output_type="latent")
        assert isinstance(result.images, torch.Tensor)
        assert result.images.shape == made.clean.shape
        assert result.images.isfinite().all()


def random_picture(case: bench.Case) -> torch.Tensor:
    return render([case.source], 64)[0][0]


def test_background_edits_change_the_background_alone() -> None:
    case = bench.cases_of(ALL_TASKS["background"], SEED, 1)[0]
    assert case.source.background != case.truth.background
    words = zip(case.source_prompt.split(), case.prompt.split(), strict=True)
    assert [(a, b) for a, b in words if a != b] == [(case.source.background, case.truth.background)]


def test_the_command_writes_table_numbers_and_figures(command: Command, untrained_folder: Path, tmp_path: Path) -> None:
    model, place = tmp_path / "model", tmp_path / "run"
    shutil.copytree(untrained_folder, model)
    judging.save(judging.Judge(), model / "judge.safetensors")
    arguments = ["bench", "edits", "--model", str(model), "--scenes", "1", "--steps", "4", "--tasks", "shape"]
    arguments += ["--controls", "none;masactrl, union .7", "-o", str(place)]
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "| shape | easyinv | masactrl, union .7 | 1 |" in out
    names = {path.name for path in place.iterdir()}
    assert names >= {"figure-shape-easyinv.png", "results.jsonl", "run.json", "summary.csv", "summary.json", "summary.md"}
    code, again, _ = command(*arguments, "--json")
    assert code == 0
    assert json.loads(again) == json.loads((place / "summary.json").read_text())["summary"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--controls", "masactl"], "--controls: 'masactl' is unknown - did you mean 'masactrl'?"),
        (["--tasks", "shap"], "--tasks: 'shap' is unknown - did you mean 'shape'?; choose from shape, size"),
        (["--inversions", "easyinf"], "--inversions: 'easyinf' is unknown - did you mean 'easyinv'?"),
        (["--model", "nowhere"], "nowhere: has no judge.safetensors, so it is no tabletop model"),
    ],
)
def test_the_command_refuses_in_one_line(command: Command, tmp_path: Path, arguments: list[str], says: str) -> None:
    code, _, err = command("bench", "edits", "-o", str(tmp_path / "run"), *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prompts", [1, 2])
def test_the_cost_table_counts_what_each_layout_needs(pipe: EditPipeline, prompts: int) -> None:
    """T = 4: MasaCtrl acts from step 1 on, so the source is read at three steps."""
    image, texts = render([random_scene(3)], 64)[0][0], ["a ball", "a cone"][:prompts]
    table = cost_bench.measure(pipe, image, texts, steps=4, guidance=3.0, report=quiet)
    counts = {row["layout"]: row["evaluations"] for row in table}
    needed, exact, kept = cost_bench.LAYOUTS
    assert counts == {
        cost_bench.FOUR_ROWS: 4 + 16 * prompts,
        needed: 4 + 3 + 8 * prompts,
        exact: 4 + 3 + 8 * prompts,
        kept: 4 + 8 * prompts,
    }
    assert all(row["difference"] < 1e-4 for row in table if row["layout"] != kept)
    assert len(markdown(table, COST_COLUMNS).splitlines()) == 6


def test_control_needs_no_more_than_a_twentieth_more_memory(pipe: EditPipeline) -> None:
    memory = cost_bench.step_memory(pipe, 16)
    assert memory["plain"] > 100_000
    assert memory["controlled"] <= 1.05 * memory["plain"]
