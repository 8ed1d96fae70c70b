"""The suite stays what it is, was never trained on, and its leaderboard is plain arithmetic."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import yaml
from scipy.stats import rankdata, sem
from torch import Tensor

from easyinv_edit.errors import EasyInvError, InputError
from easyinv_edit.evaluation import benchmark, ground_truth, suite, tabletop
from easyinv_edit.evaluation.company import COMPANY
from easyinv_edit.evaluation.ground_truth import ALL_TASKS, TASKS, Case, make_cases
from easyinv_edit.evaluation.leaderboard import grid, leaderboard, markdown
from easyinv_edit.evaluation.suite import SUITE, SUITES, judge_accuracy, manifest
from easyinv_edit.pipeline import embedded_folder
from easyinv_edit.tabletop import geometry, training
from easyinv_edit.tabletop import judge as judging
from easyinv_edit.tabletop import render as rendering
from easyinv_edit.tabletop import scene as scenes
from easyinv_edit.tabletop.judge import READ, shown
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import WORDS, Scene, early_scene, random_scene, random_table
from easyinv_edit.terminal import shipped

EVERYTHING = tuple(SUITE.parts)

# --- what is in it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", SUITES.values(), ids=lambda version: f"version {version.version}")
def test_a_version_holds_the_cases_it_was_published_with(version: suite.Suite) -> None:
    """If this fails the scenes, captions or colours have changed: leave the digest and make a new version."""
    assert suite.digest(version) == version.digest
    found = manifest(version)
    assert json.loads(json.dumps(found))[0]["prompt"] == found[0]["prompt"]
    assert len(found) == version.count * len(version.parts)
    assert len({(entry["task"], entry["seed"]) for entry in found}) == len(found)


def test_the_second_version_has_six_tasks_to_ask_for_and_32_cases_of_each() -> None:
    second = SUITES["2"]
    assert second.tasks == ("shape", "size", "turn", "colour", "background", "texture")
    assert (*second.tasks, "move") == tuple(second.parts)
    assert second.parts["colour"].task.apart
    assert not SUITES["1"].parts["colour"].task.apart
    assert [case.task.name for case in suite.cases(suite=second)] == [name for name in second.tasks for _ in range(32)]
    assert len({case.source for case in suite.cases(second.parts, suite=second)}) == 32 * 7, "no scene twice"


def test_the_latest_version_can_ask_for_everything_and_repeats_no_scene() -> None:
    assert SUITE is SUITES["3"]
    assert SUITE.tasks == EVERYTHING == (*ALL_TASKS, *COMPANY)
    found = suite.cases()
    assert [case.task.name for case in found] == [name for name in EVERYTHING for _ in range(32)]
    assert len({case.source for case in found}) == 32 * 12


def test_the_first_version_is_the_published_benchmark() -> None:
    first = SUITES["1"]
    tried = [early_scene(benchmark.FIRST_SEED + i) for i in range(480)]
    found = suite.cases(suite=first)
    expected = [case for name in first.parts for case in make_cases(ALL_TASKS[name], tried, 24)]
    assert [(c.source, c.source_prompt, c.prompt) for c in found] == [(c.source, c.source_prompt, c.prompt) for c in expected]
    for case in found:
        assert case.truth == replace(case.source, **{case.task.field: getattr(case.truth, case.task.field)})
    assert {*first.tasks} == {*(task.name for task in TASKS), "background"}


@pytest.mark.parametrize("table", ["SIZES", "POSES", "COLOURS", "SECOND_COLOURS", "BACKGROUNDS"])
def test_a_changed_table_is_noticed(monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    values = getattr(scenes, table)
    word = next(iter(values))
    monkeypatch.setitem(values, word, 0.5 if isinstance(values[word], float) else (0.5, 0.5, 0.5))
    with pytest.raises(EasyInvError, match="suite 3: its scenes or captions have changed"):
        suite.cases()


def test_a_changed_caption_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ground_truth.caption
    monkeypatch.setattr(ground_truth, "caption", lambda *given: f"{known(*given)} now")
    with pytest.raises(EasyInvError, match="give what they are now a new version"):
        suite.items(32)


LOOKS = {
    "shape": (0.666878, 0.671943, 0.654066, -0.000121, -0.000497, -0.000523, -0.007395, -0.007392, -0.007088),
    "size": (0.71822, 0.723976, 0.693221, -0.000614, -0.000613, -0.00044, -0.006866, -0.007792, -0.006464),
    "turn": (0.732003, 0.712132, 0.690255, -5.7e-05, -0.000286, -5.3e-05, -0.007396, -0.006189, -0.006188),
    "colour": (0.62988, 0.65205, 0.642238, -0.000356, -0.00046, -0.000296, -0.006581, -0.007321, -0.00738),
    "background": (0.602133, 0.611006, 0.553729, -2.8e-05, -0.000113, -0.000162, -0.004851, -0.004449, -0.0053),
    "texture": (0.687186, 0.718544, 0.671619, -5.9e-05, -9.9e-05, -0.000236, -0.005219, -0.005608, -0.006951),
    "swap shape": (0.70485, 0.697371, 0.673776, -0.000614, -0.002503, -0.001151, -0.015289, -0.017814, -0.017553),
    "swap colour": (0.743305, 0.737766, 0.724964, -0.00023, -0.00022, 0.002933, -0.017871, -0.019197, -0.017605),
    "one of two": (0.688496, 0.688535, 0.689927, -4.9e-05, -0.00065, -0.000855, -0.014618, -0.017462, -0.016257),
    "add": (0.66227, 0.64829, 0.627293, -0.000614, -0.000686, -0.001981, -0.014026, -0.016216, -0.015488),
    "repaint": (0.610584, 0.625252, 0.586022, 0.000662, -5.9e-05, 8e-06, -0.005931, -0.006467, -0.006946),
    "move": (0.656141, 0.680019, 0.665495, -0.004625, -0.005298, -0.005668, -0.007161, -0.007802, -0.008133),
}
"""Of the true results at 32 pixels: mean red, green and blue, and their moments from left to right and from top to bottom."""
TOLERANCE = 2e-5
"""Rounding that tips a ray over an edge moves a mean by 5e-6."""


def looks(cases: Sequence[Case]) -> list[float]:
    pictures = render([case.truth for case in cases], 32)[0].double()
    axis = (torch.arange(32, dtype=torch.float64) + 0.5) / 32 - 0.5
    weights = (torch.ones_like(axis), axis, axis[:, None])
    return [float(value) for weight in weights for value in (pictures * weight).mean((0, 2, 3))]


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_renderer_draws_them_as_it_did(name: str) -> None:
    """If this fails pictures have changed: numbers measured before are of other pictures, so make a new version."""
    assert looks(suite.cases([name])) == pytest.approx(LOOKS[name], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("module", "constant", "value"),
    [(geometry, "STAR_DEPTH", 0.28), (rendering, "GROUND", -0.61), (rendering, "HIT", 1e-2)],
    ids=["STAR_DEPTH", "GROUND", "HIT"],
)
def test_a_changed_renderer_is_noticed(monkeypatch: pytest.MonkeyPatch, module: Any, constant: str, value: float) -> None:
    cases = suite.cases(["shape"])
    monkeypatch.setattr(module, constant, value)
    assert looks(cases) != pytest.approx(LOOKS["shape"], abs=TOLERANCE)


# --- never seen ---------------------------------------------------------------------------------------------------------


def trained_on() -> int:
    """The most scenes that any recipe, or the shipped model's own record, trains on; their seeds are 0 to one less."""
    recipes = [training.read_training_recipe(path).scenes for path in shipped("tabletop")]
    record = embedded_folder() / "training.json"
    return max([*recipes, json.loads(record.read_text())["recipe"]["scenes"] if record.exists() else 0])


def named_scenes() -> set[int]:
    """Seeds that the shipped recipes name."""
    images = [str(yaml.safe_load(path.read_text(encoding="utf-8")).get("image")) for path in shipped("recipes")]
    return {int(image.removeprefix("scene:")) for image in images if image.startswith("scene:")}


def test_no_seed_is_one_of_training_or_of_another_evaluation() -> None:
    seeds = {entry["seed"] for entry in manifest(SUITE)}
    million = 1_000_000
    used = {
        "training": range(trained_on()),
        "the training's gates": range(training.HELD_OUT, training.HELD_OUT + million),
        "tabletop evaluate, in three parts": range(tabletop.HELD_OUT, tabletop.HELD_OUT + 3 * million),
        "the benchmarks": range(benchmark.FIRST_SEED, benchmark.FIRST_SEED + million),
    }
    assert trained_on() >= 24_000
    for name, others in used.items():
        assert not any(seed in others for seed in seeds), name
    assert len(named_scenes()) > 3
    assert not seeds & named_scenes()
    assert min(seeds) >= suite.FIRST_SEED > max(max(others) for others in used.values())


@pytest.mark.slow
def test_no_scene_before_or_after_its_edit_was_trained_on() -> None:
    worlds = (random_scene, random_table, early_scene)
    seen = {make(seed) for make in worlds for seed in range(trained_on())}
    assert random_scene(7) in seen
    for case in suite.cases(EVERYTHING):
        assert case.source not in seen
        assert case.truth not in seen


# --- items, masks, judge ------------------------------------------------------------------------------------------------


def test_items_are_the_cases_in_their_order() -> None:
    made = suite.items(32, ["texture", "colour"], 3)
    assert [item.case for item in made] == suite.cases(["texture", "colour"], 3)
    assert [item.group for item in made] == ["texture"] * 3 + ["colour"] * 3
    assert [(item.prompt, item.target_prompt) for item in made] == [(i.case.source_prompt, i.case.prompt) for i in made]
    assert made[0].picture.size == (32, 32)
    names = [item.name for item in suite.items(32, EVERYTHING)]
    assert len(set(names)) == len(names) == 32 * 12


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ["textures"]}, "'textures' is no task of suite 3; .*did you mean 'texture'"),
        (
            {"tasks": ["texture"], "suite": SUITES["1"]},
            "'texture' is no task of suite 1; choose from shape, size, turn, colour",
        ),
        ({"count": 33}, "count is 33; suite 3 has 32 cases of each task"),
        ({"count": 0}, "count is 0; it must be at least 1"),
    ],
)
def test_what_is_not_there_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        suite.cases(**options)


def test_masks_are_the_objects_before_and_after() -> None:
    cases = suite.cases(["move"], 4, SUITES["2"])
    before, after = suite.masks(cases, 64)
    assert before.shape == after.shape == (4, 1, 64, 64)
    assert torch.equal(after, render([case.truth for case in cases], 64)[1])
    columns = torch.arange(64.0)
    moved = [float((m.sum((0, 1)) * columns).sum() / m.sum()) for m in (*after, *before)]
    for case, new, old in zip(cases, moved[:4], moved[4:], strict=True):
        assert new - old == pytest.approx(math.copysign(8, case.truth.offset - case.source.offset), abs=0.3)


class _Reader:
    """A judge that reads fixed words off whatever it is shown."""

    def __init__(self, words: list[dict[str, str]]) -> None:
        self.words = words

    def read(self, pictures: Tensor) -> list[dict[str, str]]:
        assert len(pictures) == len(self.words)
        return self.words


def test_the_judges_accuracy_is_its_share_of_right_words_of_the_true_results() -> None:
    cases = suite.cases(["shape", "texture"])
    truths = [{field: getattr(case.truth, field) for field in WORDS} for case in cases]
    right: Any = _Reader(truths)
    assert judge_accuracy(right, cases, 16) == dict.fromkeys(WORDS, 1.0), "what it does not read does not count"
    always: Any = _Reader([{**words, "shape": "ball"} for words in truths])
    found = judge_accuracy(always, cases, 16)
    assert found["shape"] == statistics.fmean(case.truth.shape == "ball" for case in cases)
    assert 0 < found["shape"] < 1
    assert {found[field] for field in WORDS if field != "shape"} == {1.0}


def test_words_that_no_picture_shows_do_not_count() -> None:
    case = suite.cases(["background"], 1)[0]
    plain = replace(case, truth=replace_scene(case.truth, texture="plain", shape="ball"))
    judge: Any = _Reader([shown(plain.truth) | {"second": "black", "pose": "tilted"}])
    assert set(judge_accuracy(judge, [plain], 16)) == {*WORDS, "place", "company"} - {"second", "pose"}


def replace_scene(scene: Scene, **changed: str) -> Scene:
    return Scene(**{**asdict(scene), **changed})


def test_the_shipped_judge_reads_the_suite() -> None:
    judge = judging.load(embedded_folder() / "judge.safetensors")
    found = judge_accuracy(judge, suite.cases(), 64)
    assert set(found) == set(READ)
    assert min(found.values()) > 0.98


# --- the leaderboard ----------------------------------------------------------------------------------------------------


def results(inversion: str, control: str, scores: dict[str, Sequence[float | None]], **more: Any) -> list[dict[str, Any]]:
    """A row for each score of each task."""
    known = {"kind": "edits", "variant": f"{inversion} + {control}", "inversion": inversion, "control": control, "steps": 25}
    return [
        {**known, "dtype": "float32", "item": f"{task}-{i}", "group": task, "inside": score, **more}
        for task, values in scores.items()
        for i, score in enumerate(values)
    ]


PLAIN = results("ddim", "none", {"shape": [10, 12, 14], "move": [8, 8, 9]}, target=1.0, evaluations=50)
BEST = results("ddim", "masactrl", {"shape": [12, 13, 17], "move": [8, 10, 9]}, target=0.5, evaluations=96)
OTHER = results("easyinv", "none", {"shape": [9, 12, 13], "move": [9, 7, 9]}, target=1.0, evaluations=50)


def by_variant(rows: Sequence[dict[str, Any]], **options: Any) -> dict[str, dict[str, Any]]:
    return {line["variant"]: line for line in leaderboard(rows, **options)}


def test_gains_are_paired_differences_with_their_standard_error() -> None:
    board = by_variant([*PLAIN, *BEST, *OTHER])
    best = board["ddim + masactrl"]
    shape, move = best["tasks"]["shape"], best["tasks"]["move"]
    assert shape == {"n": 3, "gain": 2.0, "error": pytest.approx(sem([2, 1, 3]))}
    assert move == {"n": 3, "gain": pytest.approx(2 / 3), "error": pytest.approx(sem([0, 2, 0]))}
    assert best["gain"] == pytest.approx((2 + 2 / 3) / 2)
    assert best["error"] == pytest.approx(math.sqrt(sem([2, 1, 3]) ** 2 + sem([0, 2, 0]) ** 2) / 2)
    assert best["n"] == 6
    assert (best["target"], best["evaluations"]) == (0.5, 96)
    assert "kept" not in best
    assert (board["ddim + none"]["gain"], board["ddim + none"]["error"]) == (0, 0)


def test_other_inversions_are_compared_with_the_same_plain_sampling() -> None:
    rows = [*PLAIN, *BEST, *OTHER]
    assert by_variant(rows)["easyinv + none"]["tasks"]["shape"]["gain"] == pytest.approx(-2 / 3)
    assert by_variant(rows, reference="easyinv")["ddim + masactrl"]["tasks"]["shape"]["gain"] == pytest.approx(8 / 3)
    names = [line["variant"] for line in leaderboard(rows)]
    assert names == [line["variant"] for line in leaderboard(rows, reference="easyinv")]
    assert names == ["ddim + masactrl", "ddim + none", "easyinv + none"]


def test_wins_are_ranks_with_ties_shared() -> None:
    """Against scipy's average ranks: rank 1 of m beats all, rank m none."""
    rows = [*PLAIN, *BEST, *OTHER]
    board = by_variant(rows)
    for name, own in zip(board, (BEST, PLAIN, OTHER), strict=True):
        shares = {"shape": [], "move": []}  # type: dict[str, list[float]]
        for row in own:
            scores = [r["inside"] for r in rows if r["item"] == row["item"]]
            place = rankdata([-score for score in scores])[scores.index(row["inside"])]
            shares[row["group"]].append((3 - place) / 2)
        assert board[name]["wins"] == pytest.approx(statistics.fmean(map(statistics.fmean, shares.values())))
    assert statistics.fmean(line["wins"] for line in board.values()) == pytest.approx(0.5)


def test_the_order_of_the_results_does_not_matter() -> None:
    rows = [*PLAIN, *BEST, *OTHER]
    mixed = random.Random(0).sample(rows, len(rows))
    assert by_variant(mixed) == by_variant(rows)


def test_equal_gains_share_a_rank_and_the_next_one_is_left_out() -> None:
    tied = results("ddim", "structure", {"shape": [12.001, 13, 17], "move": [8, 10, 9]})
    ranks = [(line["variant"], line["rank"]) for line in leaderboard([*PLAIN, *BEST, *tied, *OTHER])]
    assert ranks == [("ddim + masactrl", 1), ("ddim + structure", 1), ("ddim + none", 3), ("easyinv + none", 4)]
    board = by_variant([*PLAIN, *tied])
    assert board["ddim + structure"]["wins"] == pytest.approx((1 + 2 / 3) / 2), "two of three moves are as good"


@pytest.mark.parametrize("lost", [None, math.nan, math.inf, "error"])
def test_what_is_not_a_number_is_left_out_on_both_sides(lost: Any) -> None:
    bad = [dict(row) for row in BEST]
    bad[0] |= {"error": "the latent is not finite"} if lost == "error" else {"inside": lost}
    board = by_variant([*PLAIN, *bad])
    assert board["ddim + masactrl"]["tasks"]["shape"] == {"n": 2, "gain": 2.0, "error": pytest.approx(sem([1, 3]))}
    assert board["ddim + none"]["tasks"]["shape"]["n"] == 3
    assert board["ddim + none"]["wins"] == pytest.approx((0 + 1 / 3) / 2), "nothing to beat on the lost item"
    turned = by_variant([*BEST, *PLAIN[1:]])
    assert turned["ddim + masactrl"]["tasks"]["shape"] == board["ddim + masactrl"]["tasks"]["shape"]


def test_a_variant_without_one_of_the_tasks_is_not_ranked() -> None:
    part = results("fixed_point", "none", {"shape": [99, 99, 99]}, target=1.0)
    board = leaderboard([*part, *PLAIN, *BEST])
    assert [(line["variant"], line["rank"]) for line in board][-1] == ("fixed_point + none", None)
    assert (board[-1]["gain"], board[-1]["error"], board[-1]["wins"], board[-1]["target"]) == (None, None, None, None)
    assert board[-1]["tasks"]["move"] == {"n": 0, "gain": None, "error": None}
    assert board[-1]["tasks"]["shape"]["gain"] == 87


def test_a_column_that_a_task_never_has_is_averaged_over_the_others() -> None:
    rows = [dict(row) | ({"target": None} if row["group"] == "move" else {}) for row in [*PLAIN, *BEST]]
    assert by_variant(rows)["ddim + masactrl"]["target"] == 0.5


def test_one_case_has_no_error() -> None:
    one = [row for row in [*PLAIN, *BEST] if row["item"] in ("shape-0", "move-1")]
    best = by_variant(one)["ddim + masactrl"]
    assert (best["gain"], best["error"], best["tasks"]["move"]) == (2, None, {"n": 1, "gain": 2.0, "error": None})


def test_steps_and_dtypes_have_references_of_their_own() -> None:
    more = [{**row, "steps": 50, "variant": f"{row['variant']}, T=50"} for row in PLAIN]
    more = [{**row, "inside": row["inside"] + 3} for row in more]
    board = by_variant([*PLAIN, *more])
    assert {line["gain"] for line in board.values()} == {0}
    assert board["ddim + none, T=50"]["wins"] == 1
    lone = by_variant([*PLAIN, *({**row, "dtype": "float16", "variant": "half"} for row in BEST)])
    assert lone["half"]["gain"] is None


def test_an_error_gives_way_to_a_later_result() -> None:
    failed = [{**row, "error": "no"} for row in BEST]
    assert by_variant([*PLAIN, *failed, *BEST]) == by_variant([*PLAIN, *BEST]) == by_variant([*PLAIN, *BEST, *failed])


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        (BEST, {}, r"no results of ddim \+ none to compare with; inversions with control none: none"),
        (OTHER, {}, r"inversions with control none: easyinv"),
        ([*PLAIN, *PLAIN], {}, r"ddim \+ none: has two results of shape-0"),
        ([{**PLAIN[0], "kind": "inversion"}], {}, "a result of kind 'inversion' is none of edits"),
        (PLAIN, {"score": "seconds"}, "score 'seconds' is no column of which more is better"),
        (PLAIN, {"score": "outsides"}, "score 'outsides' is no column"),
    ],
)
def test_what_makes_no_leaderboard_is_refused(rows: list[dict[str, Any]], options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        leaderboard(rows, **options)


def test_another_score_decides_the_order() -> None:
    assert [line["variant"] for line in leaderboard([*PLAIN, *BEST], score="target")] == ["ddim + none", "ddim + masactrl"]


def test_a_leaderboard_is_json() -> None:
    board = leaderboard([*PLAIN, *BEST, *OTHER])
    assert json.loads(json.dumps(board, allow_nan=False)) == board


def test_the_table_says_gain_error_and_a_smaller_n() -> None:
    rows = [*PLAIN, *BEST[1:], *results("easyinv", "odd | one", {"shape": [9, 12, 13]})]
    lines = markdown(leaderboard(rows), {"shape": 0.9876, "pose": 1.0}).splitlines()
    assert lines[0] == "| rank | variant | gain | shape (n = 3) | move (n = 3) | wins | target | evaluations |"
    assert lines[2] == "| 1 | ddim + masactrl | +1.33 ± 0.60 | +2.00 ± 1.00 (2) | +0.67 ± 0.67 | 0.83 | 0.50 | 96 |"
    assert lines[4].startswith("|  | easyinv + odd \\| one |  | -0.67 ± 0.33 |  |")
    assert lines[-1] == "The judge reads rightly off the true results: shape 0.988, pose 1.000."
    assert "judge" not in markdown(leaderboard(rows))


def test_the_grid_is_controls_by_inversions() -> None:
    board = leaderboard([*PLAIN, *BEST, *OTHER])
    assert grid(board).splitlines() == [
        "| control | ddim | easyinv |",
        "|---|---|---|",
        "| masactrl | +1.33 ± 0.44 |  |",
        "| none | +0.00 ± 0.00 | -0.33 ± 0.33 |",
    ]
    twice = [*PLAIN, *({**row, "steps": 50, "variant": "longer"} for row in PLAIN)]
    with pytest.raises(InputError, match="several variants of one inversion and control"):
        grid(leaderboard(twice))
