"""`easyinv-edit bench regimes`: where EasyInv helps reconstruction. Imports nothing heavy at the top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from easyinv_edit import terminal
from easyinv_edit.terminal import Debug, Json, Quiet


def regimes(
    scenes: Annotated[int, typer.Option(min=2, help="Rendered pictures.")] = 64,
    steps: Annotated[str, typer.Option(help="Values of T, separated by commas.")] = "10,20,50",
    batch: Annotated[int, typer.Option(min=1, help="Pictures inverted at once.")] = 8,
    model: Annotated[str, typer.Option(help="A model folder, a hub name, or 'embedded'.")] = "embedded",
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the table.")] = "outputs/bench-regimes",
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Compare EasyInv with DDIM inversion, sampled back, over guidance scales, T, eta, windows and backgrounds.

    Writes a table and JSON, after every line anew. In a folder that holds a part of the same comparison, also one at other
    values of T, only what is missing is measured.
    """
    from easyinv_edit.cli_bench import _steps

    counts = _steps(steps)
    terminal.require_writable(Path(output))
    terminal.settle(quiet)
    from easyinv_edit.evaluation import regimes as bench
    from easyinv_edit.evaluation.ledger import Ledger
    from easyinv_edit.pipeline import EditPipeline
    from easyinv_edit.result import versions, write_text

    def report(line: str) -> None:
        if not (quiet or json_):
            typer.echo(line, err=True)

    pipe = EditPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    given = bench.scenes(scenes, pipe.backbone.native_size[0])
    rows: list[dict[str, Any]] = []
    request = {"model": model, "weights": pipe.backbone.identity()["probe"], "scenes": scenes, "versions": versions()}
    ledger = Ledger(Path(output), request, bench.KEY)
    request |= {"steps": list(counts), "white": sum(given.white), "batch": batch}
    for row in bench.measure(pipe, given, counts, batch, ledger, report):
        rows.append(row)
        content = {"request": request, "rows": rows}
        write_text(Path(output) / "regimes.json", json.dumps(content, indent=2) + "\n")
        write_text(Path(output) / "regimes.md", bench.text(rows) + "\n")
    terminal.show(rows, quiet, json_, bench.text)
