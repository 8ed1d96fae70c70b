"""Columns read off samples, the tables made of results, and published numbers beside them."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from easyinv_edit.evaluation import columns, metrics, published, summary, summary_text, weights
from easyinv_edit.evaluation.benchmark import Benchmark, from_mapping, recipe_files
from easyinv_edit.evaluation.benchmark import read as read_file
from easyinv_edit.evaluation.columns import COLUMNS, Measures, Sample, loaded, plain_name
from easyinv_edit.evaluation.variants import CEILING, variants
from easyinv_edit.evaluation.weights import Weights

CPU = torch.device("cpu")


class Fake:
    """A perceptual metric with a closed form: the mean difference, or the mean of the picture, times the prompt's length."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, a: Tensor, b: Tensor | Sequence[str], mask: Tensor | None = None) -> Tensor:
        inside = torch.ones_like(a) if mask is None else mask.expand_as(a)
        value = (a - b).abs() * inside if isinstance(b, Tensor) else a * inside * len(b[0])
        return value.mean()[None]


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every metric with weights, in a closed form; the corrected structure has none."""
    made: dict[str, Any] = {
        "LPIPS (squeeze)": lambda *_: Fake("LPIPS (squeeze)"),
        "CLIP": lambda *_: Fake("CLIP (ViT-L/14)"),
        "DINO structure (0-255)": lambda *_: Fake("DINO structure (ViT-B/8, 0-255)"),
        "DINO structure": lambda *_: "no weights: dino",
    }
    monkeypatch.setattr(weights, "METRICS", made)


def sample(**changes: Any) -> Sample:
    """A picture against its source, the left half to be edited."""
    generator = torch.Generator().manual_seed(0)
    picture, source, truth = torch.rand(3, 1, 3, 16, 16, generator=generator, dtype=torch.float64)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    given = {"picture": picture, "source": source, "truth": truth, "mask": mask, "inside": mask, "prompt": "abc"}
    return Sample(**{**given, "source_prompt": "ab", **changes})


def read(name: str, given: Sample) -> float | None:
    reader = COLUMNS[name].read
    assert reader is not None
    return reader(given)


# --- columns ------------------------------------------------------------------------------------------------------------


def test_a_whole_picture_is_compared_with_its_source() -> None:
    s = sample()
    assert read("PSNR", s) == metrics.psnr(s.picture, s.source)
    assert read("truth SSIM", s) == metrics.ssim(s.picture, s.truth)  # type: ignore[arg-type]
    assert read("truth SSIM", sample(truth=None)) is None


@pytest.mark.parametrize("form", ["compat", "masked_mean"])
def test_the_background_is_what_the_mask_leaves(form: Any) -> None:
    s = sample(form=form)
    error = (s.picture - s.source).square()[..., 8:]
    expected = error.mean().item() / (2 if form == "compat" else 1)
    assert read("background MSE", s) == pytest.approx(expected)
    assert read("background PSNR", s) == pytest.approx(-10 * math.log10(expected))
    assert read("background PSNR", sample(mask=None)) is None


def test_inside_and_outside_are_of_the_true_object_alone() -> None:
    s = sample(form="compat")
    error = (s.picture - s.truth).square()  # type: ignore[operator]
    assert read("inside", s) == pytest.approx(-10 * math.log10(error[..., :8].mean()))
    assert read("outside", s) == pytest.approx(-10 * math.log10(error[..., 8:].mean()))
    assert read("inside", sample(inside=None)) is None


def test_guided_columns_look_at_the_guided_sample() -> None:
    other = sample(picture=sample().source / 2)
    assert read("MSE, guided", sample(guided=other)) == read("MSE", other)
    assert read("MSE, guided", sample()) is None


@pytest.mark.usefixtures("nets")
def test_columns_of_networks_say_which_net_they_are_of() -> None:
    names = ["background LPIPS (squeeze)", "structure", "CLIP whole", "CLIP edited", "CLIP source", "PSNR"]
    made = loaded(names, Weights(), CPU)
    s = sample(metrics=made.metrics)
    row = made.row(s)
    difference = (s.picture - s.source).abs()
    assert row == pytest.approx(
        {
            "background LPIPS (squeeze)": (difference[..., 8:].mean() / 2).item(),
            "structure (ViT-B/8, 0-255)": difference.mean().item(),
            "CLIP whole (ViT-L/14)": 3 * s.picture.mean().item(),
            "CLIP edited (ViT-L/14)": 1.5 * s.picture[..., :8].mean().item(),
            "CLIP source (ViT-L/14)": 2 * s.source.mean().item(),
            "PSNR": metrics.psnr(s.picture, s.source),
        }
    )
    assert [plain_name(title) for title in row] == names


@pytest.mark.usefixtures("nets")
def test_a_column_without_weights_is_empty_and_says_why() -> None:
    made = loaded(["structure, corrected", "PSNR"], Weights(), CPU, ["structure, corrected (ViT-S/8)", "PSNR"])
    assert made.missing == {"structure, corrected": "no weights: dino"}
    assert made.titles == {"structure, corrected": "structure, corrected (ViT-S/8)", "PSNR": "PSNR"}
    assert list(made.row(sample())) == ["PSNR"]


def test_what_is_not_finite_is_not_a_number() -> None:
    full = torch.ones(1, 1, 16, 16)
    made = loaded(["PSNR", "background PSNR", "target"], Weights(), CPU)
    s = sample(mask=full)
    assert made.row(Sample(picture=s.source, source=s.source, mask=full)) == {
        "PSNR": None, "background PSNR": None, "target": None,
    }  # fmt: skip


def test_every_column_belongs_to_a_kind_and_the_usual_ones_exist() -> None:
    assert all(set(column.kinds) <= set(columns.BOTH) and column.kinds for column in COLUMNS.values())
    for usual, kind in ((columns.INVERSION, "inversion"), (columns.TRUE_EDITS, "edits"), (columns.EDITS, "edits")):
        assert all(kind in COLUMNS[name].kinds for name in usual)


def test_the_smallest_side_is_that_of_the_most_demanding_column() -> None:
    assert loaded(["PSNR", "SSIM"], Weights(), CPU).least() == (11, "SSIM")
    assert loaded(["truth MS-SSIM", "SSIM"], Weights(), CPU).least() == (176, "truth MS-SSIM")


# --- tables -------------------------------------------------------------------------------------------------------------


def edits(**changes: Any) -> Benchmark:
    content = {"kind": "edits", "title": "test", "data": {"set": "tabletop_edits", "count": 2}, "inversions": ["ddim"]}
    content |= {"controls": ["none", "masactrl"], "metrics": ["inside", "gain", "background PSNR"], "num_inference_steps": 50}
    return from_mapping({**content, **changes})


def inversions(**changes: Any) -> Benchmark:
    content = {"kind": "inversion", "title": "test", "data": {"set": "tabletop", "count": 2}, "inversions": ["easyinv"]}
    return from_mapping({**content, "metrics": ["PSNR", "SSIM", "seconds"], **changes})


def built(config: Benchmark, rows: Sequence[dict[str, Any]] = (), groups: Sequence[str] = ("",)) -> dict[str, Any]:
    made = Measures(config.columns, {}, {name: name for name in config.columns}, {})
    return summary.build(config, made, variants(config), rows, groups, [])


def row(variant: str, item: str, group: str = "", **values: Any) -> dict[str, Any]:
    inversion, control = variant.split(" + ")
    return {"variant": variant, "item": item, "group": group, "inversion": inversion, "control": control, **values}


def test_a_kind_of_edit_has_no_line_of_a_control_that_is_not_for_it() -> None:
    rows = [
        row(f"ddim + {control}", group, group, inside=1.0)
        for control, group in (("none", "shape"), ("none", "size"), ("masactrl", "shape"))
    ]
    content = built(edits(controls=["none", {"name": "masactrl", "tasks": ["shape"]}]), rows, ["shape", "size"])
    told = {table["group"]: [line["variant"] for line in table["rows"]] for table in content["tables"]}
    both = ["ddim + none", "ddim + masactrl"]
    assert told == {"": both, "shape": both, "size": ["ddim + none"]}


def test_means_leave_out_what_is_not_defined_and_say_how_many_went_in() -> None:
    rows = [
        row("ddim + masactrl", "a", "pose", inside=10.0, **{"background PSNR": 30.0}),
        row("ddim + masactrl", "b", "pose", inside=20.0, **{"background PSNR": None}),
        row("ddim + masactrl", "c", "style", inside=60.0, **{"background PSNR": None}),
        row("ddim + none", "a", "pose", inside=8.0, **{"background PSNR": 20.0}),
        row("ddim + none", "b", "pose", error="it broke"),
    ]
    content = built(edits(), rows, ["pose", "pose", "style"])
    assert [(table["group"], table["title"]) for table in content["tables"]] == [
        ("", "all edits"), ("pose", "pose"), ("style", "style"),
    ]  # fmt: skip
    whole, pose, style = ({line["variant"]: line for line in table["rows"]} for table in content["tables"])
    assert whole["ddim + masactrl"] == {
        "variant": "ddim + masactrl", "inversion": "ddim", "control": "masactrl", "steps": 50, "dtype": "float32", "n": 3,
        "inside": 30.0, "gain": 2.0, "gain n": 1, "background PSNR": 30.0, "background PSNR n": 1,
    }  # fmt: skip
    assert (whole["ddim + none"]["n"], whole["ddim + none"]["gain"]) == (1, 0.0)
    assert "inside n" not in whole["ddim + none"]
    assert pose["ddim + masactrl"]["inside"] == 15.0
    assert (style["ddim + masactrl"]["n"], style["ddim + masactrl"]["background PSNR"]) == (1, None)
    assert (style["ddim + none"]["n"], style["ddim + none"]["inside"]) == (0, None)
    assert content["notes"][-1] == "1 of 5 results are errors; results.jsonl holds each with its reason"
    lines = summary_text.markdown(content).splitlines()
    assert "| ddim + masactrl | 3 | 30.00 | 2.00 (1) | 30.00 (1) |" in lines


def test_one_group_needs_no_table_of_its_own() -> None:
    assert [table["group"] for table in built(edits(), [], ["pose", "pose"])["tables"]] == [""]
    assert [table["group"] for table in built(edits(), [], ["", "white"])["tables"]] == ["", "white"]


PUBLISHED = {"source": "a paper", "inversion": "easyinv", "dtype": "float32", "num_inference_steps": 50}


def test_published_numbers_stand_below_the_line_they_belong_to() -> None:
    rows = [{"variant": "easyinv", "item": "a", "group": "", "inversion": "easyinv", "PSNR": 25.0}]
    more = [
        {**PUBLISHED, "values": {"PSNR": 30.0, "LPIPS (vgg)": 0.3}},
        {**PUBLISHED, "inversion": "other", "values": {"SSIM": 0.5}},
    ]
    content = built(inversions(published=more), rows)
    assert content["published"] == [
        {"variant": "easyinv", "source": "a paper", "same_protocol": True, "why": "", "PSNR": 30.0, "LPIPS (vgg)": 0.3},
        {"variant": "other, float32", "source": "a paper", "same_protocol": True, "why": "", "SSIM": 0.5},
    ]
    assert [column["name"] for column in content["columns"]] == ["PSNR", "SSIM", "seconds", "LPIPS (vgg)"]
    told = [line["variant"] for line in summary_text.lines_of(content, content["tables"][0])]
    assert told == [CEILING, "easyinv", "easyinv", "other, float32"]
    lines = summary_text.markdown(content).splitlines()
    assert "| easyinv | 1 | 25.00 |  |  |  |" in lines
    assert "| *easyinv: a paper* |  | 30.00 |  |  | 0.3000 |" in lines
    read = list(csv.DictReader(summary_text.as_csv(content).splitlines()))
    assert [(line["variant"], line["source"], line["PSNR"]) for line in read[1:3]] == [
        ("easyinv", "", "25.0"), ("easyinv", "a paper", "30.0"),
    ]  # fmt: skip


def why(config: Benchmark) -> str:
    (line,) = built(config)["published"]
    assert line["same_protocol"] == (not line["why"])
    return str(line["why"])


def test_another_protocol_is_marked_with_its_reason() -> None:
    row = {**PUBLISHED, "values": {"PSNR": 30.0}}
    assert why(inversions(published=[row])) == ""
    assert why(inversions(published=[{**row, "why": "other pictures"}])) == "other pictures"
    assert why(inversions(published=[{**row, "num_inference_steps": 20}])) == "T is 20 there and 50 here"
    protocol = {"model": "sd14", "data": {"set": "coco"}, "guidance_scale": 7.5}
    content = built(inversions(published=[{**row, "why": "w"}], protocol=protocol))
    assert content["published"][0]["why"] == "w; this run's model, data.set are not the published ones"
    assert content["notes"][:-1] == [
        "not the protocol of the published numbers: model is embedded here and sd14 there; data.set is tabletop here and coco "
        "there; the numbers say nothing about the published ones"
    ]
    marked = summary_text.markdown(content)
    assert "| *easyinv: a paper* \\* |" in marked
    assert "\n\\* w; this run's model, data.set are not the published ones\n" in marked


def shipped_lines(name: str, *overrides: str, lost: int = 0, items: int | None = None) -> dict[str, str]:
    """Why each published line of a shipped benchmark is not comparable, by our variant and the first of its columns.

    lost: how many results of each variant failed; items: how many pictures the set has, by default as many as published.
    """
    (path,) = (path for path in recipe_files() if path.stem == name)
    config, _ = read_file(path, ["data.path=x", *overrides])
    count = items or config.published[0].count or 0
    names = [line.label for line in variants(config) if line.method is not None]
    rows: list[dict[str, Any]] = [
        {"variant": v, "item": str(i), "group": "", **({"error": "e"} if i < lost else {})} for v in names for i in range(count)
    ]
    found = built(config, rows, [""] * count)["published"]
    return {f"{line['variant']}: {list(line)[4]}": line["why"] for line in found}


MASACTRL, REFINE = "ddim + masactrl: structure (ViT-B/8, 0-255)", "ddim + prompt_to_prompt: structure (ViT-B/8, 0-255)"
EASYINV, ALONE = "easyinv, T=50: LPIPS (vgg)", "easyinv: LPIPS (vgg)"


def test_shipped_benchmarks_are_comparable_as_they_are() -> None:
    pie, table = shipped_lines("pie_bench"), shipped_lines("paper_table1")
    assert {line.split(":")[0] for line, reason in pie.items() if not reason} == {
        "ddim + prompt_to_prompt", "negative_prompt + prompt_to_prompt", "direct + prompt_to_prompt",
        "ddim + masactrl", "direct + masactrl",
    }  # fmt: skip
    assert {line for line, reason in table.items() if not reason} == {EASYINV, "renoise, T=50: LPIPS (vgg)"}
    same = ("data.captions=false", "data.splits=[test2017,val2017]", "pictures=0", "inversions=[easyinv]")
    assert shipped_lines("paper_table1", *same)[ALONE] == ""
    assert shipped_lines("pie_bench", "inversions=[ddim]")[REFINE] == ""


@pytest.mark.parametrize(
    ("name", "overrides", "line", "says"),
    [
        ("pie_bench", ["pin_source=true"], MASACTRL, "this run's pin_source are not the published ones"),
        ("pie_bench", ["dtypes=[float16]"], MASACTRL, "this run's dtypes are not the published ones"),
        ("pie_bench", ["schedule.rescale_betas_zero_snr=true"], REFINE, "this run's schedule are not the published ones"),
        (
            "pie_bench",
            ["controls=[masactrl,prompt_to_prompt]"],
            MASACTRL,
            "this run's start_step of masactrl, source_prompt of masactrl are not the published ones",
        ),
        ("pie_bench", ["controls=[masactrl,prompt_to_prompt]"], REFINE, "cross_steps of prompt_to_prompt"),
        (
            "pie_bench",
            ["inversions=[{name: ddim, pin_source: true}]"],
            MASACTRL,
            "this run's pin_source of ddim are not the published ones",
        ),
        ("paper_table1", ["schedule.timestep_spacing=trailing"], EASYINV, "this run's schedule are not"),
        ("paper_table1", ["data.splits=[val2017]", "data.captions=true"], EASYINV, "run's data.splits, data.captions are not"),
        (
            "paper_table1",
            ["inversions=[{name: easyinv, label: easyinv, eta: 0.25}]"],
            ALONE,
            "this run's eta of easyinv are not",
        ),
    ],
)
def test_a_shipped_benchmark_that_is_decided_otherwise_is_marked(name: str, overrides: list[str], line: str, says: str) -> None:
    assert says in shipped_lines(name, *overrides)[line]


def test_fewer_results_than_the_published_means_are_marked() -> None:
    assert shipped_lines("pie_bench", items=3)[MASACTRL] == "means of 700 results there and of 3 here"
    assert shipped_lines("pie_bench", lost=1)[MASACTRL] == "means of 700 results there and of 699 here"
    assert shipped_lines("paper_table1", items=2)[EASYINV] == "means of 2,298 results there and of 2 here"
    alone = shipped_lines("paper_table1", "inversions=[ddim]", items=2)["easyinv, float16: LPIPS (vgg)"]
    assert alone == "means of 2,298 results there and of 2 here"


def test_numbers_of_another_precision_belong_to_another_line() -> None:
    content = built(inversions(published=[{**PUBLISHED, "dtype": "float16", "values": {"PSNR": 30.0}}]))
    assert content["published"][0]["variant"] == "easyinv, float16"
    assert content["published"][0]["variant"] not in {line["variant"] for line in content["tables"][0]["rows"]}


def test_a_folder_counts_as_the_preset_whose_structure_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol, row = {"model": "sd14"}, {**PUBLISHED, "values": {"PSNR": 30.0}}
    monkeypatch.setattr(
        published, "examine", lambda path: type("R", (), {"presets": ("sd15", "sd14") if "good" in path else ()})
    )
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    for model, differing in (
        (str(tmp_path / "good"), False),
        (str(tmp_path / "bad"), True),
        ("CompVis/stable-diffusion-v1-4", False),
    ):
        assert bool(why(inversions(published=[row], protocol=protocol, model=model))) == differing
    notes = built(inversions(protocol=protocol, model=str(tmp_path / "good")))["notes"]
    assert notes[:-1] == [f"{tmp_path / 'good'} has the structure of sd14; its weights are taken at their word"]


def test_a_benchmark_of_inversions_says_what_a_pinned_source_gives() -> None:
    (note,) = built(inversions())["notes"]
    assert note.startswith(
        "autoencoder alone is what an edit with a pinned source, the default, reconstructs under every method"
    )
    assert f"- {note}\n" in summary_text.markdown(built(inversions()))
    assert not any("pinned" in note for note in built(edits())["notes"])


def test_pictures_without_a_prompt_are_told_where_columns_are_guided() -> None:
    given = {"a": "", "b": "", "c": "a ball"}

    def bare(**changes: Any) -> list[str]:
        rows = [{"variant": "easyinv", "inversion": "easyinv", "item": i, "group": "", "prompt": p} for i, p in given.items()]
        notes = built(inversions(**{"metrics": ["PSNR", "PSNR, guided"], **changes}), rows)["notes"]
        return [note for note in notes if "no prompt" in note]

    folder = {"set": "folder", "path": "pictures"}
    assert bare(metrics=["PSNR"]) == bare(negative_prompt="a blur") == []
    assert bare()[0].startswith("2 of 3 pictures have no prompt: guided columns repeat the others there")
    assert "captions.csv" not in bare()[0]
    assert bare(data=folder)[0].endswith("; a captions.csv in the folder (columns file, prompt) gives prompts")


def test_how_masks_count_is_told_where_they_do() -> None:
    assert any("PIE-Bench's: both pictures are black" in note for note in built(edits(mask_form="compat"))["notes"])
    assert any("count pixels outside the mask alone" in note for note in built(edits())["notes"])
    assert built(edits(metrics=["inside"]))["notes"] == []
