"""Quality against evaluations: the front against a brute-force one, labels that overlap nothing, and what a plot holds."""

from __future__ import annotations

import random

import pytest

from easyinv_edit.evaluation import pareto
from easyinv_edit.evaluation.label_places import DETOUR, NEAREST, Box, overlap, place
from easyinv_edit.evaluation.pareto import Plot, Point, figure_of, front, ticks


def points(seed: int, count: int) -> list[Point]:
    """Few different values, so that many are equal in one of the two or in both."""
    draws = random.Random(seed)
    return [Point(str(i), "", draws.choice((10, 20, 20, 50)), draws.randint(0, 6) / 2) for i in range(count)]


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nobody_beats(seed: int, lower: bool) -> None:
    def beats(a: Point, b: Point) -> bool:
        better = a.quality <= b.quality if lower else a.quality >= b.quality
        return a.cost <= b.cost and better and (a.cost, a.quality) != (b.cost, b.quality)

    given = points(seed, 1 + seed)
    expected = {p.label for p in given if not any(beats(other, p) for other in given)}
    found = front(given, lower)
    assert {p.label for p in found} == expected
    assert [p.cost for p in found] == sorted(p.cost for p in found)


def crowd(count: int) -> tuple[list[tuple[float, float]], list[tuple[float, float]], list[Box]]:
    draws = random.Random(1)
    anchors = [(draws.uniform(300, 700), draws.uniform(300, 500)) for _ in range(count)]
    sizes = [(draws.uniform(30, 120), 14.0) for _ in range(count)]
    return anchors, sizes, [(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]


def test_labels_overlap_neither_each_other_nor_what_is_solid() -> None:
    anchors, sizes, solid = crowd(60)
    area = (0.0, 0.0, 1000.0, 800.0)
    found = [box for box in place(anchors, sizes, area, solid) if box is not None]
    assert len(found) == 60
    for number, box in enumerate(found):
        assert (box[2] - box[0], box[3] - box[1]) == pytest.approx(sizes[number])
        assert min(box) >= 0
        assert box[2] <= area[2]
        assert box[3] <= area[3]
        assert not any(overlap(box, other) for other in (*solid, *found[:number]))


def test_a_label_stands_right_of_its_point_where_it_can_and_nowhere_where_it_cannot() -> None:
    (alone,) = place([(100, 100)], [(40, 10)], (0, 0, 300, 200), [])
    assert alone == pytest.approx((100 + NEAREST, 95, 140 + NEAREST, 105))
    (at_the_edge,) = place([(100, 100)], [(40, 10)], (0, 0, 110, 200), [])
    assert at_the_edge is not None
    assert at_the_edge[2] <= 110
    assert place([(10, 10)], [(40, 10)], (0, 0, 20, 20), []) == [None]
    assert place([(100, 100)], [(40, 10)], (0, 0, 300, 200), [(0, 0, 300, 200)]) == [None]


def test_a_label_goes_out_of_a_lines_way_but_not_far() -> None:
    area = (0.0, 0.0, 1000.0, 1000.0)
    thin = (0.0, 500.0, 1000.0, 500.0)
    (beside,) = place([(500, 500)], [(40, 10)], area, [], [thin])
    assert beside is not None
    assert not overlap(beside, thin)
    broad = (0.0, 500.0 - 2 * DETOUR, 1000.0, 500.0 + 2 * DETOUR)
    (on_it,) = place([(500, 500)], [(40, 10)], area, [], [broad])
    assert on_it == pytest.approx((500 + NEAREST, 495, 540 + NEAREST, 505))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (8, 600, [10, 20, 50, 100, 200, 500]),
        (0.9, 11, [1, 2, 5, 10]),
        (30, 240, [50, 100, 200]),
        (70, 95, [70, 75, 80, 85, 90, 95]),
        (100, 101, [100, 100.2, 100.4, 100.6, 100.8, 101]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


PLOT = Plot(
    [
        Point("ddim", "T=10", 10, 20),
        Point("easyinv", "T=10", 10, 19),
        Point("renoise", "T=20", 60, 24),
        Point("slow", "T=20", 90, 23),
    ],
    {"autoencoder alone: 26.00": 26.0},
    "title",
    "evaluations",
    "PSNR",
)


def test_a_plot_draws_the_front_as_steps_and_the_ceiling_as_a_line() -> None:
    figure, whole = figure_of(PLOT, 780)
    axes = figure.axes[0]
    assert whole
    assert axes.get_xscale() == "log"
    (steps,) = [own for own in axes.lines if own.get_drawstyle() == "steps-post"]
    assert [list(map(float, each)) for each in (steps.get_xdata(), steps.get_ydata())] == [
        [10, 60, axes.get_xlim()[1]],
        [20, 24, 24],
    ]
    dashed = [own for own in axes.lines if own.is_dashed()]
    assert [list(own.get_ydata()) for own in dashed] == [[26.0, 26.0]]
    assert axes.get_ylim()[0] < 19 < 26 < axes.get_ylim()[1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [pareto.FRONT, "T=10", "T=20"]


def test_only_markers_on_the_front_are_full_and_series_differ_in_colour_and_shape() -> None:
    axes = figure_of(PLOT, 780)[0].axes[0]
    dots = [own for own in axes.lines if own.get_marker() != "None" and len(own.get_xdata())]
    full = {float(x) for own in dots if own.get_markerfacecolor() != "none" for x in own.get_xdata()}
    hollow = {float(y) for own in dots if own.get_markerfacecolor() == "none" for y in own.get_ydata()}
    assert (full, hollow) == ({10, 60}, {19, 23})
    looks = {(own.get_marker(), own.get_markeredgecolor()) for own in dots}
    assert len(looks) == len({marker for marker, _ in looks}) == len({colour for _, colour in looks}) == 2


def test_every_point_has_its_label_and_no_two_overlap() -> None:
    draws = random.Random(2)
    crowded = [
        Point(f"method {i}, setting={i}", f"s{i % 4}", draws.choice((40, 76, 80)), draws.uniform(10, 14)) for i in range(50)
    ]
    plot = Plot(crowded, {"ceiling: 15.00": 15.0, "ceiling, float16: 14.99": 14.99}, "", "", "")
    figure, whole = figure_of(plot, 900)
    texts = [text for text in figure.axes[0].texts if text.get_visible()]
    assert whole
    assert sorted(text.get_text() for text in texts) == sorted([*plot.ceilings, *(point.label for point in crowded)])
    boxes = [tuple(text.get_window_extent().extents) for text in texts]
    assert not any(overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    corners = figure.axes[0].bbox.extents
    assert all(corners[0] <= b[0] and corners[1] <= b[1] and b[2] <= corners[2] and b[3] <= corners[3] for b in boxes)


def test_where_labels_find_no_room_the_plot_becomes_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    plot = Plot([Point(f"a label of some length {i}", "", 50, i) for i in range(pareto.FEW)], {}, "", "", "")
    assert pareto.draw(plot).size == (pareto.WIDTH, pareto.HEIGHT)
    monkeypatch.setattr(pareto, "HEIGHT", 240)
    assert not figure_of(plot, 240)[1]
    assert pareto.draw(plot).height in (360, 540)


def test_lower_numbers_that_are_better_stand_higher() -> None:
    axes = figure_of(Plot(PLOT.points, {}, "", "", "", lower=True), 780)[0].axes[0]
    bottom, top = axes.get_ylim()
    assert bottom > 24 > 19 > top
