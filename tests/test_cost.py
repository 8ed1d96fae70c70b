"""Cost is counted on the network itself."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from easyinv_edit.cost import Cost, measured
from tests.helpers import tiny_unet


class Echo(nn.Module):
    """A network of one parameter that takes its sample by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample


def hooks(network: nn.Module) -> int:
    return len(network._forward_pre_hooks)


def test_rows_and_calls_are_counted() -> None:
    network = Echo()
    with measured(network) as cost:
        network(torch.zeros(3, 4))
        network(sample=torch.zeros(2, 4))
    network(torch.zeros(9, 4))
    assert (cost.evaluations, cost.calls) == (5, 2)


def test_a_unet_is_counted_however_it_is_called() -> None:
    unet = tiny_unet()
    text = torch.zeros(2, 3, 16, dtype=torch.float64)
    z = torch.zeros(2, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad(), measured(unet) as cost:
        unet(z, 1, encoder_hidden_states=text)
        unet(sample=z[:1], timestep=1, encoder_hidden_states=text[:1])
    assert (cost.evaluations, cost.calls) == (3, 2)


def test_nothing_run_costs_nothing() -> None:
    with measured(Echo()) as cost:
        pass
    assert (cost.evaluations, cost.calls) == (0, 0)


def test_measurements_may_be_nested() -> None:
    network = Echo()
    with measured(network) as outer:
        network(torch.zeros(1))
        with measured(network) as inner:
            network(torch.zeros(2))
    assert (outer.evaluations, inner.evaluations) == (3, 2)


def interrupted(network: nn.Module, costs: list[Cost]) -> None:
    with measured(network) as cost:
        costs.append(cost)
        network(torch.zeros(2))
        assert hooks(network) == 1
        raise KeyboardInterrupt


def test_the_hook_goes_and_the_cost_is_complete_after_an_exception() -> None:
    network, costs = Echo(), list[Cost]()
    with pytest.raises(KeyboardInterrupt):
        interrupted(network, costs)
    assert hooks(network) == 0
    network(torch.zeros(5))
    assert (costs[0].evaluations, costs[0].calls) == (2, 1)
    assert costs[0].seconds > 0
    assert costs[0].peak_memory_bytes > 0


def test_seconds_are_wall_clock() -> None:
    with measured(Echo()) as cost:
        time.sleep(0.02)
    assert 0.02 <= cost.seconds < 2


def test_peak_memory_is_in_bytes() -> None:
    """A process with torch loaded holds tens of megabytes: a count in kilobytes would be far below."""
    with measured(Echo()) as cost:
        pass
    assert cost.peak_memory_bytes > 30e6
