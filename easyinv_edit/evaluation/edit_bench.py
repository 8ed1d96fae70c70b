"""Every control after every inversion, on pictures with a target prompt: which one does which kind of edit, and at what cost.

Where the true result is rendered, edits are compared with it, in the object and outside of it, and a classifier reads the words
off the edited picture. Where it is unknown, what lies outside the mask is compared with the source, and CLIP and DINO tell the
rest, as PIE-Bench does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention_control import CONTROLLERS
from easyinv_edit import images
from easyinv_edit.cost import Cost
from easyinv_edit.errors import EasyInvError, InputError, NonFiniteError
from easyinv_edit.evaluation.columns import Sample
from easyinv_edit.evaluation.datasets import EditItem, Item, TabletopEdit
from easyinv_edit.evaluation.ground_truth import Case, Task, make_cases
from easyinv_edit.evaluation.variants import BASELINE, CONTROLS, Variant
from easyinv_edit.evaluation.work import Work, fitted_mask, seeded, unit
from easyinv_edit.result import EditResult
from easyinv_edit.tabletop import judge as judging
from easyinv_edit.tabletop.judge import Judge, shown
from easyinv_edit.tabletop.render import render, render_apart
from easyinv_edit.trajectory import Trajectory

__all__ = ["BASELINE", "CONTROLS", "EditBench", "cases_of"]


def cases_of(task: Task, first_seed: int, count: int) -> list[Case]:
    """The first `count` cases of a task among scenes from a seed on."""
    return make_cases(task, [task.scenes(first_seed + i) for i in range(20 * count)], count)


@dataclass(frozen=True)
class EditBench:
    """Measures one edit at a time. judge: reads words off pictures, None where no column asks for them."""

    work: Work
    judge: Judge | None

    def prepare(self, part: Sequence[Item], variant: Variant) -> Trajectory:
        """The inversion of the one picture."""
        (item,) = part
        assert variant.method is not None
        prompt = item.prompt if variant.source_prompt is None else variant.source_prompt
        generator, steps = seeded(self.work.config.seed), variant.steps or 1
        options = {"num_inference_steps": steps, "generator": generator, **self.work.options()}
        return self.work.pipe.invert(item.picture, prompt, variant.method, **options)

    def measure(self, part: Sequence[Item], prepared: Trajectory, variant: Variant) -> list[dict[str, Any]]:
        """Edit the picture and compare."""
        (item,) = part
        assert isinstance(item, EditItem)
        config = self.work.config
        made = self.work.pipe.edit(
            prepared,
            item.target_prompt,
            control=variant.controller(item),
            style=self._style(item, variant),
            guidance_scale=config.guidance_scale,
            negative_prompt=config.negative_prompt,
            pin_source=variant.pinned,
            output_type="pt",
        )
        if made.flagged and any(made.flagged):
            raise EasyInvError("the model's safety checker made the picture black; load the model without it")
        if not made.images.isfinite().all():
            raise NonFiniteError("the decoded picture is not finite; use float32 or bfloat16")
        sample = self._sample(item, prepared, made)
        row = self.work.row(item, variant) | self.work.measures.row(sample)
        return [row | ({"pictures": self._pictures(item, variant, sample)} if self.work.kept(item) else {})]

    def _style(self, item: EditItem, variant: Variant) -> Trajectory | None:
        """The second picture's inversion, for controllers that read one; its cost is not in the columns."""
        kind = CONTROLLERS.get((variant.settings or {}).get("name", ""))
        if getattr(kind, "sources", 1) == 1:
            return None
        if (picture := item.style) is None:
            raise InputError(f"{item.name}: has no second picture, which {variant.control} reads")
        generator, steps = seeded(self.work.config.seed), variant.steps or 1
        options = {"num_inference_steps": steps, "generator": generator, **self.work.options()}
        assert variant.method is not None
        return self.work.pipe.invert(picture, item.style_prompt, variant.method, **options)

    def _sample(self, item: EditItem, trajectory: Trajectory, made: EditResult) -> Sample:
        assert made.source is not None
        picture = unit(made.edited[0])
        truth, inside = self._truth(item)
        facts = _facts(trajectory.cost, made.cost["edit"]) | self._read(item, picture)
        return Sample(
            picture=picture,
            source=unit(made.source),
            mask=fitted_mask(item, self.work.size, self.work.config.fit),
            truth=truth,
            inside=inside,
            prompt=item.target_prompt,
            source_prompt=item.prompt,
            facts=facts,
            form=self.work.config.mask_form,
            metrics=self.work.measures.metrics,
        )

    def _truth(self, item: EditItem) -> tuple[Tensor | None, Tensor | None]:
        """The true result and where its edited object is; rendered, so not rounded to 8 bits."""
        if isinstance(item, TabletopEdit):
            picture, covered = render_apart([item.case.truth], self.work.size[0])
            return picture, covered[:, item.case.task.edited[1], None]
        truth = item.truth
        return None if truth is None else unit(images.fit(truth, self.work.size, self.work.config.fit)[0]), None

    def _read(self, item: EditItem, picture: Tensor) -> dict[str, float]:
        """Whether the judge sees the requested word, NaN where there is none or it reads no such words, and in which share of
        the others that it reads the source's."""
        if self.judge is None or not isinstance(item, TabletopEdit):
            return {}
        task, words, wanted = item.case.task, self.judge.read(picture)[0], shown(item.case.truth)
        kept = [words[field] == wanted[field] for field in task.kept if field in wanted and field in words]
        target = float(words[task.field] == wanted[task.field]) if task.field in words else math.nan
        return {"target": target, "kept": statistics.fmean(kept)}

    def _pictures(self, item: EditItem, variant: Variant, sample: Sample) -> dict[str, str]:
        shown = {"source": ("source", sample.source), "result": (self.work.names[variant.label], sample.picture)}
        shown |= {} if sample.truth is None else {"truth": ("truth", sample.truth)}
        shown |= {} if sample.mask is None else {"mask": ("mask", sample.mask.expand_as(sample.source))}
        return {key: self.work.keep(item, what, images.to_pil(tensor * 2 - 1)[0]) for key, (what, tensor) in shown.items()}


def _facts(inversion: Cost, edit: Cost) -> dict[str, float]:
    return {
        "evaluations": edit.evaluations,
        "seconds": edit.seconds,
        "inversion evaluations": inversion.evaluations,
        "inversion seconds": inversion.seconds,
    }


def accuracy(judge: Judge, items: Sequence[Item], size: int) -> dict[str, float]:
    """Share of right words per attribute that the judge reads off the true results themselves."""
    scenes = [item.case.truth for item in items if isinstance(item, TabletopEdit)]
    pictures = torch.cat([render(scenes[i : i + 64], size)[0] for i in range(0, len(scenes), 64)])
    return judging.accuracy(judge, pictures, scenes)


def told(judged: Mapping[str, float]) -> str:
    """The judge's accuracy in words, for the notes of a table."""
    right = ", ".join(f"{field} {share:.2f}" for field, share in judged.items())
    return f"target and kept are read by a classifier; off the true results themselves it reads rightly: {right}"
