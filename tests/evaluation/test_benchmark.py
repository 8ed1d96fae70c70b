"""Benchmarks' configurations: YAML in and out, every problem at once with its place, and the lines that they make."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from easyinv_edit.errors import RecipeError
from easyinv_edit.evaluation import columns, suite
from easyinv_edit.evaluation.benchmark import Benchmark, from_mapping, parse, read, recipe_files
from easyinv_edit.evaluation.datasets import EditItem
from easyinv_edit.evaluation.variants import CEILING, CONTROLS, Variant, filled, groups, variants

TABLETOP = {"tabletop_controllers", "tabletop_edits", "tabletop_inversions", "tabletop_reconstruction"}
SHIPPED = {"paper_table1", "paper_table2", "pie_bench", *TABLETOP}
INVERSIONS = "kind: inversion\ntitle: t\ndata: {set: tabletop, count: 2}\ninversions: [ddim, easyinv]\n"
EDITS = "kind: edits\ntitle: t\ndata: {set: tabletop_edits, count: 2}\ninversions: [ddim]\ncontrols: [none, masactrl]\n"


def problems(text: str, *overrides: str) -> list[str]:
    """What `parse` finds wrong, each a line."""
    with pytest.raises(RecipeError) as caught:
        parse(text, "b.yaml", overrides)
    assert all(len(problem.splitlines()) == 1 for problem in caught.value.problems)
    return caught.value.problems


def only(text: str, *overrides: str) -> str:
    found = problems(text, *overrides)
    assert len(found) == 1, found
    return found[0]


def labels(text: str, *overrides: str) -> list[str]:
    return [line.label for line in variants(parse(text, "b.yaml", overrides))]


# --- reading ------------------------------------------------------------------------------------------------------------


def test_names_and_single_values_are_short_for_lists_of_mappings() -> None:
    short = parse(EDITS + "num_inference_steps: 20\ndtypes: float16\n")
    long = parse(
        "kind: edits\ntitle: t\ndata: {set: tabletop_edits, count: 2}\ninversions: [{name: ddim}]\n"
        "controls: [{name: none}, {name: masactrl}]\nnum_inference_steps: [20]\ndtypes: [float16]\n"
    )
    assert short == long


@pytest.mark.parametrize("text", [INVERSIONS, EDITS])
def test_what_is_written_out_is_read_back_equal(text: str) -> None:
    made = parse(text + "weights: {clip: models/clip}\nguidance_scale: 3\n")
    assert parse(made.to_yaml()) == made
    assert from_mapping(yaml.safe_load(made.to_yaml())) == made


def test_a_request_is_json_and_leaves_the_folder_out() -> None:
    made = parse(INVERSIONS + "weights: {dino: models/dino}\noutput: here\n")
    content = json.loads(json.dumps(made.request()))
    assert content == made.request()
    assert content["weights"]["dino"] == "models/dino"
    assert "output" not in content


def test_overrides_decide_over_the_file() -> None:
    made = parse(INVERSIONS, "b.yaml", ["data.count=7", "inversions=[edict]", "num_inference_steps=[10,20]", "model=sd15"])
    assert (made.data.count, made.inversions, made.num_inference_steps, made.model) == (
        7,
        [{"name": "edict"}],
        [10, 20],
        "sd15",
    )


def test_a_file_is_read_with_its_text(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(INVERSIONS)
    assert read(tmp_path / "own.yaml") == (parse(INVERSIONS), INVERSIONS)


def test_a_missing_file_is_told_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"paper_tabel1: cannot be read .* did you mean 'paper_table1'"):
        read("paper_tabel1")


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_every_problem_is_told_at_its_place_in_the_files_order() -> None:
    text = (
        "kind: inversion\ntitle: t\ndata: {set: tabletop, count: 0, paths: x}\ninversions: [ddim, easyinf]\n"
        "guidance_scale: high\nfree: 1\n"
    )
    found = problems(text)
    assert [problem.split(": ")[:2] for problem in found] == [
        ["b.yaml:3:23", "data.count"],
        ["b.yaml:3:33", "data.paths"],
        ["b.yaml:4:20", "inversions.1"],
        ["b.yaml:5:1", "guidance_scale"],
        ["b.yaml:6:1", "free"],
    ]
    assert "'easyinf' is unknown; choose easyinv; ddim" in found[2]
    assert found[2].endswith("did you mean 'easyinv'?")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("title: t\ninversions: [ddim]\n", "b.yaml: kind: is missing"),
        ("- ddim\n", "b.yaml:1:1: a recipe is a mapping of keys"),
        (INVERSIONS.replace("ddim", "{name: ddim, eta: 1}"), "b.yaml:4:27: inversions.0.eta: unknown setting of ddim"),
        (INVERSIONS.replace("ddim", "{name: ddim, label: [1]}"), "b.yaml:4:27: inversions.0.label: should be a valid string"),
        (INVERSIONS.replace("ddim", "5"), "b.yaml:4:14: inversions.0: should be a name, or a mapping"),
        (INVERSIONS.replace("[ddim, easyinv]", "[]"), "b.yaml:4:1: inversions: the list is empty"),
        (INVERSIONS.replace("count: 2", "first_seed: 3"), "b.yaml:3:1: data.count: is missing; say how many scenes to render"),
        (
            INVERSIONS.replace("count: 2", "count: 2, tasks: [shape]"),
            "data.tasks: is not used by tabletop, whose keys are count",
        ),
        (INVERSIONS.replace("set: tabletop", "set: tabletp"), "b.yaml:3:8: data.set: should be 'tabletop'"),
        (INVERSIONS.replace("tabletop, count: 2", "coco"), "data.path: is missing; give the folder that holds val2017"),
        (
            INVERSIONS.replace("tabletop, count: 2", "coco, path: x, splits: [val]"),
            "data.splits: 'val' is unknown; choose val2017",
        ),
        (INVERSIONS.replace("tabletop, count: 2", "coco, path: x, captions: y"), "data.captions: should be true or false"),
        (INVERSIONS.replace("tabletop, count: 2", "pie_bench, path: x, types: [pose]"), "data.types: 'pose' is unknown"),
        (EDITS.replace("count: 2", "count: 2, tasks: [shap]"), "data.tasks: 'shap' is unknown"),
        (EDITS.replace("count: 2", "suite: 0"), "data.suite: '0' is no version; choose 1, 2"),
        (EDITS.replace("count: 2", "suite: 1, count: 25"), "data.count: suite 1 has 24 cases of each task (got 25)"),
        (EDITS.replace("count: 2", "suite: 1, tasks: [move]"), "data.tasks: 'move' is unknown; choose shape, size, turn"),
        (EDITS.replace("count: 2", "suite: 1, first_seed: 3"), "data.first_seed: a suite has scenes of its own"),
        (
            EDITS.replace("tabletop_edits", "tabletop"),
            "data.set: tabletop has no target prompts; edits can be made of tabletop_edits",
        ),
        (EDITS.replace("none, masactrl", ""), "controls: the list is empty; choose from none; masactrl"),
        (EDITS.replace("masactrl", "masactl"), "'masactl' is unknown; choose none; masactrl;"),
        (EDITS.replace("none", "{name: masactrl, sites: 10, sight: 1}"), "controls.0.sight: unknown setting of masactrl"),
        (EDITS + "batch: 2\n", "b.yaml:6:1: batch: edits are made one at a time"),
        (INVERSIONS + "controls: [none]\n", "b.yaml:5:1: controls: is of edits"),
        (INVERSIONS + "metrics: [PSNR, inside]\n", "b.yaml:5:17: metrics.1: 'inside' is no column of kind inversion"),
        (INVERSIONS + "inversion: ddim\n", "b.yaml:5:1: inversion: unknown key - did you mean 'inversions'?"),
        (INVERSIONS + "dtypes: [float8]\n", "b.yaml:5:10: dtypes.0: should be 'float32', 'float16' or 'bfloat16'"),
        (INVERSIONS + "num_inference_steps: 0\n", "num_inference_steps.0: should be greater than or equal to 1"),
        (INVERSIONS + "weights: {lpips: {vgg: {backbone: a}}}\n", "b.yaml:5:19: weights.lpips.vgg.heads: is missing"),
        (INVERSIONS + "weights: {clips: a}\n", "b.yaml:5:11: weights.clips: unknown key - did you mean 'clip'?"),
        (INVERSIONS + "schedule: {steps: 3}\n", "b.yaml:5:12: schedule.steps: unknown key"),
        (
            INVERSIONS + "protocol: {data: {sett: coco}}\n",
            "b.yaml:5:19: protocol.data.sett: is no key of a benchmark - did you mean",
        ),
        (INVERSIONS + "protocol: {inversions: [ddimm]}\n", "protocol.inversions.0: 'ddimm' is unknown; choose easyinv"),
        (INVERSIONS + "published: [{inversion: ddim, values: {PSNR: 3}}]\n", "b.yaml:5:13: published.0.source: is missing"),
        (
            INVERSIONS + "published: [{source: s, inversion: ddim, values: {PSRN: 3}}]\n",
            "published.0.values: 'PSRN' is no column of kind inversion - did you mean 'PSNR'?",
        ),
        (
            INVERSIONS.replace("easyinv", "ddim"),
            "b.yaml:4:1: inversions: two lines are called 'ddim'; give one of them a label",
        ),
        (INVERSIONS.replace("easyinv", "edict") + "num_inference_steps: 4\n", "edict needs at least 10 steps (got 4)"),
        (
            INVERSIONS.replace("easyinv", "null_text") + "guidance_scale: 1\n",
            "null_text: guidance_scale: should be greater than 1",
        ),
        (INVERSIONS + "output: ${oc.env:HOME}\n", "b.yaml:5:1: output: references such as ${oc.env:NAME} are not allowed"),
    ],
)
def test_what_is_refused_says_why(text: str, says: str) -> None:
    assert says in only(text)


def test_an_override_is_named_where_it_is_wrong() -> None:
    assert only(INVERSIONS, "data.count=none").startswith(
        "command line: 'data.count=none': data.count: should be a valid integer"
    )
    assert "write key=value" in only(INVERSIONS, "data.count")


def test_a_mapping_is_checked_alike() -> None:
    with pytest.raises(RecipeError, match=r"^inversions\.0: 'ddin' is unknown"):
        from_mapping({**yaml.safe_load(INVERSIONS), "inversions": ["ddin"]})


# --- lines --------------------------------------------------------------------------------------------------------------


def test_lines_say_only_what_tells_them_apart() -> None:
    assert labels(INVERSIONS) == [CEILING, "ddim", "easyinv"]
    assert labels(INVERSIONS, "num_inference_steps=[10,20]") == [
        CEILING, "ddim, T=10", "easyinv, T=10", "ddim, T=20", "easyinv, T=20",
    ]  # fmt: skip
    assert labels(INVERSIONS, "dtypes=[float16,float32]") == [
        f"{CEILING}, float16", "ddim, float16", "easyinv, float16",
        f"{CEILING}, float32", "ddim, float32", "easyinv, float32",
    ]  # fmt: skip
    assert labels(EDITS) == ["ddim + none", "ddim + masactrl"]


def test_settings_are_part_of_the_name_unless_there_is_a_label() -> None:
    given = "inversions=[{name: easyinv, variant: paper}, {name: easyinv, label: ours, num_inference_steps: 7}]"
    assert labels(INVERSIONS, given) == [CEILING, "easyinv, variant=paper, T=50", "ours, T=7"]
    assert labels(INVERSIONS, given, "num_inference_steps=[10,20]")[1:] == [
        "easyinv, variant=paper, T=10", "ours, T=7", "easyinv, variant=paper, T=20",
    ]  # fmt: skip


def test_methods_that_fit_the_edits_guidance_are_told_it() -> None:
    made = parse(
        INVERSIONS, "b.yaml", ["inversions=[null_text, {name: null_text, label: x, guidance_scale: 2}]", "guidance_scale=5"]
    )
    assert [getattr(line.method, "guidance_scale", None) for line in variants(made)] == [None, 5.0, 2.0]


def test_lines_of_one_inversion_share_it() -> None:
    given = "inversions=[ddim, {name: ddim, label: direct, pin_source: true}, easyinv]"
    made = variants(parse(EDITS, "b.yaml", [given, "pin_source=false", "controls=[none, {name: masactrl, source_prompt: ''}]"]))
    assert [line.pinned for line in made] == [False, False, True, True, False, False]
    assert [[line.label for line in group] for group in groups(made)] == [
        ["ddim + none", "direct + none"],
        ["ddim + masactrl", "direct + masactrl"],
        ["easyinv + none"],
        ["easyinv + masactrl"],
    ]


@pytest.mark.parametrize("name", CONTROLS)
def test_every_named_control_can_be_chosen(name: str) -> None:
    made = variants(parse(EDITS, "b.yaml", [f"controls=['{name}']"]))
    assert [(line.control, line.settings) for line in made] == [(name, CONTROLS[name])]


SETTINGS: Mapping[str, object] = {
    "name": "prompt_to_prompt",
    "blend_source": "{source_word}",
    "reweight": {"{target_word}": 2},
    "cross_steps": 0.4,
}


def test_a_controls_words_are_the_items() -> None:
    assert filled(SETTINGS, {"{source_word}": "cat", "{target_word}": "dog"}) == {
        "name": "prompt_to_prompt",
        "blend_source": "cat",
        "reweight": {"dog": 2},
        "cross_steps": 0.4,
    }
    assert filled(SETTINGS, {"{source_word}": "cat"}) == {
        "name": "prompt_to_prompt",
        "blend_source": "cat",
        "cross_steps": 0.4,
    }
    assert filled(SETTINGS, {}) == {"name": "prompt_to_prompt", "cross_steps": 0.4}


def test_a_controls_masks_are_the_items_and_left_out_where_it_has_none() -> None:
    case = suite.cases(["move"], 1)[0]
    (move,) = suite.items(32, ["move"], 1)
    masked = controlled("masactrl, masks")
    settings = masked.controller(move)
    before, after = (mask[0, 0] for mask in suite.masks([case], 32))
    assert torch.equal(settings["source_mask"], before)
    assert torch.equal(settings["target_mask"], after)
    bare = EditItem("x", Image.new("RGB", (8, 8)), target_prompt="a dog")
    assert masked.controller(bare) == {"name": "masactrl"}
    region = dataclasses.replace(bare, region=lambda: torch.eye(8))
    assert all(torch.equal(mask, torch.eye(8)) for name, mask in masked.controller(region).items() if name != "name")


def controlled(control: str) -> Variant:
    """The line of a benchmark under one control."""
    (line,) = variants(parse(EDITS, "b.yaml", [f"controls=[{control!r}]"]))
    return line


# --- what is shipped ----------------------------------------------------------------------------------------------------


def test_the_shipped_benchmarks_are_these() -> None:
    assert {path.stem for path in recipe_files()} == SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_benchmark_says_what_it_is_and_can_be_read(name: str) -> None:
    (path,) = (path for path in recipe_files() if path.stem == name)
    made, text = read(path, ["data.path=somewhere"] if "paper" in name or "pie" in name else [])
    assert text.startswith("# ")
    assert made.output == f"outputs/{name.replace('_', '-')}"
    known = dict(_protocol(made))
    assert all(known[key] == value for key, value in known.items())
    titles = {columns.plain_name(title) for row in made.published for title in row.values}
    assert titles <= set(made.columns)


def _protocol(made: Benchmark) -> list[tuple[str, object]]:
    from easyinv_edit.evaluation.published import differences

    assert differences(made) == [], "a file as it is shipped is its own protocol"
    return list(made.protocol.items())


@pytest.mark.parametrize("name", ["paper_table1", "paper_table2", "pie_bench"])
def test_published_numbers_have_a_line_of_ours(name: str) -> None:
    (path,) = (path for path in recipe_files() if path.stem == name)
    made, _ = read(path, ["data.path=somewhere"])
    ours = {(line.inversion, line.control) for line in variants(made)}
    assert {(row.inversion, row.control) for row in made.published} <= ours
