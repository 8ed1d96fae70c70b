"""Quality against evaluations: which method is the best for what it costs. Drawn by matplotlib, imported when needed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from easyinv_edit.errors import InputError
from easyinv_edit.evaluation.bench_grids import one_line
from easyinv_edit.evaluation.label_places import Box, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 1200, 780, 100
"""Pixels of a plot, and pixels per inch."""
FEW, MORE, HIGHEST = 30, 10, 4000
"""A plot is higher by MORE pixels for each point beyond FEW, and by half where labels find no room, but not above HIGHEST."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart by the colour-blind; in grey the shapes tell them apart."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DOT = 9.0
"""Pixels across a marker."""
LONGEST = 44
"""Letters of a label."""
BETWEEN = 6
"""Pixels from one label to the next on the same line."""
TICKS = (1, 2, 5)
FRONT = "Pareto front, markers full"
LEGEND = 150
"""Letters in a line of the legend."""


@dataclass(frozen=True)
class Point:
    """A variant. label: what stands beside it; series: those that share its marker; cost: evaluations, above 0."""

    label: str
    series: str
    cost: float
    quality: float


@dataclass(frozen=True)
class Plot:
    """points: at least one; ceilings: label and quality of horizontal lines; lower: whether lower numbers are better."""

    points: Sequence[Point]
    ceilings: Mapping[str, float]
    title: str
    cost_title: str
    quality_title: str
    lower: bool = False


def front(points: Sequence[Point], lower: bool = False) -> list[Point]:
    """Those that no other beats: none is as cheap and as good, and one of both more so. Cheapest first; equal ones all stay."""
    sign = -1 if lower else 1
    best, kept = -math.inf, []
    for point in sorted(points, key=lambda p: (p.cost, -sign * p.quality)):
        if sign * point.quality > best:
            best = sign * point.quality
            kept.append(point)
        elif kept and (point.cost, point.quality) == (kept[-1].cost, kept[-1].quality):
            kept.append(point)
    return kept


def draw(plot: Plot) -> Image.Image:
    """The plot as an RGB picture, WIDTH pixels wide. Better is up, whichever way the numbers go.

    Raises InputError where matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise InputError("plots need matplotlib, which is not installed; pip install 'easyinv-edit[plots]'") from error
    with style.context("default"), warnings.catch_warnings():  # nobody's own settings: the same numbers give the same picture
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a box stands for a letter that the font has not
        height = HEIGHT + MORE * max(0, len(plot.points) - FEW)
        figure, whole = figure_of(plot, height)
        while not whole and height < HIGHEST:
            height = min(HIGHEST, height * 3 // 2)
            figure, whole = figure_of(plot, height)
        return _rendered(figure)


def figure_of(plot: Plot, height: int) -> tuple[Figure, bool]:
    """The plot at a height, and whether every label found a place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(_short(plot.title, 110), loc="left", fontsize=12)
    axes.set_xlabel(_short(plot.cost_title, 110))
    axes.set_ylabel(_short(plot.quality_title, 80))
    _set_limits(axes, plot)
    best = front(plot.points, plot.lower)
    _lines(axes, plot, best)
    _markers(axes, plot, best)
    longest = max(len(_short(text, LONGEST)) for text in (FRONT, *(point.series for point in plot.points)))
    figure.legend(loc="outside lower center", ncols=max(1, min(6, LEGEND // (longest + 6))), frameon=False)
    figure.draw_without_rendering()  # gives the axes their final place
    return figure, _labels(axes, plot, best)


def _set_limits(axes: Axes, plot: Plot) -> None:
    """Axes that hold every point and ceiling, with room for labels; numbers of evaluations are written out."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    costs = [point.cost for point in plot.points]
    low, high = min(costs), max(costs)
    room = max(1.3, (high / low) ** 0.08)
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room**2.5)  # labels stand to the right of their points
    axes.xaxis.set_major_locator(FixedLocator(ticks(*axes.get_xlim())))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    heights = [*(point.quality for point in plot.points), *plot.ceilings.values()]
    bottom, top = min(heights), max(heights)
    margin = 0.1 * (top - bottom) or 0.05 * abs(top) or 1.0
    axes.set_ylim(bottom - margin, top + margin)
    if plot.lower:
        axes.invert_yaxis()
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, both above 0: 1, 2 and 5 in every decade, or even steps where these are below three."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [float(step * 10.0**decade) for decade in decades for step in TICKS if low <= step * 10.0**decade <= high]
    if len(found) > 2:
        return found
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (*TICKS, 10) if unit * times >= rough)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _lines(axes: Axes, plot: Plot, best: Sequence[Point]) -> None:
    """The front as steps, up to the right edge: the best there is for so many evaluations or fewer; ceilings dashed."""
    right = axes.get_xlim()[1]
    costs, heights = [*(p.cost for p in best), right], [*(p.quality for p in best), best[-1].quality]
    axes.plot(costs, heights, drawstyle="steps-post", color="black", linewidth=1.2, zorder=2, label=FRONT)
    for value in plot.ceilings.values():
        axes.axhline(value, color="#606060", linewidth=1.0, linestyle=(0, (6, 4)), zorder=1)


def _markers(axes: Axes, plot: Plot, best: Sequence[Point]) -> None:
    """A colour and a shape per series, full on the front and hollow elsewhere."""
    for number, series in enumerate(dict.fromkeys(point.series for point in plot.points)):
        colour, shape = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        own = [point for point in plot.points if point.series == series]
        for full in (False, True):
            shown = [point for point in own if (point in best) is full]
            axes.plot(
                [point.cost for point in shown],
                [point.quality for point in shown],
                linestyle="none",
                marker=shape,
                markersize=DOT * 72 / DPI,
                markeredgecolor=colour,
                markerfacecolor=colour if full else "none",
                markeredgewidth=1.5,
                zorder=4 if full else 3,
            )
        if series:
            axes.plot([], [], linestyle="none", marker=shape, color=colour, label=_short(series, LONGEST))


# --- labels -------------------------------------------------------------------------------------------------------------


def _labels(axes: Axes, plot: Plot, best: Sequence[Point]) -> bool:
    """Write every label where it covers no other, no marker and, if it need not go far for it, no line; whether all have found
    a place. Ceilings choose first, then the front, then from the best to the worst."""
    sign = -1 if plot.lower else 1
    ordered = [*best, *sorted((p for p in plot.points if p not in best), key=lambda p: (-sign * p.quality, p.cost))]
    left, ends = axes.get_xlim()[0], [_pixels(axes, point.cost, point.quality) for point in ordered]
    starts = [_pixels(axes, left, value) for value in plot.ceilings.values()]
    texts = [
        axes.text(left, 0, _short(text, LONGEST), fontsize=8.5, va="bottom")
        for text in (*plot.ceilings, *(p.label for p in ordered))
    ]
    sizes = [(box.width + BETWEEN, box.height) for box in (text.get_window_extent() for text in texts)]
    dots = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in ends]
    found = place([*starts, *ends], sizes, _area(axes), dots, _line_boxes(axes, plot, best))
    for text, box in zip(texts, found, strict=True):
        text.set_visible(box is not None)
        if box is not None:
            x, y = axes.transData.inverted().transform((box[0] + BETWEEN / 2, box[1]))
            text.set_position((x, y))
    for end, box in zip(ends, found[len(starts) :], strict=True):
        if box is not None:
            _leader(axes, end, box)
    return None not in found


def _pixels(axes: Axes, cost: float, quality: float) -> tuple[float, float]:
    """Where numbers are drawn."""
    x, y = axes.transData.transform((cost, quality))
    return float(x), float(y)


def _area(axes: Axes) -> Box:
    """What the axes enclose."""
    left, bottom, right, top = map(float, axes.bbox.extents)
    return left, bottom, right, top


def _line_boxes(axes: Axes, plot: Plot, best: Sequence[Point]) -> list[Box]:
    """What the ceilings and the front's steps cover."""
    left, _, right, _ = _area(axes)
    heights = [_pixels(axes, axes.get_xlim()[0], value)[1] for value in plot.ceilings.values()]
    boxes = [(left, height, right, height) for height in heights]
    corners = [_pixels(axes, point.cost, point.quality) for point in best]
    for (x, y), (after, above) in zip(corners, [*corners[1:], (right, corners[-1][1])], strict=True):
        boxes += [(x, y, after, y), (after, min(y, above), after, max(y, above))]
    return boxes


def _leader(axes: Axes, point: tuple[float, float], box: Box) -> None:
    """A thin line from a point to its label where they are not side by side."""
    near = min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])
    if math.dist(point, near) > 1.5 * DOT:
        ends = axes.transData.inverted().transform([point, near])
        axes.plot(ends[:, 0], ends[:, 1], color="#909090", linewidth=0.7, zorder=1.5)


def _short(text: str, most: int) -> str:
    """The text on one line of at most `most` letters; no dollar begins a formula."""
    line = one_line(text)
    return (line if len(line) <= most else line[: most - 1].rstrip() + "…").replace("$", r"\$")


def _rendered(figure: Any) -> Image.Image:
    figure.canvas.draw()
    return Image.frombytes("RGBA", figure.canvas.get_width_height(), bytes(figure.canvas.buffer_rgba())).convert(
        "RGB"
    )  # opaque: what is white stays white
