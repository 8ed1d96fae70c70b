"""The one loop of every benchmark: items, then groups of variants, a row of results for each, on disk before the next.

A run's folder holds run.json (the request), config.yaml, environment.json, results.jsonl, the summary as JSON, CSV and
Markdown, for edits with true results the leaderboard as JSON and Markdown, pictures/ and figures/. Stopped at any moment it
goes on there. What fails for one item is a row with an "error", and the run goes on; the same command tries it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from attention_control import ControlError
from easyinv_edit.errors import EasyInvError, InputError
from easyinv_edit.evaluation import (
    bench_figures,
    columns,
    datasets,
    edit_bench,
    environment,
    leaderboard,
    summary,
    summary_text,
)
from easyinv_edit.evaluation import items as items_of
from easyinv_edit.evaluation.benchmark import Benchmark
from easyinv_edit.evaluation.columns import Measures
from easyinv_edit.evaluation.datasets import Item
from easyinv_edit.evaluation.edit_bench import EditBench
from easyinv_edit.evaluation.inversion_bench import InversionBench
from easyinv_edit.evaluation.ledger import Ledger, refuse_another, sound_rows
from easyinv_edit.evaluation.variants import BASELINE, Variant, groups, variants
from easyinv_edit.evaluation.work import Bench, Work, file_names
from easyinv_edit.pipeline import EditPipeline, embedded_folder
from easyinv_edit.result import write_text
from easyinv_edit.running import resolve_device
from easyinv_edit.tabletop import judge as judging

KEY = ("variant", "item")
"""What tells results apart."""
FAILURES = (EasyInvError, ControlError, torch.OutOfMemoryError)
"""What one item may fail by; anything else ends the run."""
JUDGED = ("target", "kept")
BOARD = "leaderboard.json"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What a run ended with. summary: as in summary.json; failed: the rows with an error; results: how many rows there are."""

    summary: dict[str, Any]
    failed: list[dict[str, Any]]
    results: int


def run(config: Benchmark, folder: Path, report: Report, text: str = "") -> Outcome:
    """Measure what the folder does not hold yet, and write its tables; nothing where it is finished.

    text: what config.yaml will hold, by default every key of the configuration. Raises InputError and ModelError, with nothing
    written, where the folder holds another run, the data cannot be read or the model cannot be opened.
    """
    device = resolve_device(config.device)
    titles = [title for row in config.published for title in row.values]
    measures = columns.loaded(config.columns, config.weights, device, titles)
    request = {**config.request(), "missing": dict(measures.missing)}
    refuse_another(folder, request)
    if (done := _finished(folder, request)) is not None:
        return done
    stored, notes = items_of.stored(config)
    pipe = _opened(config, config.dtypes[0], device)
    size = pipe.backbone.native_size if config.size is None else (config.size, config.size)
    _check_size(measures, size, pipe.backbone.size_multiple)
    items = stored or items_of.rendered(config, size[0])
    ledger = Ledger(folder, request, KEY)
    write_text(folder / "config.yaml", text or config.to_yaml())
    facts = environment.started(folder, device, list(config.dtypes))
    lines, judge = variants(config), _judge(config)
    numbers, names = {item.name: i for i, item in enumerate(items)}, file_names([line.label for line in lines])
    for dtype in config.dtypes:
        pipe = pipe or _opened(config, dtype, device)
        work = Work(config, pipe, measures, folder, numbers, names)
        bench = InversionBench(work) if config.kind == "inversion" else EditBench(work, judge)
        _measure(bench, work, items, [line for line in lines if line.dtype == dtype], ledger, report)
        pipe = work = bench = None  # type: ignore[assignment]  # one model in memory at a time
    judged = {} if judge is None else edit_bench.accuracy(judge, items, size[0])
    notes += [edit_bench.told(judged)] if judged else []
    content = summary.build(config, measures, lines, ledger.rows, [item.group for item in items], notes)
    _write(folder, content)
    if (board := _leaderboard(config, lines, ledger.rows, judged)) is not None:
        write_text(folder / BOARD, json.dumps(board, indent=2) + "\n")
        write_text(folder / "leaderboard.md", leaderboard.document(board))
    bench_figures.draw(folder)
    environment.finished(folder, facts, len(ledger.rows))
    return _outcome(content, ledger.rows)


def _measure(bench: Bench, work: Work, items: Sequence[Item], lines: Sequence[Variant], ledger: Ledger, report: Report) -> None:
    """Everything of one dtype. Variants take turns on the same few pictures: a machine that slows down slows them all."""
    warm = False
    parts = datasets.chunks(items, work.config.batch)
    for number, part in enumerate(parts):
        for group in groups(lines):
            left = [v for v in group if v.suits(part)]
            left = [v for v in left if not all(ledger.holds(variant=v.label, item=item.name) for item in part)]
            if not left:
                continue
            if not warm:
                _warm_up(work, len(part))
                warm = True
            report(f"{_place(number, part, work, len(items))}: {', '.join(v.label for v in left)}")
            for rows in attempted(bench, work, part, left):
                ledger.add(rows)


def _place(number: int, part: Sequence[Item], work: Work, total: int) -> str:
    """Which items these are, for reports."""
    first = number * work.config.batch + 1
    which = str(first) if len(part) == 1 else f"{first}-{first + len(part) - 1}"
    return f"{which} of {total}, {part[0].name}"


def attempted(bench: Bench, work: Work, part: Sequence[Item], lines: Sequence[Variant]) -> Iterator[list[dict[str, Any]]]:
    """Rows as they are made. Where a batch fails its items are tried one by one; what fails alone is a row with the error."""
    try:
        prepared = bench.prepare(part, lines[0])
    except FAILURES as error:
        yield from _one_by_one(bench, work, part, lines, error)
        return
    for line in lines:
        try:
            yield bench.measure(part, prepared, line)
        except FAILURES as error:
            yield from _one_by_one(bench, work, part, [line], error)


def _one_by_one(
    bench: Bench, work: Work, part: Sequence[Item], lines: Sequence[Variant], error: Exception
) -> Iterator[list[dict[str, Any]]]:
    if len(part) == 1:
        text = " ".join(str(error).split()) or type(error).__name__
        yield [{**work.row(part[0], line), "error": text} for line in lines]
        return
    for item in part:
        yield from attempted(bench, work, [item], lines)


def _warm_up(work: Work, rows: int) -> None:
    """The first calls of a process are slow and belong to no method."""
    grey = [Image.new("RGB", work.size[::-1], "grey")] * rows
    with suppress(*FAILURES):  # what fails here fails again, as a result that says so
        work.pipe.invert_batch(grey, [""] * rows, "ddim", num_inference_steps=2, **work.options())


# --- what a run begins and ends with ------------------------------------------------------------------------------------


def _finished(folder: Path, request: Mapping[str, Any]) -> Outcome | None:
    """The outcome of a run that is done, with every result still there and none of them an error.

    A leaderboard without its JSON is an earlier version's: such a run is gone through again, which only writes its tables.
    """
    if (folder / "leaderboard.md").exists() and not (folder / BOARD).exists():
        return None
    rows, facts = sound_rows(folder), environment.known(folder)
    whole = facts.get("finished") and facts.get("results") == len(rows) and not any("error" in row for row in rows)
    try:
        same = json.loads((folder / "run.json").read_text(encoding="utf-8")) == json.loads(json.dumps(request))
        content = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _outcome(content, rows) if whole and same else None


def _outcome(content: dict[str, Any], rows: Sequence[Mapping[str, Any]]) -> Outcome:
    return Outcome(content, [dict(row) for row in rows if "error" in row], len(rows))


def _opened(config: Benchmark, dtype: str, device: torch.device) -> EditPipeline:
    pipe = EditPipeline.from_pretrained(config.model, dtype=getattr(torch, dtype), device=device, schedule=config.schedule)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_size(measures: Measures, size: tuple[int, int], multiple: int) -> None:
    """That the model can make pictures of (height, width), and that every column can see them. Raises InputError."""
    if any(side % multiple for side in size):
        raise InputError(f"size {size[0]} x {size[1]}: give a multiple of {multiple} for this model")
    least, name = measures.least()
    if min(size) < least:
        raise InputError(
            f"{name}: sees sides of at least {least} pixels, the pictures have {size[1]} x {size[0]}; leave it out"
        )


def _judge(config: Benchmark) -> judging.Judge | None:
    """The classifier that reads words off pictures, the model's own or the embedded one's; None where no column asks."""
    if config.data.set != "tabletop_edits" or config.kind != "edits" or not set(JUDGED) & set(config.columns):
        return None
    own, ours = (folder / judging.FILE for folder in (Path(config.model), embedded_folder()))
    return judging.load(own if own.exists() else ours)


def _write(folder: Path, content: dict[str, Any]) -> None:
    """The summary in its three forms."""
    write_text(folder / "summary.json", json.dumps(content, indent=2) + "\n")
    write_text(folder / "summary.csv", summary_text.as_csv(content))
    write_text(folder / "summary.md", summary_text.markdown(content))


def _leaderboard(
    config: Benchmark, lines: Sequence[Variant], rows: Sequence[Mapping[str, Any]], judged: Mapping[str, float]
) -> dict[str, Any] | None:
    """leaderboard.json: every line against plain sampling after one inversion, DDIM's where it is there; None where nothing is
    to be compared.

    judged: the judge's own accuracy. Only for runs with true results and one T and dtype.
    """
    plain = [line.inversion for line in lines if line.control == BASELINE]
    several = len({(line.steps, line.dtype) for line in lines}) > 1
    if config.data.set != "tabletop_edits" or "inside" not in config.columns or not plain or several:
        return None
    reference = "ddim" if "ddim" in plain else plain[0]
    try:
        board = leaderboard.leaderboard(rows, reference=reference)
    except InputError:  # none of the reference's results came out
        return None
    head = f"Gain inside the object over {reference} + {BASELINE} on the same item, in dB."
    return {"title": head, "judged": dict(judged), "rows": board}
