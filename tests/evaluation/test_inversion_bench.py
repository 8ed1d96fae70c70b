"""The benchmark of inversions: what its rows say, checked by hand, and its command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from easyinv_edit.evaluation import summary_text
from easyinv_edit.evaluation.benchmark import Benchmark, from_mapping
from easyinv_edit.evaluation.datasets import Item, chunks, folder, scenes
from easyinv_edit.evaluation.metrics import psnr, ssim
from easyinv_edit.evaluation.runner import Outcome, run
from easyinv_edit.evaluation.variants import CEILING
from easyinv_edit.images import load, to_pil, to_tensor
from easyinv_edit.pipeline import EditPipeline
from tests import models
from tests.helpers import Command

WHITE = 8
"""A scene on white."""
pytestmark = pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")
SEED, METHODS, STEPS = WHITE - 1, ("ddim", "easyinv", "edit_friendly"), (2, 4)


def config(model: Path, **changes: Any) -> Benchmark:
    return from_mapping(
        {
            "kind": "inversion",
            "title": "test",
            "data": {"set": "tabletop", "count": 3, "first_seed": SEED},
            "model": str(model),
            "device": "cpu",
            "inversions": list(METHODS),
            "num_inference_steps": list(STEPS),
            "guidance_scale": 3.0,
            "batch": 2,
            **changes,
        }
    )


def items() -> list[Item]:
    return scenes(SEED, 3, 32)


def quiet(_text: str) -> None:
    pass


def rows_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion's structure at 32 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    models.sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(model: Path) -> EditPipeline:
    made = EditPipeline.from_pretrained(model, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def place(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("inversions")
    run(config(model), made, quiet)
    return made


@pytest.fixture
def rows(place: Path) -> list[dict[str, Any]]:
    return rows_of(place)


def row_of(rows: list[dict[str, Any]], variant: str, item: str) -> dict[str, Any]:
    (found,) = (row for row in rows if (row["variant"], row["item"]) == (variant, item))
    return found


def test_every_method_is_measured_on_every_picture_at_every_number_of_steps(rows: list[dict[str, Any]]) -> None:
    names = [item.name for item in items()]
    labels = [CEILING, *(f"{method}, T={steps}" for steps in STEPS for method in METHODS)]
    assert sorted((row["variant"], row["item"]) for row in rows) == sorted((v, n) for v in labels for n in names)
    assert {row["kind"] for row in rows} == {"inversion"}
    assert [row["group"] for row in rows if row["variant"] == CEILING] == [item.group for item in items()]


def test_a_row_says_what_a_run_by_hand_says(rows: list[dict[str, Any]], pipe: EditPipeline) -> None:
    item = items()[2]
    row = row_of(rows, "ddim, T=4", item.name)
    trajectory = pipe.invert(item.picture, item.prompt, "ddim", num_inference_steps=4)
    assert trajectory.source is not None
    truth = trajectory.source.permute(2, 0, 1)[None].double() / 255
    assert (row["inversion"], row["steps"], row["dtype"], row["prompt"]) == ("ddim", 4, "float32", item.prompt)
    assert (row["evaluations"], row["settings"]) == (4, {"name": "ddim"})
    assert row["seconds"] > 0
    for suffix, scale in (("", 1.0), (", guided", 3.0)):
        z, _ = pipe.reconstruct(trajectory, guidance_scale=scale)
        picture = (pipe.backbone.decode(z).double() / 2 + 0.5).clamp(0, 1)
        error = ((z - trajectory.clean).norm() / trajectory.clean.norm()).item()
        assert row[f"latent error{suffix}"] == pytest.approx(error, rel=1e-3)
        assert row[f"PSNR{suffix}"] == pytest.approx(psnr(picture, truth), abs=1e-3)
        assert row[f"SSIM{suffix}"] == pytest.approx(ssim(picture, truth), abs=1e-4)


def test_noise_is_drawn_from_the_seed_and_the_pictures_number(rows: list[dict[str, Any]], pipe: EditPipeline) -> None:
    item, generator = items()[1], torch.Generator().manual_seed(1)
    trajectory = pipe.invert(item.picture, item.prompt, "edit_friendly", num_inference_steps=4, generator=generator)
    z, _ = pipe.reconstruct(trajectory, guidance_scale=3.0)
    error = ((z - trajectory.clean).norm() / trajectory.clean.norm()).item()
    assert row_of(rows, "edit_friendly, T=4", item.name)["latent error, guided"] == pytest.approx(error, rel=1e-3)


def test_the_exact_inverse_reaches_the_ceiling(rows: list[dict[str, Any]]) -> None:
    for item in items():
        assert row_of(rows, "edit_friendly, T=4", item.name)["PSNR"] == pytest.approx(
            row_of(rows, CEILING, item.name)["PSNR"], abs=0.01
        )


def test_pictures_are_kept_and_show_what_the_row_says(place: Path, rows: list[dict[str, Any]], pipe: EditPipeline) -> None:
    item = items()[0]
    row = row_of(rows, "ddim, T=4", item.name)
    assert set(row["pictures"]) == {"source", "result", "guided", "latent"}
    source, result, guided = (to_tensor(load(place / row["pictures"][key])) / 2 + 0.5 for key in ("source", "result", "guided"))
    assert psnr(result, source) == pytest.approx(row["PSNR"], abs=0.05)
    assert psnr(guided, source) == pytest.approx(row["PSNR, guided"], abs=0.05)
    trajectory = pipe.invert(item.picture, item.prompt, "ddim", num_inference_steps=4)
    middle = to_tensor(to_pil(pipe.backbone.decode(trajectory.latents[2]))[0])
    assert (to_tensor(load(place / row["pictures"]["latent"])) - middle).abs().max() < 0.05


def test_pictures_of_the_first_items_alone(model: Path, tmp_path: Path) -> None:
    run(config(model, pictures=1, inversions=["ddim"], num_inference_steps=2), tmp_path, quiet)
    names = [item.name for item in items()]
    assert [row["item"] for row in rows_of(tmp_path) if "pictures" in row] == [names[0]] * 2
    assert len(list((tmp_path / "pictures").iterdir())) == 5, "the source, the ceiling, and the result's three"


def test_the_summary_holds_means_and_ratios_to_ddim(place: Path, rows: list[dict[str, Any]]) -> None:
    content = json.loads((place / "summary.json").read_text())
    whole = content["tables"][0]
    assert (whole["group"], whole["rows"][0]["variant"]) == ("", CEILING)
    line = next(row for row in whole["rows"] if row["variant"] == "edit_friendly, T=4")
    own, ddim = ([r for r in rows if r["variant"] == f"{method}, T=4"] for method in ("edit_friendly", "ddim"))
    assert line["n"] == 3
    assert line["PSNR"] == pytest.approx(sum(r["PSNR"] for r in own) / 3)
    assert line["x DDIM"] == pytest.approx(sum(r["seconds"] for r in own) / sum(r["seconds"] for r in ddim))
    assert [(table["group"], table["rows"][1]["n"]) for table in content["tables"]] == [("", 3), ("white", 1)]


def test_the_markdown_and_the_csv_hold_every_line(place: Path) -> None:
    content = json.loads((place / "summary.json").read_text())
    count = sum(len(table["rows"]) for table in content["tables"])
    lines = [line for line in (place / "summary.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == count + 2 * len(content["tables"])
    assert len({line.count("|") for line in lines}) == 1
    read = list(csv.DictReader((place / "summary.csv").read_text().splitlines()))
    flat = [row for table in content["tables"] for row in table["rows"]]
    assert [row["variant"] for row in read] == [row["variant"] for row in flat]
    assert [row["PSNR"] for row in read] == [str(row["PSNR"]) for row in flat]
    assert summary_text.markdown(content) == (place / "summary.md").read_text()


def test_two_precisions_are_lines_of_their_own(model: Path, tmp_path: Path) -> None:
    changes = {"dtypes": ["bfloat16", "float32"], "inversions": ["ddim"], "num_inference_steps": 2, "pictures": 0}
    done: Outcome = run(config(model, **changes), tmp_path, quiet)
    assert [row["variant"] for row in done.summary["tables"][0]["rows"]] == [
        f"{CEILING}, bfloat16", "ddim, bfloat16", f"{CEILING}, float32", "ddim, float32",
    ]  # fmt: skip
    half, full = (done.summary["tables"][0]["rows"][i] for i in (1, 3))
    assert half["PSNR"] != full["PSNR"]
    assert half["PSNR"] == pytest.approx(full["PSNR"], abs=1)


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


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_writes_its_tables_its_numbers_and_its_pictures(
    command: Command, model: Path, tmp_path: Path, picture: Image.Image
) -> None:
    pictures, place = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    picture.save(pictures / "a.png")
    arguments = ["bench", "inversion", "--model", str(model), "--folder", str(pictures), "--steps", "2"]
    arguments += ["--methods", "ddim,easyinv", "-o", str(place), "--device", "cpu"]
    code, out, err = command(*arguments)
    assert code == 0, err
    assert "| easyinv | 1 | 2 |" in out
    assert "1 of 1 pictures have no prompt: guided columns repeat the others" in out
    assert {path.name for path in place.iterdir()} >= {
        "config.yaml", "environment.json", "pictures", "results.jsonl", "run.json", "summary.csv", "summary.json", "summary.md",
    }  # fmt: skip
    assert json.loads((place / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    code, again, _ = command(*arguments, "--json")
    assert code == 0
    assert json.loads(again) == json.loads((place / "summary.json").read_text())


def test_options_and_a_file_make_the_same_run(command: Command, model: Path, tmp_path: Path) -> None:
    """What the options decide is written as config.yaml, and that file decides the same."""
    options = ["--model", str(model), "--images", "2", "--steps", "2", "--methods", "ddim", "--device", "cpu"]
    assert command("bench", "inversion", *options, "-q", "-o", str(tmp_path / "a"))[0] == 0
    file = str(tmp_path / "a" / "config.yaml")
    assert command("bench", "inversion", "--config", file, "-q", "-o", str(tmp_path / "b"))[0] == 0
    asked = [json.loads((tmp_path / name / "run.json").read_text()) for name in "ab"]
    assert asked[0] == asked[1]
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(tmp_path / name)] for name in "ab"]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "ddim,easyinf"], "'easyinf' is unknown - did you mean 'easyinv'?; choose from easyinv, ddim"),
        (["--steps", "ten"], "--steps 'ten': give whole numbers from 1 to 1000"),
        (["--steps", "0"], "--steps '0': give whole numbers from 1 to 1000"),
        (["--steps", "5", "--methods", "ddim,edict"], "edict needs at least 10 steps (got 5)"),
        (["--dtype", "float8"], "--dtype 'float8': choose float32, bfloat16 or float16"),
        (["--folder", "nowhere"], "nowhere: is no folder"),
        (["--model", "nowhere/model"], "nowhere/model"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["data.count=2"], "'data.count=2': keys are of a benchmark's file; give it with --config"),
        (["--steps", "10", "20"], "'20': belongs to no option; separate several values of one by commas, e.g. --steps 10,20"),
        (["--config", "paper_table1"], "paper_table1.yaml:13:19: data.path: is missing; give the folder that holds val2017"),
        (["--config", "paper_table1", "data.path=nowhere"], "nowhere/val2017: is no folder"),
        (["--config", "tabletop_edits"], "is of kind edits; run it by `easyinv-edit bench edits --config tabletop_edits`"),
        (["--config", "tabletop_reconstruction", "size=62", "data.count=1"], "size 62 x 62: give a multiple of "),
        (["--config", "nothing.yaml"], "nothing.yaml: cannot be read (No such file or directory)"),
        (
            ["--config", "tabletop_reconstruction", "--images", "3", "--steps", "10"],
            "--images: with --config the file decides; write data.count=... for --images, num_inference_steps=... for --steps",
        ),
    ],
)
def test_the_command_refuses_in_words(command: Command, tmp_path: Path, arguments: list[str], says: str) -> None:
    code, out, err = command("bench", "inversion", "-o", str(tmp_path / "run"), *arguments)
    assert (code, out) == (2, "")
    assert all(line.startswith("error: ") or "nowhere" in line for line in err.splitlines())
    assert says in err
    assert not (tmp_path / "run").exists()
