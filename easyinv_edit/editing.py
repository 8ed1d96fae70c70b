"""The sampling half of an edit: targets in batches under control, with the source beside them or its features from before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention_control import Controller, ReferenceCache, Run, Session, Words, controlled
from easyinv_edit.denoiser import Denoiser
from easyinv_edit.errors import InputError
from easyinv_edit.feature_storage import Auto, Exact, Features, FromInversion, Live, room_for
from easyinv_edit.rows import laid_out, streams_of
from easyinv_edit.sampling import Sampler, sample
from easyinv_edit.source_features import evaluate_source, fingerprint, readable
from easyinv_edit.trajectory import Trajectory

Progress = Callable[[int], AbstractContextManager[Callable[[], Any]]]
"""Total of steps -> a context that gives what to call after each."""
OnStep = Callable[[int, int, dict[str, Tensor]], "dict[str, Tensor] | None"]
"""(step, timestep, {"latents": ...}) -> the same dict, changed, or None."""


@dataclass(frozen=True)
class Editing:
    """What all batches of one edit share. sources: the pinned trajectories, one row each."""

    backbone: Any
    control: Controller
    sampler: Sampler
    sources: Trajectory
    pinned: bool
    read_mask: Callable[[Any], Tensor]

    def batches(
        self,
        denoiser: Denoiser,
        start: Tensor,
        words: Sequence[Words],
        batch_size: int | None,
        source_features: Features,
        progress: Progress,
        on_step: OnStep | None,
    ) -> tuple[Tensor, ReferenceCache | None]:
        """Latents (1 + targets, C, H, W) of level 0: the first source's, then the targets'; and the source features read.

        denoiser, start: of all rows, sources first; words: of the source's prompt, then of each target's. A batch for which the
        device has no memory is halved; results do not depend on the batches.
        """
        count = self.sources.latents.shape[1]
        targets = list(range(count, start.shape[0]))
        size = len(targets) if batch_size is None else batch_size
        if size < 1:
            raise InputError(f"batch_size is {size}; it must be at least 1")
        parts = deque(targets[i : i + size] for i in range(0, len(targets), size))
        reference = self._reference(denoiser, words, source_features, len(parts))
        done = []
        with progress(len(parts) * self._length) as advance:
            while parts:
                part = parts.popleft()
                rows = [*range(count), *part]
                held = [r - count for r in part]
                try:
                    done.append(self._batch(denoiser.select(rows), start[rows], words, held, reference, advance, on_step))
                    continue
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                half = len(part) // 2  # here, where the failed batch's tensors are free again
                parts.extendleft([part[half:], part[:half]])
                reference = reference or self._reference(denoiser, words, source_features, 2)
        return torch.cat([done[0][:1], *(z[count:] for z in done)]), reference

    @property
    def _length(self) -> int:
        return self.sampler.start or len(self.sources.schedule)

    def _run(self, words: Sequence[Words]) -> Run:
        steps, size = len(self.sources.schedule), self.sources.latents.shape[-2:]
        return Run(steps, (size[0], size[1]), steps - self._length, tuple(words), self.read_mask, self.backbone.device)

    def _reference(self, denoiser: Denoiser, words: Sequence[Words], features: Features, parts: int) -> ReferenceCache | None:
        """The source's features, evaluated or kept before; None where its rows are to be beside the targets'."""
        auto = isinstance(features, Auto)
        if isinstance(features, Live) or (auto and parts == 1):
            return None
        steps = readable(self.backbone, self.control, self._run(words))
        if steps is None or not self.pinned or self.sampler.calls != 1:
            if auto:
                return None
            given = "a cache" if isinstance(features, ReferenceCache) else repr(features.name)
            raise InputError(f"source_features {given} cannot be used: {self._why_not(steps)}; use 'live'")
        if isinstance(features, FromInversion):
            if self.sources.features is None:
                raise InputError("source_features 'inversion': none were kept; invert with keep_features, or use 'exact'")
            return self._covering(self.sources.features, steps)
        return self._evaluated(denoiser, steps, features, self._reads_both(denoiser, words))

    def _evaluated(
        self, denoiser: Denoiser, steps: dict[int, list[str]], features: Exact | ReferenceCache, both: bool
    ) -> ReferenceCache | None:
        """Exact features, from the cache where it is filled; None where there is no room for them and "auto" may do without."""
        storage = features if isinstance(features, ReferenceCache) else features.cache()
        if storage.steps:
            if both and len(storage.rows) == 1:
                raise InputError("the source features lack the unconditional half, which guided targets read; fill a new cache")
            return self._covering(storage, steps)
        room = room_for(self.backbone.network, steps, 1 + both, self._frame[1], storage.dtype)
        if (refusal := room.refusal(storage.max_bytes)) is not None:
            if isinstance(features, Auto):
                return None
            raise InputError(refusal)
        storage.frame = self._frame
        return evaluate_source(denoiser.select([0]), self.sampler, self.sources, steps, storage, both_halves=both)

    def _reads_both(self, denoiser: Denoiser, words: Sequence[Words]) -> bool:
        """Whether targets read the source's unconditional half too, and it differs from the conditional one."""
        source = denoiser.select([0])
        alike = all(self._alike(source, level) for level in range(1, len(denoiser.schedule) + 1))
        read = any(route.halves == "both" for route in self.control.program(self._run(words)).routes)
        return read and not alike and any(scale != 1 for scale in denoiser.guidance[1:])

    def _why_not(self, steps: dict[int, list[str]] | None) -> str:
        if not self.pinned:
            return "the source is not pinned"
        if steps is None:
            return "its controller needs the source's own rows"
        return "the inversion method evaluates each level more than once"

    @property
    def _frame(self) -> tuple[int, tuple[int, int]]:
        height, width = self.sources.latents.shape[-2:]
        return len(self.sources.schedule), (height, width)

    def _alike(self, source: Denoiser, level: int) -> bool:
        here = self.sampler.condition(source, level)
        return here.negative is not None and here.conditioning.equals(here.negative)

    def _covering(self, cache: ReferenceCache, steps: dict[int, list[str]]) -> ReferenceCache:
        if cache.frame is not None and cache.frame[1] != self._frame[1]:
            theirs, mine = (" x ".join(map(str, size)) for size in (cache.frame[1], self._frame[1]))
            raise InputError(f"the source features are of latents of size {theirs}, these are {mine}; keep them at this size")
        if cache.frame is not None and cache.frame[0] != self._frame[0]:
            raise InputError(
                f"the source features are of {cache.frame[0]} steps, these are {self._frame[0]}; they were kept for another "
                "controller or step count"
            )
        if cache.source is not None and cache.source != fingerprint(self.sources):
            raise InputError("the source features are of another inversion; keep them for this one, or fill a new cache")
        if missing := [step for step, paths in steps.items() if not cache.holds(step, paths)]:
            raise InputError(f"the source features lack step {missing[0]}; they were kept for another controller or step count")
        return cache

    def _batch(
        self,
        denoiser: Denoiser,
        start: Tensor,
        words: Sequence[Words],
        part: Sequence[int],
        reference: ReferenceCache | None,
        advance: Callable[[], Any],
        on_step: OnStep | None,
    ) -> Tensor:
        run, count = self._run(words), self.sources.latents.shape[1]
        with controlled(
            self.backbone.network,
            self.control,
            num_steps=run.num_steps,
            latent_size=run.latent_size,
            first_step=run.first_step,
            words=words,
            part=part,
            read_mask=self.read_mask,
            reference=reference,
        ) as session:
            return sample(
                denoiser,
                start,
                sampler=laid_out(self.sampler, session.reads_both_halves, run.num_steps, count, self.pinned),
                pin=self.sources if self.pinned else None,
                reads_source=session.reads_source,
                control=lambda step, batch: session.step(step, streams_of(batch, count)),
                after_step=self._after_step(session, count, advance, on_step),
            )

    def _after_step(
        self, session: Session, count: int, advance: Callable[[], Any], on_step: OnStep | None
    ) -> Callable[[int, Tensor], Tensor]:
        schedule = self.sources.schedule

        def after_step(level: int, z: Tensor) -> Tensor:
            advance()
            step = len(schedule) - level - 1
            z = torch.cat([z[:count], session.after(step, z[:1], z[count:])])
            if on_step is None:
                return z
            changed = on_step(step, schedule.timesteps[level + 1], {"latents": z})
            return z if changed is None else changed.get("latents", z)

        return after_step
