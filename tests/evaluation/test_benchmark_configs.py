"""Every shipped benchmark runs to its end offline, on a tiny model: those of published sets on sets in their format, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from PIL import Image

from easyinv_edit.evaluation import suite
from easyinv_edit.evaluation.variants import CEILING
from tests import models
from tests.evaluation.test_pie_bench import MADE_UP, write
from tests.helpers import Command

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    models.sd().save_pretrained(folder)
    return f"model={folder}"


def done(command: Command, kind: str, name: str, place: Path, *overrides: str) -> dict[str, Any]:
    """Run a shipped benchmark; what summary.json holds."""
    code, out, err = command("bench", kind, "--config", name, *overrides, "device=cpu", "-o", str(place))
    assert code == 0, err
    content: dict[str, Any] = json.loads((place / "summary.json").read_text())
    assert out.rstrip("\n") == (place / "summary.md").read_text().rstrip("\n")
    assert (place / "config.yaml").read_text().startswith("# ")
    assert json.loads((place / "environment.json").read_text())["finished"]
    assert list((place / "figures").glob("*.png"))
    return content


def lines(content: dict[str, Any]) -> dict[str, int]:
    return {row["variant"]: row["n"] for row in content["tables"][0]["rows"]}


@pytest.fixture
def coco(tmp_path: Path) -> str:
    """Two near-square pictures and one that is not, in COCO's layout."""
    for split, number, size in (("val2017", 285, (60, 64)), ("test2017", 16, (64, 60)), ("test2017", 1, (64, 40))):
        (tmp_path / "coco" / split).mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / "coco" / split / f"{number:012d}.jpg")
    return f"data.path={tmp_path / 'coco'}"


def test_table_1(command: Command, model: str, coco: str, tmp_path: Path) -> None:
    few = ["data.count=1", "dtypes=float32", "num_inference_steps=2"]
    content = done(command, "inversion", "paper_table1", tmp_path / "run", model, coco, *few)
    assert lines(content) == dict.fromkeys([CEILING, "ddim, T=2", "easyinv, T=2", "renoise, T=2", "fixed_point, T=20"], 1)
    assert content["tables"][0]["rows"][4]["evaluations"] == 20 * 7
    assert [column["name"] for column in content["columns"]] == ["LPIPS (vgg)", "SSIM", "PSNR", "seconds", "evaluations"]
    assert any(note == "no weights: weights/vgg16-397923af.pth (LPIPS (vgg))" for note in content["notes"])
    assert not any(row["same_protocol"] for row in content["published"])
    assert any("the numbers say nothing about the published ones" in note for note in content["notes"])


def test_table_1_on_the_embedded_model_says_so(command: Command, tmp_path: Path) -> None:
    few = ["data.count=1", "num_inference_steps=2", "inversions=[easyinv]"]
    content = done(command, "inversion", "paper_table1", tmp_path / "run", "model=embedded", "data.set=tabletop", *few)
    assert lines(content) == {CEILING: 1, "easyinv": 1}
    (note,) = (note for note in content["notes"] if note.startswith("not the protocol"))
    assert "model is embedded here and sd14 there; data.set is tabletop here and coco there" in note
    beside = [row for row in content["published"] if row["variant"] == "easyinv"]
    assert [row.get("SSIM") for row in beside] == [0.646, None]
    assert "T is 50 there and 2 here" in beside[0]["why"]


def test_table_2(command: Command, model: str, coco: str, tmp_path: Path) -> None:
    few = ["data.count=2", "dtypes=[bfloat16,float32]", "num_inference_steps=2"]
    content = done(command, "inversion", "paper_table2", tmp_path / "run", model, coco, *few)
    labels = [f"{name}, {dtype}" for dtype in ("bfloat16", "float32") for name in (CEILING, "easyinv")]
    assert lines(content) == dict.fromkeys(labels, 2)
    assert [row["variant"] for row in content["published"]] == ["easyinv, float16"] * 2 + ["easyinv, float32"] * 2


def test_pie_bench(command: Command, model: str, tmp_path: Path) -> None:
    write(tmp_path / "pie", MADE_UP)
    few = [f"data.path={tmp_path / 'pie'}", "dtypes=float32", "num_inference_steps=2", "inversions=[ddim,easyinv]"]
    content = done(command, "edits", "pie_bench", tmp_path / "run", model, *few)
    controls = ("masactrl", "prompt_to_prompt", "plug_and_play")
    assert lines(content) == {f"{inversion} + {control}": 3 for inversion in ("ddim", "easyinv") for control in controls}
    assert [table["group"] for table in content["tables"]] == ["", "random", "change_attribute_pose", "change_style"]
    whole, style = content["tables"][0]["rows"][0], content["tables"][3]["rows"][0]
    assert (whole["background PSNR n"], style["n"], style["background PSNR"]) == (2, 1, None), "a full mask has no background"
    assert any("holds 3 edits, PIE-Bench has 700" in note for note in content["notes"])
    titles = [column["name"] for column in content["columns"]]
    assert titles[:7] == [
        "structure (ViT-B/8, 0-255)", "background PSNR", "background LPIPS (squeeze)", "background MSE", "background SSIM",
        "CLIP whole (ViT-L/14)", "CLIP edited (ViT-L/14)",
    ]  # fmt: skip
    assert all(row["structure (ViT-B/8, 0-255)"] is None for row in content["tables"][0]["rows"])
    missing = [note for note in content["notes"] if note.startswith("no weights: ")]
    assert [note.split(" (")[0] for note in missing] == [
        "no weights: weights/dino-vitb8",
        "no weights: weights/squeezenet1_1-b8a52dc0.pth",
        "no weights: weights/clip-vit-large-patch14",
    ]
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {(row["control"], row["source_prompt"]) for row in rows if row["group"] == "random"} == {
        ("masactrl", ""),
        ("prompt_to_prompt", "a round cake with a red cherry"),
        ("plug_and_play", "a round cake with a red cherry"),
    }


def test_tabletop_reconstruction(command: Command, model: str, tmp_path: Path) -> None:
    """Of the two methods that are tuned picture by picture, one iteration a level."""
    shipped = OmegaConf.load(ROOT / "configs/benchmarks/tabletop_reconstruction.yaml").inversions
    quick = [f"{{name: {each}, iterations: 1}}" if each in ("null_text", "prompt_tuning") else each for each in shipped]
    few = ["data.count=1", "num_inference_steps=10", "pictures=0", f"inversions=[{', '.join(quick)}]"]
    content = done(command, "inversion", "tabletop_reconstruction", tmp_path / "run", model, *few)
    counts = lines(content)
    assert len(counts) == 13
    assert set(counts.values()) == {1}
    (note,) = content["notes"]
    assert note.startswith(f"{CEILING} is what an edit with a pinned source, the default, reconstructs")


def test_tabletop_edits(command: Command, model: str, tmp_path: Path) -> None:
    few = ["data.count=1", "num_inference_steps=2", "data.tasks=[shape,background]", "inversions=[easyinv,null_text]"]
    content = done(command, "edits", "tabletop_edits", tmp_path / "run", model, *few)
    assert len(lines(content)) == 12
    assert set(lines(content).values()) == {2}
    assert [table["group"] for table in content["tables"]] == ["", "shape", "background"]
    assert all(row["target"] is not None for row in content["tables"][0]["rows"])
    assert any(note.startswith("target and kept are read by a classifier") for note in content["notes"])
    board = (tmp_path / "run" / "leaderboard.md").read_text()
    assert board.startswith("Gain inside the object over easyinv + none on the same item")
    assert all(f"| {line} |" in board for line in lines(content))
    known = json.loads((tmp_path / "run" / "leaderboard.json").read_text())
    assert {row["variant"] for row in known["rows"]} == set(lines(content))
    right = ", ".join(f"{name} {share:.3f}" for name, share in known["judged"].items())
    assert f"The judge reads rightly off the true results: {right}.\n" in board
    assert {"shape", "background"} <= set(known["judged"])
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    for name in ("leaderboard.json", "figures/pareto.png"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "leaderboard.md").write_text("an earlier version's")
    done(command, "edits", "tabletop_edits", tmp_path / "run", model, *few)
    assert json.loads((tmp_path / "run" / "leaderboard.json").read_text()) == known
    assert (tmp_path / "run" / "leaderboard.md").read_text() == board
    assert (tmp_path / "run" / "figures" / "pareto.png").exists()
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before, "nothing is measured again"
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {row["item"] for row in rows} == {item.name for item in suite.items(32, ["shape", "background"], 1)}
