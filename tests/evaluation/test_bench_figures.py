"""The figures of a benchmark run: which there are, what they show, and what becomes of folders that are not whole."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from easyinv_edit.errors import EasyInvWarning, InputError
from easyinv_edit.evaluation import pareto
from easyinv_edit.evaluation.bench_figures import LEVEL, MOST_ROWS, draw, plot_of
from easyinv_edit.evaluation.bench_grids import APART, GAP, NOTHING
from easyinv_edit.evaluation.pareto import Point, front
from easyinv_edit.evaluation.run_folder import read
from tests.evaluation.bench_folder import (
    CELL,
    COLUMNS,
    WHITE,
    Folder,
    cell,
    line,
    magnified,
    names,
    noise,
    pixels,
    sheet,
    table,
)


@pytest.fixture
def inversions(tmp_path: Path) -> Folder:
    """Two items, one of them white, under a ceiling and two methods."""
    folder = Folder(tmp_path / "run")
    for item, group in (("a", ""), ("b", WHITE)):
        folder.add(item, "autoencoder alone", group=group)
        for name in ("ddim", "easyinv"):
            folder.add(item, name, ("source", "result", LEVEL, "guided"), group, inversion=name)
    return folder


# --- a run's grids ------------------------------------------------------------------------------------------------------


def test_inversions_have_the_source_on_top_and_a_row_per_variant_in_the_tables_order(inversions: Folder) -> None:
    order = ["autoencoder alone", "easyinv", "ddim"]
    folder = inversions.write([table(*(line(name, None, None) for name in order))])
    assert names(draw(folder)) == ["grid.png", "grid-white.png", "grid-guided.png", "grid-guided-white.png", "latents.png"]
    made = sheet(folder)
    for c, item in enumerate("ab"):
        assert (pixels(cell(made, 1 - c, 3, (0, 1))) == magnified(inversions.picture(item, "", "source"))).all()
        for r, name in enumerate(order):
            assert (pixels(cell(made, 1 - c, 2 - r)) == magnified(inversions.picture(item, name))).all()


def test_the_white_grid_holds_the_white_items_only(inversions: Folder) -> None:
    folder = inversions.write()
    draw(folder)
    whole, white = sheet(folder), sheet(folder, "grid-white")
    assert white.width < whole.width - CELL[0] // 2
    assert (pixels(cell(white, 0, 2)) == magnified(inversions.picture("b", "autoencoder alone"))).all()


@pytest.mark.parametrize(("groups", "expected"), [(("", ""), "grid.png"), ((WHITE, WHITE), "grid-white.png")])
def test_a_grid_of_a_group_does_not_repeat_that_of_all(tmp_path: Path, groups: tuple[str, str], expected: str) -> None:
    folder = Folder(tmp_path)
    for item, group in zip("ab", groups, strict=True):
        folder.add(item, "ddim", group=group)
    assert names(draw(folder.write())) == [expected]


def test_guided_grids_hold_the_guided_pictures_of_those_that_have_some(inversions: Folder) -> None:
    folder = inversions.write()
    draw(folder)
    made = sheet(folder, "grid-guided")
    assert (pixels(cell(made, 0, 0)) == magnified(inversions.picture("b", "easyinv", "guided"))).all()
    assert (pixels(cell(made, 0, 2, (0, 1))) == magnified(inversions.picture("b", "", "source"))).all()


def test_latents_show_source_middle_level_and_result_side_by_side(inversions: Folder) -> None:
    folder = inversions.write()
    draw(folder)
    made = sheet(folder, "latents")
    for c, (item, key) in enumerate((i, k) for i in "ab" for k in ("source", LEVEL, "result")):
        for r, name in enumerate(("ddim", "easyinv")):
            found = cell(made, 5 - c, 1 - r, (int(c < 3), 0))
            assert (pixels(found) == magnified(inversions.picture(item, name, key))).all()


def edits(
    place: Path, methods: Sequence[str], controls: Sequence[str], items: Sequence[str] = ("a", "b"), **facts: Any
) -> Folder:
    folder = Folder(place, "edits")
    for item in items:
        for method in methods:
            for control in controls:
                parts = {"inversion": method, "control": control, "prompt": f"a {item}", **facts}
                folder.add(item, f"{method} + {control}", ("source", "result", "truth"), "shape", **parts)
    return folder


def test_edits_have_the_truth_below_the_source_and_one_control_after_the_other(tmp_path: Path) -> None:
    made = edits(tmp_path, ("ddim", "easyinv"), ("none", "masactrl"))
    assert names(draw(made.write())) == ["grid-shape.png"]
    grid = sheet(tmp_path, "grid-shape")
    order = ["ddim + none", "easyinv + none", "ddim + masactrl", "easyinv + masactrl"]
    for c, item in enumerate("ab"):
        for r, name in enumerate(order):
            assert (pixels(cell(grid, 1 - c, 3 - r, (0, int(r < 2)))) == magnified(made.picture(item, name))).all()
        assert (pixels(cell(grid, 1 - c, 4, (0, 2))) == magnified(made.picture(item, "", "truth"))).all()
        assert (pixels(cell(grid, 1 - c, 5, (0, 2))) == magnified(made.picture(item, "", "source"))).all()


CONTROLS = ("masactrl", "structure", "none", *(f"control {i}" for i in range(6)))


def test_too_many_edits_for_a_page_have_one_per_inversion_with_plain_sampling_and_every_control(tmp_path: Path) -> None:
    """Two inversions under nine controls: source, truth, none, then the eight others."""
    made = edits(tmp_path, ("ddim", "easyinv"), CONTROLS, ["a"])
    found = names(draw(made.write()))
    assert found[:2] == ["grid-shape-ddim.png", "grid-shape-easyinv.png"]
    for method in ("ddim", "easyinv"):
        grid = sheet(tmp_path, f"grid-shape-{method}")
        order = ["none", *(control for control in CONTROLS if control != "none")]
        for r, control in enumerate(order):
            assert (pixels(cell(grid, 0, 8 - r)) == magnified(made.picture("a", f"{method} + {control}"))).all()
        assert (pixels(cell(grid, 0, 9, (0, 1))) == magnified(made.picture("a", "", "truth"))).all()
        assert (pixels(cell(grid, 0, 10, (0, 1))) == magnified(made.picture("a", "", "source"))).all()


def test_too_many_edits_for_a_page_have_one_per_control_with_every_inversion(tmp_path: Path) -> None:
    made = edits(tmp_path, ("ddim", "easyinv"), CONTROLS, ["a"])
    found = names(draw(made.write()))
    assert found[2:] == [f"grid-shape-{control.replace(' ', '-')}.png" for control in CONTROLS]
    grid = sheet(tmp_path, "grid-shape-masactrl")
    for r, method in enumerate(("ddim", "easyinv")):
        assert (pixels(cell(grid, 0, 1 - r)) == magnified(made.picture("a", f"{method} + masactrl"))).all()


def test_one_inversion_under_many_controls_has_no_pages_of_one_row(tmp_path: Path) -> None:
    made = edits(tmp_path, ["ddim"], [f"control {i}" for i in range(MOST_ROWS + 1)], ["a"])
    assert names(draw(made.write())) == ["grid-shape-ddim-1.png", "grid-shape-ddim-2.png"]


def test_too_many_rows_for_a_page_are_cut_evenly(tmp_path: Path) -> None:
    methods = [f"method {i}" for i in range(MOST_ROWS + 1)]
    made = edits(tmp_path, methods, ("masactrl", "none"), ["a"])
    found = names(draw(made.write()))
    assert found[:-4] == [f"grid-shape-method-{i}.png" for i in range(MOST_ROWS + 1)]
    assert found[-4:] == [f"grid-shape-{control}-{i}.png" for control in ("masactrl", "none") for i in (1, 2)]
    first, second = sheet(tmp_path, "grid-shape-masactrl-1"), sheet(tmp_path, "grid-shape-masactrl-2")
    assert second.height - first.height == CELL[1] + GAP
    assert (pixels(cell(first, 0, 0)) == magnified(made.picture("a", "method 7 + masactrl"))).all()
    assert (pixels(cell(second, 0, 8)) == magnified(made.picture("a", "method 8 + masactrl"))).all()


def test_columns_tell_the_prompts_of_edits(tmp_path: Path) -> None:
    draw(edits(tmp_path / "one", ["ddim"], ["none"]).write())
    draw(edits(tmp_path / "two", ["ddim"], ["none"], prompt="another").write())
    one, two = sheet(tmp_path / "one", "grid-shape"), sheet(tmp_path / "two", "grid-shape")
    assert one.size == two.size
    below = one.height - 3 * (CELL[1] + GAP) - APART
    assert (pixels(one)[:below] != pixels(two)[:below]).any()
    assert (pixels(one)[below:] == pixels(two)[below:]).all()


def test_no_more_items_are_shown_than_asked_for(inversions: Folder) -> None:
    folder = inversions.write()
    draw(folder, items=1)
    assert (pixels(cell(sheet(folder), 0, 0)) == magnified(inversions.picture("a", "easyinv"))).all()
    with pytest.raises(InputError, match="items=0"):
        draw(folder, items=0)


# --- what is missing ----------------------------------------------------------------------------------------------------


def test_an_empty_folder_has_no_figures(tmp_path: Path) -> None:
    assert draw(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_results_without_pictures_or_a_summary_are_drawn_as_far_as_they_go(inversions: Folder) -> None:
    inversions.add("c", "ddim", ())
    folder = inversions.write()
    (folder / "summary.json").write_text("{torn")
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"item": "d", "vari')
    assert "grid.png" in names(draw(folder))
    assert (pixels(cell(sheet(folder), 1, 0)) == magnified(inversions.picture("a", "easyinv"))).all()
    assert (pixels(cell(sheet(folder), 0, 0)) == magnified(inversions.picture("b", "easyinv"))).all()


def test_a_picture_that_is_gone_is_a_grey_cell_and_without_any_there_is_no_grid(inversions: Folder) -> None:
    folder = inversions.write()
    (folder / inversions.rows[0]["pictures"]["result"]).unlink()
    (folder / inversions.rows[3]["pictures"]["result"]).write_bytes(b"no picture")
    draw(folder)
    grey = tuple(int(NOTHING[i : i + 2], 16) for i in (1, 3, 5))
    assert [tuple(pixels(cell(sheet(folder), c, 2))[0, 0]) for c in (0, 1)] == [grey, grey]
    shutil.rmtree(folder / "pictures")
    shutil.rmtree(folder / "figures")
    assert draw(folder) == []


def test_a_variant_that_failed_keeps_its_row(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.add("a", "ddim")
    before = draw(folder.write())
    height = sheet(tmp_path).height
    folder.add("a", "renoise", (), error="not finite")
    assert draw(folder.write()) == before
    assert sheet(tmp_path).height == height + CELL[1] + GAP


def test_pictures_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    folder.add("a", "ddim")
    folder.add("a", "easyinv")
    noise(99).save(tmp_path / "secret.png")
    for path in ("../secret.png", str(tmp_path / "secret.png")):
        folder.rows[1]["pictures"]["result"] = path
        draw(folder.write())
        assert not (pixels(cell(sheet(folder.place), 0, 0)) == magnified(noise(99))).all()


@pytest.mark.parametrize(
    "name", ["Жук + 日本 🎉", "a/b\\c:d", "x" * 300, "$\\frac{1}$ & %", "line\nbreak", "..", "字" * 200, "\ud800"]
)
def test_odd_names_of_items_groups_and_variants_are_drawn(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path / "run", "edits")
    for variant in (name, f"{name} + other"):
        folder.add(name, variant, group=name, inversion=name, control="other", prompt=name)
    rows = [line(name, 20.0, 10), line(f"{name} + other", 22.0, 20)]
    made = draw(folder.write([table(*rows, group=name)]))
    assert len(made) == 2
    assert all(file.parent == tmp_path / "run" / "figures" and file.is_file() for file in made)
    assert sorted(made) == sorted((tmp_path / "run" / "figures").iterdir())


def test_groups_whose_names_differ_only_in_signs_or_case_have_figures_of_their_own(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "edits")
    for group in ("a b", "a/b", "A b"):
        folder.add(group, "x", group=group)
    assert names(draw(folder.write())) == ["grid-a-b.png", "grid-a-b-2.png", "grid-A-b-3.png"]


def test_where_figures_cannot_be_written_one_line_says_so(inversions: Folder) -> None:
    folder = inversions.write()
    (folder / "figures").write_text("a file")
    with pytest.raises(InputError, match="cannot be written") as error:
        draw(folder)
    assert "\n" not in str(error.value)


# --- which numbers are plotted ------------------------------------------------------------------------------------------


def plotted(
    place: Path, rows: Sequence[dict[str, Any]], columns: Sequence[dict[str, Any]] = COLUMNS, kind: str = "inversion"
) -> Any:
    folder = Folder(place, kind)
    for row in rows:
        facts = {"inversion": row["variant"].split(",")[0].split(" + ")[0], "control": row["variant"].rpartition(" + ")[2]}
        folder.add("a", row["variant"], (), **facts)
    run = read(folder.write([table(*rows)], columns))
    return plot_of(run, run.tables[0])


def test_rows_with_both_numbers_are_points_and_the_autoencoder_is_the_ceiling(tmp_path: Path) -> None:
    rows = [line("autoencoder alone", 30.123, None), line("ddim, T=10", 20.0, 10), line("easyinv, T=20", 21.0, 20)]
    rows += [line("null", None, 10), line("uncounted", 22.0, None), line("infinite", float("inf"), 10)]
    found = plotted(tmp_path, rows)
    assert found.points == [Point("ddim", "T=10", 10, 20.0), Point("easyinv", "T=20", 20, 21.0)]
    assert found.ceilings == {"autoencoder alone: 30.12": 30.12}
    assert "dB" in found.quality_title


def test_a_difference_that_the_table_does_not_show_puts_nothing_on_the_front(tmp_path: Path) -> None:
    found = plotted(tmp_path, [line("cheap", 20.001, 10), line("dear", 20.004, 90)])
    assert [point.label for point in front(found.points)] == ["cheap"]


def test_an_edit_costs_its_inversion_too_and_is_marked_by_its_control(tmp_path: Path) -> None:
    columns = [{"name": "inside", "unit": "dB", "better": "higher", "digits": 2}, *COLUMNS[1:]]
    columns += [{"name": "inversion evaluations", "unit": "", "better": "lower", "digits": 0}]
    rows = [
        {"variant": f"ddim + {c}", "inside": 9.0, "evaluations": 76, "inversion evaluations": 25} for c in ("none", "masactrl")
    ]
    rows.append({"variant": "half counted + none", "inside": 9.0, "evaluations": 76, "inversion evaluations": None})
    found = plotted(tmp_path, rows, columns, "edits")
    assert found.points == [Point("ddim", "none", 101, 9.0), Point("ddim", "masactrl", 101, 9.0)]
    assert "inverting + editing" in found.cost_title


def test_the_first_usual_column_is_plotted_else_any_that_says_what_is_better(tmp_path: Path) -> None:
    def column(name: str, better: str | None) -> dict[str, Any]:
        return {"name": name, "unit": "", "better": better, "digits": 3}

    columns = [
        column("evaluations", "lower"),
        column("seconds", "lower"),
        column("noise", None),
        column("LPIPS (vgg)", "lower"),
    ]
    rows = [{"variant": v, "evaluations": 10, "seconds": 1.0, "noise": 1.0, "LPIPS (vgg)": 0.25, "PSNR": 20.0} for v in "ab"]
    fallback = plotted(tmp_path / "lpips", rows, columns)
    assert (fallback.lower, [p.quality for p in fallback.points]) == (True, [0.25, 0.25])
    usual = plotted(tmp_path / "psnr", rows, [*columns, column("PSNR", "higher")])
    assert (usual.lower, [p.quality for p in usual.points]) == (False, [20.0, 20.0])


@pytest.mark.parametrize(
    "rows",
    [
        [line("only one", 20.0, 10)],
        [line("a", None, 10), line("b", None, 20)],
        [line("a", 20.0, None), line("b", 21.0, None)],
        [],
    ],
)
def test_there_is_no_plot_of_fewer_than_two_points(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert plotted(tmp_path, rows) is None


def test_a_plot_per_table(inversions: Folder) -> None:
    rows = [line("ddim", 20.0, 10), line("easyinv", 21.0, 10)]
    folder = inversions.write([table(*rows), table(*rows, group=WHITE), table(rows[0], group="single")])
    assert [name for name in names(draw(folder)) if "pareto" in name] == ["pareto.png", "pareto-white.png"]
    assert sheet(folder, "pareto").size == (pareto.WIDTH, pareto.HEIGHT)


# --- files --------------------------------------------------------------------------------------------------------------


def test_the_same_folder_gives_the_same_bytes_whatever_the_users_settings_are(inversions: Folder, tmp_path: Path) -> None:
    import matplotlib as mpl

    folder = inversions.write([table(line("ddim", 20.0, 10), line("easyinv", 21.0, 20))])
    shutil.copytree(folder, tmp_path / "again")
    once = {file.name: file.read_bytes() for file in draw(folder)}
    with mpl.rc_context({"font.size": 20, "axes.grid": False, "figure.facecolor": "black"}):
        twice = {file.name: file.read_bytes() for file in draw(tmp_path / "again")}
        assert mpl.rcParams["font.size"] == 20
    assert "pareto.png" in once
    assert once == twice
    assert not [file for file in folder.rglob("*") if "partial" in file.name]


def test_without_matplotlib_a_warning_says_how_to_get_it_and_the_rest_is_drawn(
    inversions: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = inversions.write([table(line("ddim", 20.0, 10), line("easyinv", 21.0, 20))])
    whole = names(draw(folder))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(EasyInvWarning, match=r"pip install 'easyinv-edit\[plots\]'"):
        rest = names(draw(folder))
    assert [*rest, "pareto.png"] == whole
    assert (pixels(cell(sheet(folder), 0, 0)) == magnified(inversions.picture("b", "autoencoder alone"))).all()


def test_without_matplotlib_nothing_is_said_where_there_is_nothing_to_plot(
    inversions: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "grid.png" in names(draw(inversions.write()))  # a warning would be an error
