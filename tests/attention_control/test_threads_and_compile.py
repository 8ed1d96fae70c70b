"""Control beside other work: hooks and maps of two UNets in two threads, and torch.compile over a controlled run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, fx

from attention_control import MasaCtrl, PlugAndPlay, StyleAligned, controlled
from tests.attention_control.explicit import CLEAR, EXACT
from tests.attention_control.reference import (
    TIMESTEP,
    WORDS,
    Outputs,
    distance,
    evaluate,
    make_scene,
    official_rows,
    same_bits,
    targets_of,
)
from tests.helpers import tiny_unet

SCENE, STREAMS, STEPS = make_scene(), official_rows(), 8


def _whole_run(
    unet: UNet2DConditionModel, controller: Any, around: Callable[[], Any] = lambda: None, steps: int = STEPS
) -> list[Outputs]:
    outputs = []
    with (
        torch.no_grad(),
        controlled(unet, controller, num_steps=steps, latent_size=SCENE.size, words=WORDS[:2]) as session,
    ):
        for step in range(steps):
            with session.step(step, STREAMS):
                around()
                outputs.append(evaluate(unet, SCENE, STREAMS))
                around()
    return outputs


# --- two threads --------------------------------------------------------------------------------------------------------


def test_hooks_and_maps_of_two_threads_do_not_meet() -> None:
    """Routes alone are in `test_session`; here one run copies features and the other collects maps."""
    controllers = (PlugAndPlay(), MasaCtrl(source_words="red", target_words="red", mask_threshold=0.4))
    alone = [_whole_run(tiny_unet(seed), controller, steps=3) for seed, controller in enumerate(controllers)]
    together = Barrier(2, timeout=30)
    with ThreadPoolExecutor(2) as pool:
        unets = [tiny_unet(seed) for seed in range(2)]
        runs = list(pool.map(lambda unet, controller: _whole_run(unet, controller, together.wait, 3), unets, controllers))
    assert distance(targets_of(runs[0][1]), runs[1][1]) > CLEAR
    for run, expected in zip(runs, alone, strict=True):
        assert all(same_bits(a, b) for a, b in zip(run, expected, strict=True))


def test_one_controller_object_serves_two_threads() -> None:
    controller, together = StyleAligned(), Barrier(2, timeout=30)
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda unet: _whole_run(unet, controller, together.wait, 3), [tiny_unet(), tiny_unet()]))
    expected = _whole_run(tiny_unet(), controller, steps=3)
    for run in runs:
        assert all(same_bits(a, b) for a, b in zip(run, expected, strict=True))


# --- torch.compile ------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs() -> Iterator[list[fx.GraphModule]]:
    """Every graph that was compiled since the test began."""
    compiled: list[fx.GraphModule] = []
    torch._dynamo.reset()
    yield compiled
    torch._dynamo.reset()


def _counting(compiled: list[fx.GraphModule]) -> Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]:
    def backend(graph: fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    return backend


def _small_unet() -> UNet2DConditionModel:
    """Four self-attention sites: dynamo takes most of a second for every site of every graph."""
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        .double()
        .eval()
    )


def _compiled_run(unet: UNet2DConditionModel, controller: MasaCtrl, graphs: list[fx.GraphModule]) -> None:
    expected, plain = _whole_run(unet, controller), evaluate(unet, SCENE, STREAMS)
    latents, text = SCENE.batch(STREAMS)
    compiled, outputs = torch.compile(unet, backend=_counting(graphs)), []
    with controlled(unet, controller, num_steps=STEPS, latent_size=SCENE.size) as session:
        for step in range(STEPS):
            with session.step(step, STREAMS):
                sample = compiled(latents, TIMESTEP, text).sample
            outputs.append(dict(zip(STREAMS.rows, sample, strict=True)))
    assert all(distance(a, b) <= EXACT for a, b in zip(outputs, expected, strict=True))
    assert distance(targets_of(outputs[3]), plain) > CLEAR
    assert distance(outputs[0], plain) <= EXACT
    assert distance(outputs[-1], plain) <= EXACT
    assert 1 <= len(graphs) <= 3, f"{len(graphs)} graphs in {STEPS} steps"


def test_a_controlled_run_compiles_to_three_graphs_at_most(graphs: list[fx.GraphModule]) -> None:
    _compiled_run(_small_unet(), MasaCtrl(sites="1-", start_step=3, stop_step=6), graphs)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_controlled_run_of_every_block_compiles_to_three_graphs_at_most(
    unet: UNet2DConditionModel, graphs: list[fx.GraphModule], strength: float
) -> None:
    _compiled_run(unet, MasaCtrl(start_step=3, stop_step=6, strength=strength), graphs)
