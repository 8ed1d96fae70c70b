"""The tables of a report: columns, lines, published numbers beside ours, and which value is best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from easyinv_edit.evaluation.report_files import dicts_of, number_of
from easyinv_edit.evaluation.report_page import Cell, Column, Line, Row, Table

NO_COLUMNS = ("kind", "item", "group", "variant", "inversion", "steps", "dtype", "control")


def column_of(given: Row) -> Column:
    """A column as summary.json tells of it."""
    digits, better = given.get("digits"), given.get("better")
    return Column(
        str(given.get("name", "")),
        str(given.get("unit") or ""),
        better if better in ("higher", "lower") else None,
        digits if type(digits) is int and 0 <= digits <= 12 else None,
    )


def columns_of(rows: Sequence[Row]) -> tuple[Column, ...]:
    """Columns where there is no summary to describe them: whatever is a number in some row."""
    names = dict.fromkeys(key for row in rows for key, value in row.items() if number_of(value) is not None)
    return tuple(Column(name) for name in names if name not in NO_COLUMNS)


def tables_of(summary: Row, columns: Sequence[Column]) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """The tables, with published lines in the first one, and the reasons that keep these from being comparable."""
    counted = (Column("n", digits=0), *columns)
    published = dicts_of(summary.get("published"))
    reasons = list(dict.fromkeys(_reason(row) for row in published if not row.get("same_protocol")))
    tables = []
    for number, given in enumerate(dicts_of(summary.get("tables"))):
        ours = [Line(str(row.get("variant", "")), cells_of(row, counted)) for row in dicts_of(given.get("rows"))]
        theirs = [_published(row, counted, reasons) for row in published if number == 0]
        title = str(given.get("title") or given.get("group") or "all items")
        tables.append(ranked_of(title, counted, _beside(ours, theirs)))
    return tuple(tables), tuple(reasons)


def _reason(row: Row) -> str:
    return str(row.get("why") or "the protocol is another one")


def _published(row: Row, columns: Sequence[Column], reasons: Sequence[str]) -> Line:
    reason = None if row.get("same_protocol") else reasons.index(_reason(row)) + 1
    return Line(str(row.get("variant", "")), cells_of(row, columns), str(row.get("source") or "published"), reason)


def _beside(ours: Sequence[Line], theirs: Sequence[Line]) -> list[Line]:
    """Each line of ours with the published ones of its variant below it; the others last."""
    names = {line.name for line in ours}
    pairs = [[line, *(other for other in theirs if other.name == line.name)] for line in ours]
    return [line for pair in pairs for line in pair] + [line for line in theirs if line.name not in names]


def cells_of(row: Row, columns: Sequence[Column]) -> tuple[Cell, ...]:
    """A row's cells, in the order of the columns."""
    return tuple(_cell(row.get(column.name), column, row.get(f"{column.name} n")) for column in columns)


def _cell(value: Any, column: Column, fewer: Any) -> Cell:
    number, count = number_of(value), number_of(fewer)
    if number is None:
        return Cell(value if isinstance(value, str) else "")
    text = f"{number:.4g}" if column.digits is None else f"{number:.{column.digits}f}"
    return Cell(text, number, None if count is None else int(count))


def ranked_of(title: str, columns: Sequence[Column], lines: Sequence[Line]) -> Table:
    """The table with the best of ours marked in each column, as far as its digits tell; means of fewer items do not count."""
    best: list[str | None] = []
    for index, column in enumerate(columns):
        cells = [line.cells[index] for line in lines if line.ranked and line.cells]
        found = {cell.value: cell.text for cell in cells if cell.value is not None and cell.fewer is None}
        choose = max if column.better == "higher" else min
        best.append(found[choose(found)] if column.better and len(set(found.values())) > 1 else None)

    def marked(line: Line) -> Line:
        cells = zip(line.cells, best, strict=False)
        return replace(line, cells=tuple(replace(c, best=c.fewer is None and c.text == top) for c, top in cells))

    return Table(title, tuple(columns), tuple(marked(line) if line.ranked else line for line in lines))
