"""The leaderboard over edits with a rendered right answer: every inversion under every controller, paired over cases."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from easyinv_edit.errors import InputError
from easyinv_edit.evaluation.columns import COLUMNS, plain_name
from easyinv_edit.evaluation.markdown import table
from easyinv_edit.evaluation.variants import BASELINE

Row = Mapping[str, Any]

MEANS = ("target", "kept", "inversion evaluations", "evaluations", "inversion seconds", "seconds")
"""Columns that are only averaged, as far as the results have them."""


def leaderboard(rows: Iterable[Row], *, score: str = "inside", reference: str = "ddim") -> list[dict[str, Any]]:
    """Every variant (an inversion under a control) against plain sampling after ONE inversion, the best first.

    rows: results of a benchmark of edits, as its results.jsonl holds them; score: a column of which more is better; reference:
    the inversion whose results without control, of the same T and dtype, all others are compared with.

    On item i of a task d[i] = score of the variant - score of the reference, over the n items that have both, finite; gain =
    mean(d), error = stdev(d) / sqrt(n), the standard error of a paired difference (None for n = 1). Over K tasks gain is the
    mean of theirs and error = sqrt(sum of squared errors) / K, which takes the tasks' scenes for different ones, as the
    suite's are. wins: on each item the share of the other variants that this one beats, ties counting half; averaged like the
    other columns over each task and then over the tasks, so that every task has the same weight. What a task is missing for
    is None. rank: by gain, the same for equal ones; scores and gains are compared to the digits that tables show.

    A line holds variant, inversion, control, steps, dtype, rank, n, gain, error, wins, means, and tasks: {n, gain, error} each.
    Raises InputError where the score is no such column, the reference was not measured or a result is there twice.
    """
    if (column := COLUMNS.get(plain_name(score))) is None or column.better != "higher":
        raise InputError(f"score {score!r} is no column of which more is better; take inside, outside, target or kept")
    found = _results(rows)
    plain = {
        _setting(row): value
        for row in found
        if (row["control"], row["inversion"]) == (BASELINE, reference) and (value := _number(row, score)) is not None
    }
    if not plain:
        there = ", ".join(dict.fromkeys(row["inversion"] for row in found if row["control"] == BASELINE)) or "none"
        raise InputError(f"no results of {reference} + {BASELINE} to compare with; inversions with control {BASELINE}: {there}")
    wins = _wins(found, score, column.digits)
    full = [{**row, "wins": wins.get(_key(row))} for row in found]
    full = [{**row, "gain": _less(_number(row, score), plain.get(_setting(row)))} for row in full]
    tasks = {name: _tasks_with(full, name) for name in ("gain", "wins", *MEANS)}
    by_variant: dict[str, list[Row]] = defaultdict(list)
    for row in full:
        by_variant[row["variant"]].append(row)
    return _ranked([_line(own, tasks) for own in by_variant.values()], column.digits)


def _key(row: Row) -> tuple[str, str]:
    return row["variant"], row["item"]


def _setting(row: Row) -> tuple[Any, ...]:
    """What a result and the one it is compared with must share."""
    return tuple(row.get(key) for key in ("item", "steps", "dtype"))


def _results(rows: Iterable[Row]) -> list[Row]:
    """One result of every item in every variant; an error stands only where nothing else came of it."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.get("kind") != "edits":
            raise InputError(f"a result of kind {row.get('kind')!r} is none of edits; take those of `bench edits`")
        known = found.get(_key(row))
        if known is not None and "error" not in known and "error" not in row:
            raise InputError(f"{row['variant']}: has two results of {row['item']}; give those of one run")
        if known is None or "error" in known:
            found[_key(row)] = row
    return list(found.values())


def _number(row: Row, column: str) -> float | None:
    """A finite number, else None."""
    value = None if "error" in row else row.get(column)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _less(own: float | None, base: float | None) -> float | None:
    return None if own is None or base is None else own - base


def _wins(rows: Iterable[Row], score: str, digits: int) -> dict[tuple[str, str], float]:
    """Of every result with a score, the share of the other variants' results of the item that it beats."""
    by_item: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if (value := _number(row, score)) is not None:
            by_item[row["item"]][row["variant"]] = round(value, digits)
    return {
        (variant, item): sum((own > other) + (own == other) / 2 for name, other in scores.items() if name != variant)
        / (len(scores) - 1)
        for item, scores in by_item.items()
        for variant, own in scores.items()
        if len(scores) > 1
    }


def _tasks_with(rows: Sequence[Row], column: str) -> list[str]:
    """The tasks that anything is known of in a column."""
    return list(dict.fromkeys(row["group"] for row in rows if _number(row, column) is not None))


def _values(rows: Iterable[Row], task: str, column: str) -> list[float]:
    return [value for row in rows if row["group"] == task and (value := _number(row, column)) is not None]


def _line(own: Sequence[Row], tasks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """One variant. tasks: per column those that count."""
    parts = {task: _gain(_values(own, task, "gain")) for task in tasks["gain"]}
    gains, errors = ([part[key] for part in parts.values()] for key in ("gain", "error"))
    known = {key: own[0].get(key) for key in ("variant", "inversion", "control", "steps", "dtype")}
    error = None if None in errors else math.hypot(*errors) / len(errors)
    made = {**known, "n": sum(part["n"] for part in parts.values()), "gain": _mean(gains), "error": error}
    for column in ("wins", *MEANS):
        if tasks[column]:
            values = [_values(own, task, column) for task in tasks[column]]
            made[column] = _mean([statistics.fmean(each) if each else None for each in values])
    return {**made, "tasks": parts}


def _gain(differences: Sequence[float]) -> dict[str, Any]:
    n = len(differences)
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else None
    return {"n": n, "gain": statistics.fmean(differences) if n else None, "error": error}


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is missing: a mean of other tasks would be no comparison."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _ranked(lines: Sequence[dict[str, Any]], digits: int) -> list[dict[str, Any]]:
    """Best gain first, equal ones in their order and of one rank; those without a gain last, without a rank."""

    def rounded(line: Row) -> float | None:
        return None if line["gain"] is None else round(line["gain"], digits)

    gains = [gain for line in lines if (gain := rounded(line)) is not None]
    ranked = [
        {"rank": None if (own := rounded(line)) is None else 1 + sum(gain > own for gain in gains), **line} for line in lines
    ]
    return sorted(ranked, key=lambda line: math.inf if line["rank"] is None else line["rank"])


def markdown(board: Sequence[Row], judged: Mapping[str, float] | None = None) -> str:
    """A leaderboard as a table: gain ± error, over all tasks and in each; n in its head, and in a cell where it is another.

    judged: the judge's own accuracy (`judge_accuracy`), told below.
    """
    tasks = list(board[0]["tasks"])
    most = {task: max(line["tasks"][task]["n"] for line in board) for task in tasks}
    means = [name for name in ("wins", *MEANS) if name in board[0]]
    head = ["rank", "variant", "gain", *(f"{task} (n = {most[task]})" for task in tasks), *means]
    lines = []
    for line in board:
        parts = [_cell(line["tasks"][task], most[task]) for task in tasks]
        numbers = [_shown(line[name], COLUMNS[name].digits if name in COLUMNS else 2) for name in means]
        lines.append([_shown(line["rank"], 0), line["variant"], _cell(line), *parts, *numbers])
    return table(head, lines) + (f"\n\n{told(judged)}" if judged else "")


def told(judged: Mapping[str, float]) -> str:
    """The judge's own accuracy in words."""
    return f"The judge reads rightly off the true results: {', '.join(f'{n} {share:.3f}' for n, share in judged.items())}."


def document(content: Mapping[str, Any]) -> str:
    """leaderboard.md of what leaderboard.json holds: "title", "rows", a leaderboard, and "judged", the judge's accuracy."""
    board = content["rows"]
    return f"{content['title']}\n\n{markdown(board, content['judged'])}\n\n{grid(board)}\n"


def grid(board: Sequence[Row]) -> str:
    """Gain ± error over all tasks as a table of controls by inversions; an empty cell where there is none.

    Raises InputError where two variants share both, as those of several T do.
    """
    cells = {(line["control"], line["inversion"]): _cell(line) for line in board}
    if len(cells) != len(board):
        raise InputError(
            "the leaderboard has several variants of one inversion and control; give the results of one T and dtype"
        )
    controls, inversions = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    rows = [[control, *(cells.get((control, inversion), "") for inversion in inversions)] for control in controls]
    return table(["control", *inversions], rows)


def _cell(part: Row, most: int | None = None) -> str:
    if part["gain"] is None:
        return ""
    error = "" if part["error"] is None else f" ± {part['error']:.2f}"
    fewer = "" if most in (None, part["n"]) else f" ({part['n']})"
    return f"{part['gain']:+.2f}{error}{fewer}"


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
