"""Every inversion on the same pictures: what it costs, and how far from the picture it is sampled back.

Sampled back means alone, under the prompt it was inverted with, by the method's own sampler: at the guidance it was inverted at
and, for the columns called guided, at that of an edit. With the source pinned, as edits do by default, every method gives the
autoencoder's round trip, which is the ceiling that stands in the first row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyinv_edit.cost import Cost
from easyinv_edit.errors import NonFiniteError
from easyinv_edit.evaluation.columns import Sample
from easyinv_edit.evaluation.datasets import Item
from easyinv_edit.evaluation.variants import Variant
from easyinv_edit.evaluation.work import Work, seeded
from easyinv_edit.images import to_pil, to_unit
from easyinv_edit.trajectory import Trajectory

NOTHING: Mapping[str, float] = {}


@dataclass(frozen=True)
class InversionBench:
    """Measures a part of the pictures at a time, in one batch."""

    work: Work

    def prepare(self, part: Sequence[Item], variant: Variant) -> list[Trajectory]:
        """The inversions of the pictures; for the autoencoder alone the shortest there is, of which only the ends are used."""
        pipe, pictures, prompts = self.work.pipe, [item.picture for item in part], [item.prompt for item in part]
        options = self.work.options()
        if variant.method is None:
            return [pipe.invert(p, t, "ddim", num_inference_steps=1, **options) for p, t in zip(pictures, prompts, strict=True)]
        seeds = [seeded(self.work.config.seed + self.work.numbers[item.name]) for item in part]
        return pipe.invert_batch(
            pictures, prompts, variant.method, num_inference_steps=variant.steps or 1, generator=seeds, **options
        )

    @torch.no_grad()
    def measure(self, part: Sequence[Item], prepared: list[Trajectory], variant: Variant) -> list[dict[str, Any]]:
        """Sample the inversions back and compare."""
        if variant.method is None:
            return [self._row(i, variant, t, self._sample(t, t.clean)) for i, t in zip(part, prepared, strict=True)]
        config = self.work.config
        free, cost = self._sampled_back(prepared, config.inversion_guidance_scale)
        wanted = any(name.endswith(", guided") for name in self.work.measures.names)
        guided = self._sampled_back(prepared, config.guidance_scale)[0] if wanted else [None] * len(part)
        rows = []
        for item, trajectory, z, other in zip(part, prepared, free, guided, strict=True):
            facts = _facts(trajectory, z, other) | {"sampling evaluations": cost.evaluations / len(part)}
            also = None if other is None else self._sample(trajectory, other)
            rows.append(self._row(item, variant, trajectory, self._sample(trajectory, z, facts, also)))
        return rows

    def _sampled_back(self, trajectories: list[Trajectory], scale: float) -> tuple[Sequence[Tensor], Cost]:
        """Latents (1, C, H, W) of level 0, and what they cost together."""
        negative = self.work.config.negative_prompt
        z, cost = self.work.pipe.reconstruct(trajectories, guidance_scale=scale, negative_prompt=negative)
        return torch.split(z, 1), cost

    def _row(self, item: Item, variant: Variant, trajectory: Trajectory, sample: Sample) -> dict[str, Any]:
        row = self.work.row(item, variant) | self.work.measures.row(sample)
        return row | ({"pictures": self._pictures(item, variant, trajectory, sample)} if self.work.kept(item) else {})

    def _sample(
        self, trajectory: Trajectory, z: Tensor, facts: Mapping[str, float] = NOTHING, guided: Sample | None = None
    ) -> Sample:
        """Latents z (1, C, H, W) decoded, beside the picture that was encoded."""
        assert trajectory.source is not None
        source = trajectory.source.permute(2, 0, 1)[None].cpu().double() / 255
        picture = to_unit(self.work.pipe.backbone.decode(z).double()).cpu()
        if not picture.isfinite().all():
            raise NonFiniteError(f"{trajectory.method}: the decoded picture is not finite; use float32 or bfloat16")
        return Sample(picture=picture, source=source, facts=facts, guided=guided, metrics=self.work.measures.metrics)

    def _pictures(self, item: Item, variant: Variant, trajectory: Trajectory, sample: Sample) -> dict[str, str]:
        """What is kept: the source, the result, and the latent of the middle level decoded."""
        name = self.work.names[variant.label]
        shown = {"source": ("source", sample.source), "result": (name, sample.picture)}
        if variant.method is not None:
            middle = trajectory.latents[len(trajectory.latents) // 2]
            shown["latent"] = (f"{name}.latent", to_unit(self.work.pipe.backbone.decode(middle)))
        if sample.guided is not None:
            shown["guided"] = (f"{name}.guided", sample.guided.picture)
        return {key: self.work.keep(item, what, to_pil(picture * 2 - 1)[0]) for key, (what, picture) in shown.items()}


def _facts(trajectory: Trajectory, z: Tensor, guided: Tensor | None) -> dict[str, float]:
    """What is known of an inversion without decoding it."""
    facts = {
        "evaluations": trajectory.cost.evaluations,
        "seconds": trajectory.cost.seconds,
        "noise deviation": trajectory.noise.std().item(),
        "latent error": _error(z, trajectory),
    }
    return facts | ({} if guided is None else {"latent error, guided": _error(guided, trajectory)})


def _error(z: Tensor, trajectory: Trajectory) -> float:
    """|z - clean| / |clean|."""
    return ((z - trajectory.clean).norm() / trajectory.clean.norm()).item()
