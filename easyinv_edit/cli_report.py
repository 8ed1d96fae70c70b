"""`easyinv-edit report`: a folder of results as one HTML page. Imports nothing heavy at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from easyinv_edit import terminal
from easyinv_edit.terminal import Debug, Json, Quiet


def report(
    folder: Annotated[str, typer.Argument(help="The output folder of a benchmark or of an edit.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="The page; by default FOLDER/report.html.")] = None,
    items: Annotated[int, typer.Option(min=0, help="How many items are shown with their pictures.")] = 50,
    side: Annotated[int, typer.Option(min=32, max=4096, help="Longest side of items' pictures on the page, in pixels.")] = 384,
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Make one HTML page of a benchmark's run or of an edit: tables, pictures to compare, and how it was made.

    Everything is in the one file; it opens without a network.
    """
    from easyinv_edit.evaluation import report as reporting

    page = Path(output or Path(folder) / "report.html")
    if output is not None or Path(folder).is_dir():
        terminal.require_writable(page.parent)
    terminal.show(reporting.write(Path(folder), page, items, side), quiet, json_, _text)


def _text(facts: dict[str, Any]) -> str:
    lack = f", {facts['missing']} missing" if facts["missing"] else ""
    shown = f"{facts['shown']} of {facts['items']} items, {facts['pictures']} pictures{lack}"
    return f"{facts['file']}: {shown}, {facts['bytes'] / 1e6:.1f} MB"
