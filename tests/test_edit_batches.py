"""Prompts in batches: what fits into memory decides how many at once, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from attention_control import ReferenceCache
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory

T = 4
PROMPTS = ["a ball", "a cone", "a cube", "a ring", "a green ball"]
CONTROL = {"name": "masactrl", "start_step": 1}


@pytest.fixture
def made(untrained: EditPipeline, picture: Image.Image) -> Trajectory:
    return untrained.invert(picture, "", "ddim", num_inference_steps=T)


def edited(pipe: EditPipeline, made: Trajectory, **options: Any) -> Any:
    return pipe.edit(made, PROMPTS, control=CONTROL, guidance_scale=3.0, output_type="latent", **options)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    untrained: EditPipeline, made: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, predict, refused = edited(untrained, made).images, untrained.backbone.predict, []

    def small(z: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if z.shape[0] > 5:
            refused.append(z.shape[0])
            raise torch.OutOfMemoryError("no more than five rows")
        return predict(z, *arguments)

    monkeypatch.setattr(untrained.backbone, "predict", small)
    assert relative(edited(untrained, made).images, expected) < 1e-5
    assert refused[:2] == [10, 6], "five targets, then three; two fit"


def test_one_prompt_that_does_not_fit_is_an_error(
    untrained: EditPipeline, made: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("nothing fits")

    monkeypatch.setattr(untrained.backbone, "predict", never)
    with pytest.raises(torch.OutOfMemoryError):
        edited(untrained, made, source_features="live")


def test_an_empty_cache_is_filled_and_serves_again_for_nothing(untrained: EditPipeline, made: Trajectory) -> None:
    cache = ReferenceCache(max_bytes=10_000_000)
    first = edited(untrained, made, source_features=cache)
    assert 0 < cache.bytes <= 10_000_000
    assert cache.steps == [1, 2, 3]
    again = edited(untrained, made, source_features=cache)
    assert torch.equal(first.images, again.images)
    assert first.cost["edit"].evaluations - again.cost["edit"].evaluations == 3
    assert relative(first.images, edited(untrained, made).images) < 1e-5


def test_half_precision_features_take_half_the_room(untrained: EditPipeline, made: Trajectory) -> None:
    full, half = ReferenceCache(), ReferenceCache(dtype=torch.float16)
    exact, rounded = (edited(untrained, made, source_features=cache).images for cache in (full, half))
    assert half.bytes * 2 == full.bytes
    assert 0 < relative(rounded, exact) < 1e-2
