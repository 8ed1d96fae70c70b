"""The session: controlled() touches what it must, for as long as it must, and says so when it cannot work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from threading import Barrier
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from attention_control import ControlError, MasaCtrl, NoControl, Route, RoutedProcessor, Session, controlled, list_sites
from attention_control.streams import Streams, layout
from tests.attention_control.reference import (
    CONTROLLED_STEP,
    STEPS,
    Outputs,
    Routing,
    distance,
    evaluate,
    evaluate_controlled,
    evaluate_official,
    make_scene,
    official_rows,
    reading_source,
    same_bits,
    targets_of,
    unguided_rows,
)
from tests.helpers import tiny_unet

CLEAR = 1e-6
"""More than rounding in float64 by nine orders of magnitude: a difference this large was made by control."""
WHOLE_RUN = Routing([reading_source("10-15")])
SCENE = make_scene()


def _attach(unet: UNet2DConditionModel, controller: Any) -> AbstractContextManager[Session]:
    return controlled(unet, controller, num_steps=STEPS, latent_size=SCENE.size)


def _processors(unet: UNet2DConditionModel) -> dict[str, int]:
    return {name: id(processor) for name, processor in unet.attn_processors.items()}


# --- pass-through -------------------------------------------------------------------------------------------------------


def test_no_controller_is_bitwise_plain(unet: UNet2DConditionModel) -> None:
    plain = evaluate(unet, SCENE, official_rows())
    assert same_bits(evaluate_controlled(unet, NoControl(), SCENE, official_rows()), plain)


@pytest.mark.parametrize("step", range(4))
def test_steps_before_the_start_are_bitwise_plain(unet: UNet2DConditionModel, step: int) -> None:
    plain = evaluate(unet, SCENE, official_rows())
    assert same_bits(evaluate_controlled(unet, MasaCtrl(start_step=4), SCENE, official_rows(), step), plain)


@pytest.mark.parametrize(("step", "touched"), [(3, False), (4, True), (5, True), (6, False), (49, False)])
def test_the_window_holds_its_start_and_not_its_stop(unet: UNet2DConditionModel, step: int, touched: bool) -> None:
    plain = evaluate(unet, SCENE, official_rows())
    out = evaluate_controlled(unet, MasaCtrl(start_step=4, stop_step=6), SCENE, official_rows(), step)
    assert (distance(targets_of(out), plain) > CLEAR) is touched


def test_outside_of_a_step_the_block_is_bitwise_plain(unet: UNet2DConditionModel) -> None:
    plain = evaluate(unet, SCENE, official_rows())
    with _attach(unet, WHOLE_RUN) as session:
        assert same_bits(evaluate(unet, SCENE, official_rows()), plain)
        with session.step(CONTROLLED_STEP, official_rows()):
            evaluate(unet, SCENE, official_rows())
        assert same_bits(evaluate(unet, SCENE, official_rows()), plain)


def test_source_alone_is_left_to_the_users_own_processors(unet: UNet2DConditionModel) -> None:
    _give_every_site(unet, _ModuleProcessor)
    plain = evaluate(unet, SCENE, official_rows(0))
    assert same_bits(evaluate_controlled(unet, WHOLE_RUN, SCENE, official_rows(0)), plain)


def test_targets_need_no_source_where_no_route_is_active(unet: UNet2DConditionModel) -> None:
    alone = layout([("target", 0, "conditional")])
    plain = evaluate(unet, SCENE, alone)
    assert same_bits(evaluate_controlled(unet, MasaCtrl(start_step=4), SCENE, alone, step=0), plain)
    with pytest.raises(ControlError, match="no source row"):
        evaluate_controlled(unet, MasaCtrl(start_step=4), SCENE, alone, step=4)


class _Short:
    """A user's processor of the shortest signature."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None) -> Any:
        return AttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask)


def test_passing_through_reaches_processors_that_take_no_temb(unet: UNet2DConditionModel) -> None:
    unet.set_attn_processor(_Short())
    plain = evaluate(unet, SCENE, official_rows())
    assert same_bits(evaluate_controlled(unet, MasaCtrl(start_step=4), SCENE, official_rows(), step=0), plain)
    official = evaluate_official(unet, SCENE, official_rows())
    assert distance(evaluate_controlled(unet, MasaCtrl(), SCENE, official_rows()), official) <= 1e-10


def test_attention_slices_are_refused_with_the_remedy(unet: UNet2DConditionModel) -> None:
    unet.set_attention_slice(1)
    before = _processors(unet)
    with pytest.raises(ControlError, match="disable_attention_slicing"):
        evaluate_controlled(unet, MasaCtrl(), SCENE, official_rows())
    assert _processors(unet) == before


# --- nothing stays behind -----------------------------------------------------------------------------------------------


class _Interruption(RuntimeError):
    pass


@pytest.mark.parametrize("interruption", [None, _Interruption, KeyboardInterrupt, ControlError])
@pytest.mark.parametrize("inside_step", [True, False])
def test_the_same_processor_objects_are_back_whatever_happens(
    unet: UNet2DConditionModel, interruption: type[BaseException] | None, inside_step: bool
) -> None:
    before = _processors(unet)
    with pytest.raises(interruption) if interruption else nullcontext(), _attach(unet, WHOLE_RUN) as session:
        assert _processors(unet) != before
        with session.step(CONTROLLED_STEP, official_rows()):
            evaluate(unet, SCENE, official_rows())
            if interruption and inside_step:
                raise interruption
        if interruption:
            raise interruption
    assert _processors(unet) == before


def test_an_exception_inside_a_step_is_not_replaced_by_ours(unet: UNet2DConditionModel) -> None:
    with pytest.raises(_Interruption), _attach(unet, WHOLE_RUN) as session, session.step(CONTROLLED_STEP, official_rows()):
        raise _Interruption


def test_nothing_is_routed_after_a_step_that_failed(unet: UNet2DConditionModel) -> None:
    plain = evaluate(unet, SCENE, official_rows())
    with _attach(unet, WHOLE_RUN) as session:
        with pytest.raises(_Interruption), session.step(CONTROLLED_STEP, official_rows()):
            raise _Interruption
        assert same_bits(evaluate(unet, SCENE, official_rows()), plain)


def test_afterwards_the_unet_is_bitwise_plain(unet: UNet2DConditionModel) -> None:
    plain = evaluate(unet, SCENE, official_rows())
    assert distance(targets_of(evaluate_controlled(unet, WHOLE_RUN, SCENE, official_rows())), plain) > CLEAR
    assert same_bits(evaluate(unet, SCENE, official_rows()), plain)


def _whole_run(unet: UNet2DConditionModel, controller: Any, steps: int = 6) -> list[Outputs]:
    outputs = []
    with controlled(unet, controller, num_steps=steps, latent_size=SCENE.size) as session:
        for step in range(steps):
            with session.step(step, official_rows()):
                outputs.append(evaluate(unet, SCENE, official_rows()))
    return outputs


def test_a_second_run_of_the_same_controller_equals_the_first_bitwise(unet: UNet2DConditionModel) -> None:
    controller = MasaCtrl(start_step=2)
    first, second = _whole_run(unet, controller), _whole_run(unet, controller)
    assert distance(targets_of(first[2]), first[0]) > CLEAR, "the run was never controlled, so this would compare nothing"
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_state_dict_keys_are_unchanged_inside(unet: UNet2DConditionModel) -> None:
    before = list(unet.state_dict())
    with _attach(unet, Routing([reading_source("0-")])):
        assert list(unet.state_dict()) == before
        assert not any(isinstance(module, RoutedProcessor) for module in unet.modules())
    assert list(unet.state_dict()) == before


class _ModuleProcessor(nn.Module):
    """What LoRA and IP-Adapter processors are: a module with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.plain = AttnProcessor2_0()

    def forward(self, attn: nn.Module, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return self.scale * self.plain(attn, hidden_states, **kwargs)


def _give_every_site(unet: UNet2DConditionModel, make: Callable[[], Any]) -> dict[str, Any]:
    given = {name: make() for name in unet.attn_processors}
    unet.set_attn_processor(dict(given))
    return given


def test_module_processors_come_back_as_the_same_registered_objects(unet: UNet2DConditionModel) -> None:
    given = _give_every_site(unet, _ModuleProcessor)
    keys, plain = set(unet.state_dict()), evaluate(unet, SCENE, official_rows())
    early = evaluate_controlled(unet, MasaCtrl(start_step=4), SCENE, official_rows(), step=0)
    assert same_bits(early, plain), "the user's own processor was not passed through to"
    assert all(unet.get_submodule(name) is processor for name, processor in given.items())
    assert set(unet.state_dict()) == keys
    assert same_bits(evaluate(unet, SCENE, official_rows()), plain)


class _OwnProcessor(AttnProcessor2_0):
    """A user's own processor: a plain object."""


def test_unrouted_sites_keep_the_users_own_objects(unet: UNet2DConditionModel) -> None:
    given = _give_every_site(unet, _OwnProcessor)
    routed = {f"{site.path}.processor" for site in list_sites(unet)[10:]}
    with _attach(unet, WHOLE_RUN):
        inside = unet.attn_processors
        assert {name for name in given if inside[name] is not given[name]} == routed
        assert {type(inside[name]) for name in routed} == {RoutedProcessor}


# --- refusals -----------------------------------------------------------------------------------------------------------


def _refused(unet: UNet2DConditionModel, controller: Any, message: str) -> None:
    before = _processors(unet)
    with pytest.raises(ControlError, match=message), _attach(unet, controller):
        pytest.fail("attached all the same")
    assert _processors(unet) == before, "a refusal must leave the UNet as it was"


@pytest.mark.parametrize("sites", ["16-", "up_blocks.0", "tokens<=3"])
def test_a_selector_that_matches_no_site_is_refused(unet: UNet2DConditionModel, sites: str) -> None:
    _refused(unet, MasaCtrl(sites=sites), f"{sites}.*none of the UNet's 16")


@pytest.mark.parametrize(("start", "stop"), [(50, 1.0), (1.0, 1.0), (10, 10), (10, 5), (0, 0.0), (0.08, 1)])
def test_a_window_that_holds_no_step_is_refused(unet: UNet2DConditionModel, start: float | int, stop: float | int) -> None:
    _refused(unet, MasaCtrl(start_step=start, stop_step=stop), "none of the run's 50 steps")


@pytest.mark.parametrize("inner_sites", ["10-15", "0-5"])
def test_attaching_twice_is_refused_and_the_first_goes_on(unet: UNet2DConditionModel, inner_sites: str) -> None:
    with _attach(unet, WHOLE_RUN) as session:
        _refused(unet, MasaCtrl(sites=inner_sites), "already under attention control")
        with session.step(CONTROLLED_STEP, official_rows()):
            out = evaluate(unet, SCENE, official_rows())
    assert same_bits(out, evaluate_controlled(unet, WHOLE_RUN, SCENE, official_rows()))


def test_fused_projections_are_refused_until_unfused(unet: UNet2DConditionModel) -> None:
    unet.fuse_qkv_projections()
    _refused(unet, MasaCtrl(), r"unfuse_qkv_projections\(\)")
    unet.unfuse_qkv_projections()
    out = evaluate_controlled(unet, MasaCtrl(), SCENE, official_rows())
    assert distance(out, evaluate_official(unet, SCENE, official_rows())) <= 1e-10


def test_processors_replaced_meanwhile_are_an_error_at_the_end_of_the_step(unet: UNet2DConditionModel) -> None:
    originals = {site.path: site.module.processor for site in list_sites(unet)[10:]}
    with _attach(unet, WHOLE_RUN) as session:
        with session.step(CONTROLLED_STEP, official_rows()):
            evaluate(unet, SCENE, official_rows())
        unet.set_attn_processor(AttnProcessor())
        with pytest.raises(ControlError, match="bypassed"), session.step(CONTROLLED_STEP + 1, official_rows()):
            evaluate(unet, SCENE, official_rows())
    assert all(unet.get_submodule(path).processor is processor for path, processor in originals.items())


def test_one_replaced_processor_is_enough_and_is_named(unet: UNet2DConditionModel) -> None:
    path = "up_blocks.3.attentions.1.transformer_blocks.0.attn1"
    with _attach(unet, WHOLE_RUN) as session:
        unet.get_submodule(path).set_processor(AttnProcessor())
        with pytest.raises(ControlError, match=path), session.step(CONTROLLED_STEP, official_rows()):
            evaluate(unet, SCENE, official_rows())


@pytest.mark.parametrize("called_with", [official_rows(2), unguided_rows(1), unguided_rows(0)])
def test_a_batch_of_another_size_than_declared_is_refused(unet: UNet2DConditionModel, called_with: Streams) -> None:
    with (
        _attach(unet, WHOLE_RUN) as session,
        pytest.raises(ControlError, match=f"{len(called_with)} rows, but the step declared 4"),
        session.step(CONTROLLED_STEP, official_rows()),
    ):
        evaluate(unet, make_scene(targets=2), called_with)


@pytest.mark.parametrize("step", [-1, STEPS, STEPS + 5])
def test_a_step_the_run_does_not_have_is_refused(unet: UNet2DConditionModel, step: int) -> None:
    with pytest.raises(ControlError, match=f"step {step} .*0 to 49"):
        evaluate_controlled(unet, WHOLE_RUN, SCENE, official_rows(), step)


# --- routes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suppliers", list(product(("own", "source"), repeat=3)), ids="-".join)
def test_a_route_becomes_rows_of_the_batch(unet: UNet2DConditionModel, suppliers: tuple[Any, Any, Any]) -> None:
    site, rows = list_sites(unet)[10], {"own": [0, 1, 2, 3], "source": [0, 0, 2, 2]}
    with _attach(unet, Routing([Route(*suppliers, sites="10")])) as session, session.step(0, official_rows()):
        evaluate(unet, SCENE, official_rows())
        plan = session.plan_for(site.path, 4)
    assert plan is not None
    assert [list(plan.query), list(plan.key), list(plan.value)] == [rows[supplier] for supplier in suppliers]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [official_rows, unguided_rows])
def test_the_identity_route_is_bitwise_plain(unet: UNet2DConditionModel, rows: Any, dtype: torch.dtype) -> None:
    """Every site goes through the routed processor, which then must compute what diffusers' own does."""
    unet, scene, streams = unet.to(dtype), SCENE.to(dtype), rows()
    plain = evaluate(unet, scene, streams)
    with _attach(unet, Routing([Route("own", "own", "own", "0-")])) as session, session.step(0, streams):
        out = evaluate(unet, scene, streams)
        assert all(session.plan_for(site.path, len(streams)) is not None for site in list_sites(unet))
    assert next(iter(out.values())).dtype == dtype
    assert same_bits(out, plain)
    moved = evaluate_controlled(unet, Routing([reading_source("0-")]), scene, streams)
    assert not same_bits(moved, plain), "another route would be told apart"


# --- several routes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "routes",
    [
        [reading_source("10-15"), reading_source("10-15")],
        [reading_source("10-12"), reading_source("up_blocks.2")],
        [reading_source("0-", 0, 5), reading_source("15", 4, 50)],
        [reading_source("10-15", 0, 0.5), reading_source("10-15", 20)],
    ],
)
def test_two_routes_at_one_site_and_step_are_refused(unet: UNet2DConditionModel, routes: Sequence[Route]) -> None:
    _refused(unet, Routing(routes), "two routes meet at .* at step")


def test_the_meeting_is_named(unet: UNet2DConditionModel) -> None:
    routes = Routing([reading_source("0-14", 0, 7), reading_source("13", 5)])
    _refused(unet, routes, r"up_blocks\.3\.attentions\.0\.transformer_blocks\.0\.attn1 at step 5")


def test_disjoint_windows_at_one_site_each_act_in_their_own(unet: UNet2DConditionModel) -> None:
    early, late = reading_source("10-15", 0, 20, share=0.5), reading_source("10-15", 20)
    both = Routing([early, late])
    for step, alone in ((19, early), (20, late)):
        out = evaluate_controlled(unet, both, SCENE, official_rows(), step)
        assert same_bits(out, evaluate_controlled(unet, Routing([alone]), SCENE, official_rows(), step))


def test_disjoint_sites_at_one_step_equal_one_route_over_both(unet: UNet2DConditionModel) -> None:
    apart = Routing([reading_source("10-12"), reading_source("13-15")])
    out = evaluate_controlled(unet, apart, SCENE, official_rows())
    assert same_bits(out, evaluate_controlled(unet, WHOLE_RUN, SCENE, official_rows()))


def test_reads_source_exactly_in_the_steps_of_some_route(unet: UNet2DConditionModel) -> None:
    with _attach(unet, Routing([reading_source("10", 4, 6), reading_source("11", 9, 10)])) as session:
        assert [step for step in range(STEPS) if session.reads_source(step)] == [4, 5, 9]
    with _attach(unet, NoControl()) as session:
        assert not any(session.reads_source(step) for step in range(STEPS))


# --- two UNets ----------------------------------------------------------------------------------------------------------

CONTROLLERS_OF_TWO = (MasaCtrl(start_step=0), MasaCtrl(start_step=0, sites="0-9", strength=0.5))


def _two_unets() -> list[UNet2DConditionModel]:
    return [tiny_unet(seed) for seed in (0, 1)]


def _each_alone() -> list[list[Outputs]]:
    return [_whole_run(unet, controller) for unet, controller in zip(_two_unets(), CONTROLLERS_OF_TWO, strict=True)]


def test_two_unets_controlled_at_once_do_not_meet() -> None:
    first, second = _two_unets()
    with (
        _attach(first, CONTROLLERS_OF_TWO[0]) as one,
        _attach(second, CONTROLLERS_OF_TWO[1]) as two,
        one.step(0, official_rows()),
        two.step(0, official_rows()),
    ):
        outputs = evaluate(first, SCENE, official_rows()), evaluate(second, SCENE, official_rows())
    assert all(same_bits(out, alone[0]) for out, alone in zip(outputs, _each_alone(), strict=True))


def test_two_unets_in_two_threads_do_not_meet() -> None:
    together = Barrier(2, timeout=30)

    def run(unet: UNet2DConditionModel, controller: MasaCtrl) -> list[Outputs]:
        outputs = []
        with torch.no_grad(), controlled(unet, controller, num_steps=6, latent_size=SCENE.size) as session:
            for step in range(6):
                with session.step(step, official_rows()):
                    together.wait()
                    outputs.append(evaluate(unet, SCENE, official_rows()))
                    together.wait()
        return outputs

    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(run, _two_unets(), CONTROLLERS_OF_TWO))
    for run_, alone in zip(runs, _each_alone(), strict=True):
        assert all(same_bits(a, b) for a, b in zip(run_, alone, strict=True))
