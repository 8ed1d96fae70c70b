"""The tables of a benchmark for people, as Markdown, and for spreadsheets, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from easyinv_edit.evaluation.markdown import table as markdown_table

Row = Mapping[str, Any]


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables, with the published lines below ours and the notes at the end."""
    parts = [f"# {summary['title']}"]
    reasons = list(dict.fromkeys(row["why"] for row in summary["published"] if not row["same_protocol"]))
    for table in summary["tables"]:
        several = len(summary["tables"]) > 1
        title = f"## {table['title']}\n\n" if several else ""
        parts.append(title + _markdown_table(summary, table, reasons))
    if reasons:
        parts.append("\n".join(f"{_mark(number)} {why}" for number, why in enumerate(reasons)))
    if summary["notes"]:
        parts.append("\n".join(f"- {note}" for note in summary["notes"]))
    return "\n\n".join(parts) + "\n"


def _mark(number: int) -> str:
    """The mark of the first reason, the second and so on."""
    return "\\*" * (number + 1)


def _markdown_table(summary: Mapping[str, Any], table: Mapping[str, Any], reasons: Sequence[str]) -> str:
    arrows = {"higher": " ↑", "lower": " ↓", None: ""}
    columns = summary["columns"]
    heads = [f"{c['name']}{', ' + c['unit'] if c['unit'] else ''}{arrows[c['better']]}" for c in columns]
    lines = []
    for row in lines_of(summary, table):
        published = row.get("source")
        mark = "" if not published or row["same_protocol"] else f" {_mark(reasons.index(row['why']))}"
        name = f"*{row['variant']}: {published}*{mark}" if published else row["variant"]
        lines.append([name, str(row.get("n", "")), *(_cell(row, column) for column in columns)])
    return markdown_table(["variant", "n", *heads], lines)


def _cell(row: Row, column: Mapping[str, Any]) -> str:
    value, fewer = row.get(column["name"]), row.get(f"{column['name']} n")
    return "" if value is None else f"{value:.{column['digits']}f}{'' if fewer is None else f' ({fewer})'}"


def lines_of(summary: Mapping[str, Any], table: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The lines of a table; in that of all items published ones follow the line they belong to, those of no line the last."""
    published = [] if table["group"] else list(summary["published"])
    for row in table["rows"]:
        yield dict(row)
        yield from (dict(each) for each in published if each["variant"] == row["variant"])
    ours = {row["variant"] for row in table["rows"]}
    yield from (dict(each) for each in published if each["variant"] not in ours)


def as_csv(summary: Mapping[str, Any]) -> str:
    """Every line of every table; source is empty for ours."""
    rows = [{"table": table["title"], **line} for table in summary["tables"] for line in lines_of(summary, table)]
    known = ["table", "variant", "source", "inversion", "control", "steps", "dtype", "n"]
    heads = list(dict.fromkeys([*known, *(key for row in rows for key in row)]))
    file = io.StringIO()
    writer = csv.DictWriter(file, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
