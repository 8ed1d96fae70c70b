"""Measure a tabletop model: its autoencoder, what it draws, how it inverts, and how its edits compare with rendered truths."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyinv_edit.errors import ModelError
from easyinv_edit.evaluation.ground_truth import TASKS, Task, make_cases
from easyinv_edit.evaluation.kernel_distance import kernel_distance
from easyinv_edit.evaluation.ledger import Ledger
from easyinv_edit.evaluation.metrics import psnr
from easyinv_edit.evaluation.reconstruction import reconstruct
from easyinv_edit.evaluation.truth_edits import run_task
from easyinv_edit.images import save_png, to_pil, to_unit
from easyinv_edit.pipeline import EditPipeline, embedded_folder
from easyinv_edit.result import versions, write_text
from easyinv_edit.running import rendered
from easyinv_edit.tabletop import judge as judging
from easyinv_edit.tabletop import networks
from easyinv_edit.tabletop.captions import caption
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import Scene, random_scene, random_table

HELD_OUT = 20_000_000
"""Seeds of this evaluation: neither trained on nor used in the training's own gates."""
SAMPLED_BACK = ("ddim", "easyinv", "fixed_point")
"""Inversions that tell how well a model can be inverted; `bench inversion` measures them all."""
WORLDS: dict[str, Callable[[int], Scene]] = {"single solids": random_scene, "wider world": random_table}
"""What samples are asked for: a solid in the middle, or also at either side and in pairs."""
GUIDANCE = (3.0, 5.0)
SAMPLES = 8
"""Samples of each world and guidance for every scene of the other measurements: reading words takes many."""
SAMPLE_STEPS = 25
BATCH = 50
Report = Callable[[str], None]
Piece = tuple[str, str, Callable[[], Any]]
"""Part, name within it ("" where it is one), and what measures it."""


def evaluate(
    model: str,
    folder: Path,
    count: int,
    steps: int,
    report: Report,
    *,
    sets: int = 1,
    samples: int | None = None,
    judge_of: str | None = None,
) -> dict[str, Any]:
    """Measure `model` on held-out scenes at T = `steps`; writes pictures and report.json and returns what it holds.

    Every part is kept in results.jsonl as soon as it is measured: in a folder that holds parts of the same model, measured
    alike, only those that are missing are measured.

    count: scenes per measurement and set; sets: how often everything is measured again on other scenes with other noise;
    samples: at least 2, drawn of each world and guidance in a set, by default `SAMPLES` for every scene;
    judge_of: a model folder whose judge reads the pictures, by default the model's own: to compare two versions.
    Raises ModelError where the model's folder holds no judge: then it is no tabletop model; InputError where `folder` holds
    another run.
    """
    judge = _judge_of(model if judge_of is None else judge_of)
    pipe = EditPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    drawn = SAMPLES * count if samples is None else samples
    request = {"model": model, "weights": _weights(pipe, judge), "scenes": count, "samples": drawn, "steps": steps}
    request |= {"versions": versions(), "size": _size(pipe)}
    ledger = Ledger(folder, request, ("set", "part", "name"))
    content = {**request, **_measured(ledger, 0, [("one edit", "", partial(_one_edit, pipe, steps))], report)}
    content["sets"] = [
        _measured(ledger, number + 1, _pieces(pipe, judge, number, count, drawn, steps, folder / f"set-{number + 1}"), report)
        for number in range(sets)
    ]
    write_text(folder / "report.json", json.dumps(content, indent=2) + "\n")
    return content


def _measured(ledger: Ledger, number: int, pieces: Iterable[Piece], report: Report) -> dict[str, Any]:
    """What a set's pieces give, by part and name; only those that the ledger lacks are measured."""
    content: dict[str, Any] = {}
    for part, name, measure in pieces:
        line = ": ".join(filter(None, (f"set {number}" if number else "", part, name)))
        figures = ledger.figures(measure, partial(report, line), set=number, part=part, name=name)
        content |= {part: {**content.get(part, {}), name: figures}} if name else {part: figures}
    return content


def _judge_of(model: str) -> judging.Judge:
    folder = embedded_folder() if model == "embedded" else Path(model)
    if not (folder / judging.FILE).exists():
        raise ModelError(f"{model}: has no {judging.FILE}, so it is no tabletop model; train one: `tabletop train`")
    return judging.load(folder / judging.FILE)


def _weights(pipe: EditPipeline, judge: judging.Judge) -> str:
    """A digest of every network that the figures depend on."""
    stock = pipe.backbone.pipe
    return networks.weights_digest(stock.vae, stock.text_encoder, stock.unet, judge)


def _pieces(
    pipe: EditPipeline, judge: judging.Judge, number: int, count: int, drawn: int, steps: int, folder: Path
) -> Iterator[Piece]:
    """Everything once, on the scenes and the noise of one set."""
    first = HELD_OUT + 100_000 * number
    yield "autoencoder", "", partial(_autoencoder, pipe, judge, first, SAMPLES * count)
    yield from _samples(pipe, judge, number, drawn, folder)
    yield "reconstructions", "", partial(_reconstructions, pipe, first, count, steps)
    for task in TASKS:
        picture = folder / f"edit-{task.name}.png"
        yield "edits", task.name, partial(_edits, pipe, judge, task, first, count, steps, picture)


def _edits(
    pipe: EditPipeline, judge: judging.Judge, task: Task, first: int, count: int, steps: int, picture: Path
) -> list[dict[str, Any]]:
    """The outcomes of every method on a task; the grid becomes a PNG file."""
    cases = make_cases(task, [random_scene(first + i) for i in range(20 * count)], count)
    outcomes, grid = run_task(pipe, judge, cases, num_inference_steps=steps)
    save_png(grid, picture)
    return [asdict(outcome) for outcome in outcomes]


def _size(pipe: EditPipeline) -> dict[str, Any]:
    """Parameters, and megabytes of them in float16."""
    parts = (pipe.backbone.pipe.vae, pipe.backbone.pipe.unet, pipe.backbone.pipe.text_encoder)
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    return {"parameters": parameters, "float16_megabytes": 2 * parameters / 1e6, "pixels": pipe.backbone.native_size[0]}


def _one_edit(pipe: EditPipeline, steps: int) -> dict[str, Any]:
    """What a whole edit costs, from one picture to the other: a change of shape by MasaCtrl after EasyInv."""
    case = make_cases(TASKS[0], [random_scene(HELD_OUT + i) for i in range(20)], 1)[0]
    picture = rendered(case.source, pipe.backbone.native_size)
    began = time.perf_counter()
    result = pipe(picture, case.prompt, case.source_prompt, num_inference_steps=steps, guidance_scale=3.0)
    seconds = time.perf_counter() - began
    evaluations = sum(cost.evaluations for cost in result.cost.values())
    return {"seconds": seconds, "evaluations": evaluations, "threads": torch.get_num_threads()}


@torch.no_grad()
def _autoencoder(pipe: EditPipeline, judge: judging.Judge, first: int, count: int) -> dict[str, Any]:
    """The round trip of single solids: dB whole and inside the objects, means over pictures, and what the judge reads in it."""
    scenes = [random_scene(first + 30_000 + i) for i in range(count)]
    pictures, masks = render(scenes, pipe.backbone.native_size[0])
    backbone = pipe.backbone
    parts = [to_unit(backbone.decode(backbone.encode(part * 2 - 1))).float() for part in torch.split(pictures, BATCH)]
    back = torch.cat(parts).cpu()
    whole = [psnr(a, b) for a, b in zip(back, pictures, strict=True)]
    inside = [psnr(a, b, mask) for a, b, mask in zip(back, pictures, masks, strict=True)]
    words = {"rendered": judging.accuracy(judge, pictures, scenes), "round trip": judging.accuracy(judge, back, scenes)}
    return {"psnr": sum(whole) / count, "object_psnr": sum(inside) / count, **words}


def _samples(pipe: EditPipeline, judge: judging.Judge, number: int, count: int, folder: Path) -> Iterator[Piece]:
    """A row for each world and what is looked at in it: what the judge reads rightly in renders and in the stock pipeline's
    samples of full captions (T = `SAMPLE_STEPS`), and the kernel distance of each from renders of other scenes, in the
    judge's features."""
    size, first = pipe.backbone.native_size[0], HELD_OUT + 1_000_000 + 100_000 * number
    for world, make in WORLDS.items():
        scenes = [make(first + i) for i in range(count)]
        others = cache(partial(_rendered, [make(first + 50_000 + i) for i in range(count)], size))
        kinds: dict[str, Callable[[], Tensor]] = {"rendered": partial(_rendered, scenes, size)}
        kinds |= {f"guidance {scale:g}": partial(_draw, pipe, scenes, scale, number) for scale in GUIDANCE}
        for kind, pictures in kinds.items():
            path = folder / f"{world} {kind}.png".replace(" ", "-")
            yield "samples", f"{world}, {kind}", partial(_row, judge, scenes, pictures, others, path)


def _row(
    judge: judging.Judge, scenes: list[Scene], draw: Callable[[], Tensor], others: Callable[[], Tensor], path: Path
) -> dict[str, float]:
    """The words of some pictures and their distance from others; the first 32 become a PNG file."""
    pictures = draw()
    columns = min(len(pictures), 8)
    lines = torch.split(pictures[: len(pictures) // columns * columns][:32], columns)
    save_png(to_pil(torch.cat([torch.cat(list(line), -1) for line in lines], -2)[None] * 2 - 1)[0], path)
    return {**judging.accuracy(judge, pictures, scenes), "kernel distance": _distance(judge, pictures, others())}


def _rendered(scenes: list[Scene], size: int) -> Tensor:
    return render(scenes, size)[0]


def _draw(pipe: EditPipeline, scenes: list[Scene], scale: float, seed: int) -> Tensor:
    stock = pipe.backbone.pipe
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": SAMPLE_STEPS, "guidance_scale": scale, "generator": generator, "output_type": "pt"}
    prompts = [caption(scene) for scene in scenes]
    parts = [stock(prompts[i : i + BATCH], **options).images.float().cpu() for i in range(0, len(prompts), BATCH)]
    return torch.cat(parts)


@torch.no_grad()
def _distance(judge: judging.Judge, pictures: Tensor, others: Tensor) -> float:
    """Kernel distance in the judge's features, which have no scale of their own: of mean square 1 over `others`."""
    a, b = (torch.cat([judge.features(part) for part in torch.split(each, BATCH)]) for each in (pictures, others))
    scale = b.square().mean().sqrt()
    return kernel_distance(a / scale, b / scale)


def _reconstructions(pipe: EditPipeline, first: int, count: int, steps: int) -> list[dict[str, Any]]:
    scenes = [random_scene(first + 2_000_000 + i) for i in range(count)]
    pictures = [to_pil(p[None] * 2 - 1)[0] for p in render(scenes, pipe.backbone.native_size[0])[0]]
    prompts = [caption(scene) for scene in scenes]
    return [asdict(reconstruct(pipe, pictures, prompts, method, steps)) for method in SAMPLED_BACK]
