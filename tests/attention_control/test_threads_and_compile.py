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

from attention_control import (
    CONTROLLERS,
    Compose,
    ControlError,
    MasaCtrl,
    ObjectAdd,
    PlugAndPlay,
    Portrait,
    PromptToPrompt,
    ReferenceCache,
    StreamRow,
    Streams,
    Structure,
    StyleAligned,
    controlled,
    list_sites,
    recording,
)
from attention_control.streams import layout
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
    unguided_rows,
)
from tests.helpers import tiny_unet

SCENE, STREAMS, STEPS = make_scene(), official_rows(), 8


def _whole_run(
    unet: UNet2DConditionModel,
    controller: Any,
    around: Callable[[], Any] = lambda: None,
    steps: int = STEPS,
    streams: Streams = STREAMS,
) -> list[Outputs]:
    outputs = []
    with (
        torch.no_grad(),
        controlled(unet, controller, num_steps=steps, latent_size=SCENE.size, words=WORDS[:2]) as session,
    ):
        for step in range(steps):
            with session.step(step, streams):
                around()
                outputs.append(evaluate(unet, SCENE, streams))
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
    """Three self-attention sites: dynamo takes most of a second for every site of every graph."""
    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(16,),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",),
        )
        .double()
        .eval()
    )


def _compiled_run(
    unet: UNet2DConditionModel, controller: Any, graphs: list[fx.GraphModule], streams: Callable[[], Streams] = official_rows
) -> list[bool]:
    """Whether each step moves the targets. The compiled UNet must agree with the eager one, within three graphs."""
    expected, plain = _whole_run(unet, controller, streams=streams()), evaluate(unet, SCENE, streams())
    latents, text = SCENE.batch(streams())
    compiled, outputs = torch.compile(unet, backend=_counting(graphs)), []
    with controlled(unet, controller, num_steps=STEPS, latent_size=SCENE.size, words=WORDS[:2]) as session:
        for step in range(STEPS):
            with session.step(step, streams()):
                sample = compiled(latents, TIMESTEP, text).sample
            outputs.append(dict(zip(streams().rows, sample, strict=True)))
    assert all(distance(a, b) <= EXACT for a, b in zip(outputs, expected, strict=True))
    assert 1 <= len(graphs) <= 3, f"{len(graphs)} graphs in {STEPS} steps"
    return [distance(targets_of(out), plain) > CLEAR for out in outputs]


def _two_sources() -> Streams:
    halves = ("unconditional", "conditional")
    return layout([("source", 0, "conditional"), ("source", 1, "conditional"), *(("target", 0, half) for half in halves)])


FEATURE = "up_blocks.0.resnets.0.conv2"
BLENDED = {"blend_source": "red", "blend_target": "red"}
FOLLOWING = {"cross_steps": 6, "self_steps": 3, "word_steps": {"red": 4}, "reweight": {"red": 2.0}}
WINDOW = {"sites": "1-", "start_step": 3, "stop_step": 6}
POINTED = {"source_words": "red", "target_words": "red", "mask_threshold": 0.4}
COMPILED: dict[str, tuple[Any, list[int]]] = {
    "masactrl": (MasaCtrl(**WINDOW), [3, 4, 5]),
    "prompt_to_prompt": (PromptToPrompt(sites="0-", **FOLLOWING, **BLENDED), [*range(6)]),
}
"""One that changes routes alone, and one that looks at more, with the steps that they must move."""
OTHERS: dict[str, tuple[Any, list[int]]] = {
    "plug_and_play": (PlugAndPlay(sites="0-", feature=FEATURE, feature_stop_step=6), [*range(6)]),
    "masactrl, union": (MasaCtrl(**WINDOW, strength=0.5), [3, 4, 5]),
    "masactrl, masks": (MasaCtrl(**WINDOW, source_mask=torch.eye(16), target_mask=torch.eye(16)), [3, 4, 5]),
    "masactrl, words from the first step": (MasaCtrl(sites="0-", start_step=0, stop_step=6, **POINTED), [*range(6)]),
    "object_add": (ObjectAdd("ball", (0.25, 0.25, 0.75, 0.75)), [*range(4)]),
    "masactrl, words": (MasaCtrl(**WINDOW, **POINTED, keep_background=True), [3, 4, 5]),
    "structure": (Structure(sites="0-", stop_step=6), [*range(6)]),
    "style_aligned": (StyleAligned(stop_step=6), [*range(6)]),
    "portrait": (Portrait(sites="0-"), [*range(8)]),
    "compose": (Compose((Structure(sites="0-", stop_step=3), MasaCtrl(sites="0-", start_step=5))), [0, 1, 2, 5, 6, 7]),
}


@pytest.mark.parametrize(("controller", "acting"), COMPILED.values(), ids=COMPILED.keys())
def test_a_controlled_run_compiles_to_three_graphs_at_most(
    graphs: list[fx.GraphModule], controller: Any, acting: list[int]
) -> None:
    moved = _compiled_run(_small_unet(), controller, graphs)
    assert [step for step in range(STEPS) if moved[step]] == acting


@pytest.mark.slow
@pytest.mark.parametrize(("controller", "acting"), OTHERS.values(), ids=OTHERS.keys())
def test_every_other_controller_compiles_to_three_graphs_at_most(
    graphs: list[fx.GraphModule], controller: Any, acting: list[int]
) -> None:
    rows = _two_sources if controller.name == "portrait" else official_rows
    moved = _compiled_run(_small_unet(), controller, graphs, rows)
    assert [step for step in range(STEPS) if moved[step]] == acting


def test_every_controller_is_compiled() -> None:
    assert {controller.name for controller, _ in (COMPILED | OTHERS).values()} == CONTROLLERS.keys() - {"none"}


def test_kept_source_features_are_read_without_another_graph_for_every_step(graphs: list[fx.GraphModule]) -> None:
    unet, cache = _small_unet(), ReferenceCache((StreamRow("source", 0, "conditional"),))
    alone, targets = unguided_rows(0), layout([("target", 0, "conditional")])
    with recording(unet, [site.path for site in list_sites(unet)], cache) as recorder:
        for step in range(STEPS):
            recorder.at([step])
            unet((1 + step / STEPS) * SCENE.batch(alone)[0], TIMESTEP, SCENE.batch(alone)[1])
    compiled, (latents, text) = torch.compile(unet, backend=_counting(graphs)), SCENE.batch(targets)
    seen = []
    with controlled(unet, MasaCtrl(**WINDOW), num_steps=STEPS, latent_size=SCENE.size, reference=cache) as session:
        for step in range(STEPS):
            with session.step(step, targets):
                expected = unet(latents, TIMESTEP, text).sample
            with session.step(step, targets):
                seen.append(compiled(latents, TIMESTEP, text).sample)
            assert (seen[-1] - expected).abs().max() <= EXACT
    assert (seen[3] - seen[4]).abs().max() > CLEAR, "each step has features of its own"
    assert len(graphs) == 2


def test_features_of_a_unet_that_was_compiled_without_control_are_no_silent_loss(graphs: list[fx.GraphModule]) -> None:
    unet, controller = _small_unet(), PlugAndPlay(stop_step=0, feature=FEATURE)
    compiled, (latents, text) = torch.compile(unet, backend=_counting(graphs)), SCENE.batch(STREAMS)
    compiled(latents, TIMESTEP, text)
    with controlled(unet, controller, num_steps=STEPS, latent_size=SCENE.size) as session:
        with pytest.raises(ControlError, match=rf"bypassed at {FEATURE}.*torch\.compiler\.reset"), session.step(0, STREAMS):
            compiled(latents, TIMESTEP, text)
        torch.compiler.reset()
        with session.step(0, STREAMS):
            sample = compiled(latents, TIMESTEP, text).sample
    expected = _whole_run(unet, controller)[0]
    assert distance(dict(zip(STREAMS.rows, sample, strict=True)), expected) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_controlled_run_of_every_block_compiles_to_three_graphs_at_most(
    unet: UNet2DConditionModel, graphs: list[fx.GraphModule], strength: float
) -> None:
    moved = _compiled_run(unet, MasaCtrl(start_step=3, stop_step=6, strength=strength), graphs)
    assert [step for step in range(STEPS) if moved[step]] == [3, 4, 5]
