"""The inversion benchmark: what it measures, that it resumes, and what it prints."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from easyinv_edit.cli_bench import INVERSION_COLUMNS, as_csv, markdown
from easyinv_edit.errors import InputError
from easyinv_edit.evaluation import inversion_bench as bench
from easyinv_edit.evaluation.datasets import Item, chunks, folder, scenes
from easyinv_edit.evaluation.ledger import Ledger
from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.pipeline import EditPipeline
from tests.helpers import Command

pytestmark = pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")
PLAN = bench.Plan(("ddim", "easyinv", "edict"), (2, 4), 3.0, 2)
REQUEST = {"images": 3}


def items() -> list[Item]:
    return scenes(5, 3, 64)


def ledger(place: Path) -> Ledger:
    return Ledger(place, REQUEST, bench.KEY)


def quiet(_text: str) -> None:
    pass


def without_times(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


@pytest.fixture
def finished(untrained: EditPipeline, tmp_path: Path) -> Ledger:
    made = ledger(tmp_path)
    bench.run(untrained, items(), PLAN, made, quiet)
    return made


def test_every_method_is_measured_on_every_picture_at_every_number_of_steps(finished: Ledger) -> None:
    keys = [(row["method"], row.get("steps"), row["item"]) for row in finished.rows]
    names = [item.name for item in items()]
    expected = {(m, t, name) for m in PLAN.methods for t in PLAN.steps for name in names}
    assert set(keys) == expected | {(bench.CEILING, None, name) for name in names}
    assert len(keys) == len(set(keys))


def test_a_row_says_what_a_run_by_hand_says(finished: Ledger, untrained: EditPipeline) -> None:
    item = items()[2]
    row = next(r for r in finished.rows if (r["method"], r.get("steps"), r["item"]) == ("ddim", 4, item.name))
    trajectory = untrained.invert(item.picture, item.prompt, "ddim", num_inference_steps=4)
    z, _ = untrained.reconstruct(trajectory, guidance_scale=1.0)
    assert row["evaluations"] == 4
    assert row["latent_error"] == pytest.approx(((z - trajectory.clean).norm() / trajectory.clean.norm()).item(), rel=1e-4)
    assert trajectory.source is not None
    truth = trajectory.source.permute(2, 0, 1)[None].double() / 255
    assert row["psnr"] == pytest.approx(psnr((untrained.backbone.decode(z).double() / 2 + 0.5).clamp(0, 1), truth), abs=1e-3)
    guided, _ = untrained.reconstruct(trajectory, guidance_scale=3.0)
    assert row["latent_error_guided"] == pytest.approx(
        ((guided - trajectory.clean).norm() / trajectory.clean.norm()).item(), rel=1e-3
    )


def test_the_exact_inverse_reaches_the_ceiling(finished: Ledger) -> None:
    for item in items():
        ceiling = next(r for r in finished.rows if r["method"] == bench.CEILING and r["item"] == item.name)
        exact = next(r for r in finished.rows if (r["method"], r.get("steps"), r["item"]) == ("edict", 4, item.name))
        assert exact["psnr"] == pytest.approx(ceiling["psnr"], abs=0.05)
        assert exact["latent_error"] < 1e-3


def test_a_stopped_run_goes_on_and_ends_with_the_same_numbers(
    untrained: EditPipeline, tmp_path: Path, finished: Ledger
) -> None:
    told: list[str] = []

    def stop(text: str) -> None:
        told.append(text)
        if len(told) == 5:
            raise KeyboardInterrupt

    place = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        bench.run(untrained, items(), PLAN, ledger(place), stop)
    half = ledger(place)
    assert 0 < len(half.rows) < len(finished.rows)
    bench.run(untrained, items(), PLAN, half, quiet)
    assert without_times(half.rows) == without_times(finished.rows)
    before = len(half.rows)
    bench.run(untrained, items(), PLAN, half, lambda text: pytest.fail(f"nothing is left to do, but: {text}"))
    assert len(half.rows) == before


def test_a_line_cut_short_is_measured_again(untrained: EditPipeline, tmp_path: Path, finished: Ledger) -> None:
    lines = finished.file.read_text().splitlines()
    finished.file.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    again = ledger(tmp_path)
    assert len(again.rows) == len(lines) - 1
    bench.run(untrained, items(), PLAN, again, quiet)
    assert without_times(again.rows) == without_times(finished.rows)


def test_another_request_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    ledger(tmp_path)
    with pytest.raises(InputError, match="holds another run"):
        Ledger(tmp_path, {"images": 4}, bench.KEY)


def test_the_summary_holds_means_and_ratios_to_ddim(finished: Ledger) -> None:
    table = bench.summary(finished.rows, PLAN)
    line = next(row for row in table if (row["group"], row["steps"], row["method"]) == ("all", 4, "edict"))
    own = [r for r in finished.rows if r["method"] == "edict" and r.get("steps") == 4]
    ddim = [r for r in finished.rows if r["method"] == "ddim" and r.get("steps") == 4]
    assert line["pictures"] == 3
    assert line["psnr"] == pytest.approx(sum(r["psnr"] for r in own) / 3)
    assert line["relative_seconds"] == pytest.approx(sum(r["seconds"] for r in own) / sum(r["seconds"] for r in ddim))
    assert next(row for row in table if row["method"] == bench.CEILING)["psnr"] > 0
    groups = {row["group"] for row in table}
    assert groups == ({"all", "white"} if any(item.group for item in items()) else {"all"})


def test_the_table_and_the_csv_hold_every_line(finished: Ledger) -> None:
    table = bench.summary(finished.rows, PLAN)
    lines = markdown(table, INVERSION_COLUMNS).splitlines()
    assert len(lines) == len(table) + 2
    assert len({line.count("|") for line in lines}) == 1
    read = list(csv.DictReader(as_csv(table).splitlines()))
    assert [row["method"] for row in read] == [row["method"] for row in table]
    assert float(read[-1]["psnr"]) == table[-1]["psnr"]


def test_methods_that_fit_the_edits_guidance_are_told_it() -> None:
    assert bench.Plan((), (), 5.0, 1).method("null_text").guidance_scale == 5.0  # type: ignore[attr-defined]
    assert bench.Plan((), (), 5.0, 1).method("ddim").name == "ddim"


def test_the_figure_has_a_row_per_method(untrained: EditPipeline) -> None:
    one = bench.figure(untrained, items()[0], 0, bench.Plan(("ddim",), (2,), 3.0, 1), quiet)
    two = bench.figure(untrained, items()[0], 0, bench.Plan(("ddim", "obelm"), (2,), 3.0, 1), quiet)
    assert two.size == (one.width, 2 * one.height)


def test_scenes_know_their_captions_and_the_white_ones() -> None:
    made = scenes(0, 40, 16)
    assert [item.name for item in made[:2]] == ["scene-0", "scene-1"]
    assert all(("white background" in item.prompt) == (item.group == "white") for item in made)
    assert 0 < sum(item.group == "white" for item in made) < 40
    assert [len(part) for part in chunks(made, 16)] == [16, 16, 8]


def test_a_folder_gives_its_pictures_by_name(tmp_path: Path, picture: Image.Image) -> None:
    for name in ("b.png", "a.jpg", "notes.txt"):
        (tmp_path / name).write_text("x") if name.endswith("txt") else picture.save(tmp_path / name)
    assert [item.name for item in folder(tmp_path)] == ["a.jpg", "b.png"]
    assert len(folder(tmp_path, 1)) == 1


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    for place, says in ((tmp_path, "holds no pictures"), (tmp_path / "none", "is no folder")):
        with pytest.raises(InputError, match=says):
            folder(place)


def test_the_command_writes_its_table_its_numbers_and_its_figure(
    command: Command, untrained_folder: Path, tmp_path: Path, picture: Image.Image
) -> None:
    pictures, place = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    picture.save(pictures / "a.png")
    arguments = ["bench", "inversion", "--model", str(untrained_folder), "--folder", str(pictures), "--steps", "2"]
    arguments += ["--methods", "ddim,easyinv", "-o", str(place), "--device", "cpu"]
    code, out, _ = command(*arguments)
    assert code == 0
    assert "| all | 1 | 2 | easyinv | 2 |" in out
    assert sorted(path.name for path in place.iterdir()) == [
        "figure.png",
        "results.jsonl",
        "run.json",
        "summary.csv",
        "summary.json",
        "summary.md",
    ]
    content = json.loads((place / "summary.json").read_text())
    assert content["versions"]["torch"] == torch.__version__
    code, again, _ = command(*arguments, "--json")
    assert code == 0
    assert json.loads(again) == content["summary"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "ddim,easyinf"], "'easyinf' is unknown - did you mean 'easyinv'?; choose from easyinv, ddim"),
        (["--steps", "ten"], "--steps 'ten': give whole numbers from 1 to 1000"),
        (["--steps", "0"], "--steps '0': give whole numbers from 1 to 1000"),
        (["--dtype", "float8"], "--dtype 'float8': choose float32, bfloat16 or float16"),
        (["--folder", "nowhere"], "nowhere: is no folder"),
    ],
)
def test_the_command_refuses_in_one_line(command: Command, tmp_path: Path, arguments: list[str], says: str) -> None:
    code, _, err = command("bench", "inversion", "-o", str(tmp_path / "run"), *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "run").exists()
