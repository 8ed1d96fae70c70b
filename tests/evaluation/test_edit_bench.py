"""The benchmarks of edits and of their cost: what their rows say, checked by hand, and their commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from attention_control import CONTROLLERS, CrossMaps
from easyinv_edit.cli_bench import COST_COLUMNS, markdown
from easyinv_edit.evaluation import cost_bench, suite
from easyinv_edit.evaluation import edit_bench as bench
from easyinv_edit.evaluation.benchmark import Benchmark, from_mapping
from easyinv_edit.evaluation.datasets import TabletopEdit, tabletop_edits
from easyinv_edit.evaluation.ground_truth import ALL_TASKS
from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.evaluation.runner import run
from easyinv_edit.evaluation.variants import filled, known_of
from easyinv_edit.images import load, to_tensor
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.tabletop import judge as judging
from easyinv_edit.tabletop.judge import shown
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import random_scene
from easyinv_edit.trajectory import Trajectory
from tests import models
from tests.helpers import Command

pytestmark = pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")
SEED, TASKS, CONTROLS, SIZE = 100, ("shape", "background"), ("none", "masactrl"), 32


def quiet(_text: str) -> None:
    pass


def config(model: Path, **changes: Any) -> Benchmark:
    return from_mapping(
        {
            "kind": "edits",
            "title": "test",
            "data": {"set": "tabletop_edits", "count": 2, "first_seed": SEED, "tasks": list(TASKS)},
            "model": str(model),
            "device": "cpu",
            "inversions": ["ddim"],
            "controls": list(CONTROLS),
            "num_inference_steps": 4,
            "guidance_scale": 3.0,
            **changes,
        }
    )


def rows_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion's structure at 32 pixels, with an untrained judge beside it."""
    made = tmp_path_factory.mktemp("tabletop") / "model"
    models.sd().save_pretrained(made)
    torch.manual_seed(0)
    judging.save(judging.Judge(), made / "judge.safetensors")
    return made


@pytest.fixture(scope="module")
def pipe(model: Path) -> EditPipeline:
    made = EditPipeline.from_pretrained(model, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def place(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("edits")
    run(config(model, metrics=[*bench_metrics(), "background PSNR", "inversion evaluations"]), made, quiet)
    return made


def bench_metrics() -> list[str]:
    return ["truth PSNR", "inside", "outside", "gain", "spread", "better", "target", "kept", "evaluations", "seconds"]


@pytest.fixture
def rows(place: Path) -> list[dict[str, Any]]:
    return rows_of(place)


def items() -> list[TabletopEdit]:
    return [item for task in TASKS for item in tabletop_edits(ALL_TASKS[task], SEED, 2, SIZE)]


def row_of(rows: list[dict[str, Any]], variant: str, item: str) -> dict[str, Any]:
    (found,) = (row for row in rows if (row["variant"], row["item"]) == (variant, item))
    return found


def test_every_control_edits_every_item_after_every_inversion(rows: list[dict[str, Any]]) -> None:
    expected = sorted((item.name, item.group, f"ddim + {control}") for item in items() for control in CONTROLS)
    assert sorted((row["item"], row["group"], row["variant"]) for row in rows) == expected


def test_a_row_says_what_an_edit_by_hand_says(rows: list[dict[str, Any]], place: Path, model: Path, pipe: EditPipeline) -> None:
    item = items()[1]
    row = row_of(rows, "ddim + masactrl", item.name)
    trajectory = pipe.invert(item.picture, item.prompt, "ddim", num_inference_steps=4)
    made = pipe.edit(trajectory, item.target_prompt, control="masactrl", guidance_scale=3.0)
    picture = to_tensor(load(place / row["pictures"]["result"])) / 2 + 0.5
    assert torch.equal(picture, to_tensor(made.edited[0]) / 2 + 0.5)
    truth, inside = render([item.case.truth], SIZE)
    assert row["truth PSNR"] == pytest.approx(psnr(picture, truth))
    assert row["inside"] == pytest.approx(psnr(picture, truth, inside))
    outside = inside[0, 0] < 0.5
    error = (picture - truth).square().mean(1)[0].double()
    assert row["outside"] == pytest.approx(-10 * torch.log10(error[outside].mean()).item(), abs=1e-3)
    words, wanted = judging.load(model / "judge.safetensors").read(picture)[0], shown(item.case.truth)
    assert row["target"] == float(words["shape"] == wanted["shape"])
    assert (row["prompt"], row["source_prompt"], row["control"]) == (item.target_prompt, item.prompt, "masactrl")
    assert row["evaluations"] == 4 * 2 + 3 * 2, "two rows a step, and both halves of the source's from step 1 on"
    assert row["inversion evaluations"] == 4


def test_the_background_is_what_lies_outside_the_mask(rows: list[dict[str, Any]], place: Path) -> None:
    for item in items()[:2]:
        row = row_of(rows, "ddim + none", item.name)
        source, result, mask = (to_tensor(load(place / row["pictures"][key])) / 2 + 0.5 for key in ("source", "result", "mask"))
        assert torch.equal(mask[:, :1] > 0.5, item.mask[None, None] > 0.5)  # type: ignore[index]
        outside = (mask < 0.5).expand_as(source)
        error = (source - result).double().square()[outside].mean().item()
        assert row["background PSNR"] == pytest.approx(-10 * torch.log10(torch.tensor(error)).item(), abs=1e-3)


def test_a_full_mask_has_no_background(rows: list[dict[str, Any]]) -> None:
    """Changing the background puts every pixel that differs into the mask; the object is what is left."""
    for item in items()[2:]:
        value = row_of(rows, "ddim + none", item.name)["background PSNR"]
        assert (value is None) == bool((item.mask > 0.5).all())  # type: ignore[operator]


def test_the_summary_compares_with_plain_sampling_item_by_item(place: Path, rows: list[dict[str, Any]]) -> None:
    content = json.loads((place / "summary.json").read_text())
    assert [table["group"] for table in content["tables"]] == ["", *TASKS]
    table = content["tables"][1]
    plain, line = table["rows"]
    own, base = ([r["inside"] for r in rows if (r["group"], r["control"]) == ("shape", c)] for c in ("masactrl", "none"))
    gains = [a - b for a, b in zip(own, base, strict=True)]
    assert line["gain"] == pytest.approx(sum(gains) / 2)
    assert line["spread"] == pytest.approx(abs(gains[0] - gains[1]) / 2**0.5)
    assert line["better"] == sum(g > 0 for g in gains) / 2
    assert (plain["gain"], plain["spread"], plain["better"]) == (0, 0, 0)
    whole = content["tables"][0]["rows"][1]
    assert whole["n"] == 4
    assert whole["inside"] == pytest.approx(sum(r["inside"] for r in rows if r["control"] == "masactrl") / 4)
    assert any("are read by a classifier" in note for note in content["notes"])


def test_a_pinned_line_differs_from_one_that_is_not(model: Path, tmp_path: Path) -> None:
    given = {"inversions": ["ddim", {"name": "ddim", "label": "direct", "pin_source": True}], "pin_source": False}
    data = {"set": "tabletop_edits", "count": 1, "first_seed": SEED, "tasks": ["shape"]}
    done = run(config(model, controls=["masactrl"], data=data, **given), tmp_path, quiet)
    free, pinned = rows_of(tmp_path)
    assert [free["variant"], pinned["variant"]] == ["ddim + masactrl", "direct + masactrl"]
    assert (free["pin_source"], pinned["pin_source"]) == (False, True)
    assert free["truth PSNR"] != pinned["truth PSNR"]
    assert done.failed == []


def test_edits_of_a_folder_have_neither_truth_nor_mask(model: Path, tmp_path: Path, picture: Image.Image) -> None:
    home = tmp_path / "home"
    home.mkdir()
    picture.save(home / "a.png")
    (home / "captions.csv").write_text("file,prompt,target_prompt\na.png,a red cube,a red ball\n")
    metrics = ["PSNR", "truth PSNR", "background SSIM"]
    run(
        config(model, data={"set": "folder", "path": str(home)}, metrics=metrics, controls=["masactrl, words"]), tmp_path, quiet
    )
    (row,) = rows_of(tmp_path)
    assert row["PSNR"] > 0
    assert (row["truth PSNR"], row["background SSIM"]) == (None, None)
    assert set(row["pictures"]) == {"source", "result"}


@pytest.fixture(scope="module")
def inverted(pipe: EditPipeline) -> list[tuple[TabletopEdit, Trajectory]]:
    """One item of every task."""
    items = [item for task in ALL_TASKS.values() for item in tabletop_edits(task, SEED, 1, SIZE)]
    return [(item, pipe.invert(item.picture, item.prompt, "ddim", num_inference_steps=2)) for item in items]


@pytest.mark.parametrize("name", bench.CONTROLS)
def test_every_control_can_be_built_for_every_item(
    name: str, pipe: EditPipeline, inverted: list[tuple[TabletopEdit, Trajectory]]
) -> None:
    for item, made in inverted:
        control = filled(bench.CONTROLS[name], known_of(item))
        result = pipe.edit(made, item.target_prompt, control=control, guidance_scale=3.0, output_type="latent")
        assert isinstance(result.images, torch.Tensor)
        assert result.images.shape == made.clean.shape
        assert result.images.isfinite().all()


def test_background_edits_change_the_background_alone() -> None:
    case = bench.cases_of(ALL_TASKS["background"], SEED, 1)[0]
    assert case.source.background != case.truth.background
    words = zip(case.source_prompt.split(), case.prompt.split(), strict=True)
    assert [(a, b) for a, b in words if a != b] == [(case.source.background, case.truth.background)]


# --- the commands -------------------------------------------------------------------------------------------------------


def test_the_command_writes_tables_numbers_and_pictures(command: Command, model: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    arguments = ["bench", "edits", "--model", str(model), "--scenes", "1", "--steps", "4", "--tasks", "shape,size"]
    arguments += ["--controls", "none;masactrl, union .7", "-o", str(place)]
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "| easyinv + masactrl, union .7 | 1 |" in out
    assert "## shape" in out
    assert {path.name for path in place.iterdir()} >= {"pictures", "results.jsonl", "run.json", "summary.csv", "summary.md"}
    code, again, _ = command(*arguments, "--json")
    assert code == 0
    assert json.loads(again) == json.loads((place / "summary.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--controls", "masactl"], "--controls: 'masactl' is unknown - did you mean 'masactrl'?"),
        (["--tasks", "shap"], "--tasks: 'shap' is unknown - did you mean 'shape'?; choose from shape, size"),
        (["--inversions", "easyinf"], "--inversions: 'easyinf' is unknown - did you mean 'easyinv'?"),
        (["--model", "nowhere/model"], "nowhere/model"),
        (["--config", "pie_bench", "data.path=nowhere"], "nowhere/mapping_file.json: there is no such file"),
        (
            ["--config", "tabletop_edits", "controls=[masactl]"],
            "command line: 'controls=[masactl]': controls.0: 'masactl' is unknown",
        ),
        (
            ["--config", "tabletop_edits", "metrics=[MS-SSIM]"],
            "MS-SSIM: sees sides of at least 176 pixels, the pictures have 128 x 128",
        ),
        (
            ["--config", "pie_bench", "--tasks", "shape"],
            "--tasks: with --config the file decides; write data.tasks=... for --tasks",
        ),
        (["--config", "paper_table2", "data.path=x"], "is of kind inversion; run it by `easyinv-edit bench inversion"),
    ],
)
def test_the_command_refuses_in_one_line(command: Command, tmp_path: Path, arguments: list[str], says: str) -> None:
    code, _, err = command("bench", "edits", "-o", str(tmp_path / "run"), *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prompts", [1, 2])
def test_the_cost_table_counts_what_each_layout_needs(untrained: EditPipeline, prompts: int) -> None:
    """T = 4: MasaCtrl acts from step 1 on, so the source is read at three steps."""
    image, texts = render([random_scene(3)], 64)[0][0], ["a ball", "a cone"][:prompts]
    table = cost_bench.measure(untrained, image, texts, steps=4, guidance=3.0, report=quiet)
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


def test_control_needs_no_more_than_a_twentieth_more_memory(untrained: EditPipeline) -> None:
    memory = cost_bench.step_memory(untrained, 16)
    assert {cost_bench.CONTROLS[row["control"]]["name"] for row in memory} == CONTROLLERS.keys() - {"none"}
    assert all(row["plain"] > 100_000 * row["rows"] for row in memory)
    assert {row["control"]: row["extra"] for row in memory if row["controlled"] > 1.05 * row["plain"]} == {}


def test_what_a_controlled_step_allocates_is_seen(untrained: EditPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that kept every map it sees, site after site, would be over the limit."""
    held: list[torch.Tensor] = []
    monkeypatch.setattr(cost_bench, "CONTROLS", {"masactrl, words": cost_bench.CONTROLS["masactrl, words"]})
    monkeypatch.setattr(CrossMaps, "add", lambda _maps, _role, _index, seen: held.append(seen))
    assert cost_bench.step_memory(untrained, 16)[0]["extra"] > 0.05


# --- controls that need what only some edits have -----------------------------------------------------------------------


def wider(model: Path, place: Path, controls: list[Any], tasks: list[str]) -> list[dict[str, Any]]:
    data = {"set": "tabletop_edits", "suite": "3", "count": 1, "tasks": tasks}
    run(config(model, data=data, controls=controls), place, quiet)
    return rows_of(place)


def test_a_control_for_some_tasks_is_measured_on_those_alone(model: Path, tmp_path: Path) -> None:
    controls = ["none", {"name": "object_add", "tasks": ["add"]}, {"name": "portrait", "tasks": ["repaint"]}]
    rows = wider(model, tmp_path, controls, ["add", "repaint"])
    assert not [row for row in rows if "error" in row]
    found = {(row["group"], row["control"]) for row in rows}
    assert found == {("add", "none"), ("add", "object_add"), ("repaint", "none"), ("repaint", "portrait")}
    assert {row["evaluations"] for row in rows if row["control"] == "portrait"} == {4 * 6}


def test_a_control_of_two_pictures_says_where_there_is_only_one(model: Path, tmp_path: Path) -> None:
    rows = wider(model, tmp_path, ["portrait"], ["add"])
    assert [row["error"] for row in rows] == [f"{rows[0]['item']}: has no second picture, which portrait reads"]


def test_of_two_solids_only_the_edited_one_counts_as_inside(model: Path, tmp_path: Path) -> None:
    (row,) = wider(model, tmp_path, ["none"], ["one of two"])
    (item,) = suite.items(SIZE, ["one of two"], 1, suite.SUITES["3"])
    assert item.masks is not None
    result = to_tensor(load(tmp_path / row["pictures"]["result"])) / 2 + 0.5
    truth = render([item.case.truth], SIZE)[0]
    assert row["inside"] == pytest.approx(psnr(result, truth, item.masks[1][None, None]), abs=0.05)


def test_a_judge_that_reads_less_leaves_what_it_cannot_read_out(model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = shutil.copytree(model, tmp_path / "model")
    judging.save(judging.Judge(("shape", "colour")), own / "judge.safetensors")
    (row,) = wider(own, tmp_path / "run", ["none"], ["add"])
    assert row["target"] is None
    assert 0 <= row["kept"] <= 1
