"""The leaderboard of a report, as leaderboard.json tells of it: the ranking, and gains as a grid of controls by inversions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from easyinv_edit.evaluation.leaderboard import MEANS, told
from easyinv_edit.evaluation.report_files import dicts_of, number_of
from easyinv_edit.evaluation.report_page import Board, Cell, Column, Line, Row, Table
from easyinv_edit.evaluation.report_tables import cells_of, ranked_of

GAIN = Column("gain", "dB", "higher", 2)


def board_of(content: Row, columns: Sequence[Column]) -> Board | None:
    """The leaderboard of a run, None where it has none. columns: of the run's tables, which describe what is averaged."""
    rows = dicts_of(content.get("rows"))
    if not rows:
        return None
    judged = {name: share for name, given in _mapping(content, "judged").items() if (share := number_of(given)) is not None}
    texts = (str(content.get("title") or ""), "± is the standard error of a gain.", told(judged) if judged else "")
    return Board(tuple(text for text in texts if text), (_ranking(rows, columns), _grid(rows)))


def _mapping(row: Row, key: str) -> Row:
    """What a key holds where that is a mapping, else nothing."""
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def _ranking(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Every variant: its rank, its gain over all tasks and in each, and its means."""
    known = {column.name: column for column in columns}
    means = [known.get(name, Column(name)) for name in MEANS if any(name in row for row in rows)]
    means = [Column("wins", "", "higher", 2), *means]
    tasks = list(dict.fromkeys(task for row in rows for task in _mapping(row, "tasks")))
    most = {task: max(_count(_mapping(row, "tasks"), task) for row in rows) for task in tasks}
    lines = []
    for row in rows:
        parts = _mapping(row, "tasks")
        gains = [_gain(_mapping(parts, task), most[task]) for task in tasks]
        cells = (*cells_of(row, [Column("rank", digits=0)]), _gain(row), *gains, *cells_of(row, means))
        lines.append(Line(str(row.get("variant", "")), cells))
    heads = [replace(GAIN, name=f"{task} (n = {most[task]})") for task in tasks]
    return ranked_of("Ranking by gain", (Column("rank", digits=0), GAIN, *heads, *means), lines)


def _count(parts: Row, task: str) -> int:
    return int(number_of(_mapping(parts, task).get("n")) or 0)


def _gain(part: Row, most: int | None = None) -> Cell:
    """A gain with its error, and how many items it is of where these are not `most`."""
    gain, error = number_of(part.get("gain")), number_of(part.get("error"))
    if gain is None:
        return Cell("")
    number = number_of(part.get("n"))
    fewer = None if most is None or number is None or number == most else int(number)
    return Cell(f"{gain:+.2f}" + ("" if error is None else f" ± {error:.2f}"), gain, fewer)


def _grid(rows: Sequence[Row]) -> Table:
    """Gains over all tasks, a line for each control."""
    cells = {(str(row.get("control")), str(row.get("inversion"))): _gain(row) for row in rows}
    controls, inversions = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    lines = [Line(control, tuple(cells.get((control, name), Cell("")) for name in inversions)) for control in controls]
    heads = [replace(GAIN, name=name) for name in inversions]
    return replace(ranked_of("Gain by control and inversion", heads, lines), head="control")
