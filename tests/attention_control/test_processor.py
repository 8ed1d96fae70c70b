"""The routed processor alone, on one attention layer: rows come from where the plan says, the rest is diffusers' default."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from attention_control import RoutedProcessor, processor
from attention_control.processor import RowPlan
from tests.attention_control.reference import explicit_attention, split_heads

OWN = (0, 1, 2)
SWAPPED = (2, 0, 1)
STATES = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass
class _Always:
    """A plan source that gives one plan, or none."""

    plan: RowPlan | None

    def plan_for(self, path: str, batch_rows: int) -> RowPlan | None:
        assert (path, batch_rows) == ("here", 3)
        return self.plan

    def record(self, path: str, hidden_states: Tensor) -> None:
        assert (path, hidden_states.shape) == ("here", STATES.shape)


def _layer(**settings: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(16, heads=4, dim_head=4, **settings).double().eval()


def _routed(layer: Attention, plan: RowPlan | None) -> Tensor:
    own = layer.processor
    layer.set_processor(RoutedProcessor("here", own, _Always(plan)))
    out = layer(STATES)
    layer.set_processor(own)
    return out


@pytest.mark.parametrize(("query", "key", "value"), list(product([OWN, SWAPPED], repeat=3)))
def test_queries_keys_and_values_come_from_the_rows_planned(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
) -> None:
    layer = _layer()
    rows = zip((query, key, value), (layer.to_q, layer.to_k, layer.to_v), strict=True)
    attended = explicit_attention(*(split_heads(project(STATES[list(index)]), 4) for index, project in rows))
    expected = layer.to_out[0](attended.transpose(1, 2).flatten(2))
    assert (_routed(layer, RowPlan(OWN, query, key, value)) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("share", [1.0, 0.7])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": True, "out_bias": False},
        {"norm_num_groups": 4},
        {"qk_norm": "layer_norm"},
        {"residual_connection": True, "rescale_output_factor": 2.0},
    ],
    ids=str,
)
def test_rows_that_read_themselves_get_the_default_processors_answer(settings: dict[str, Any], share: float) -> None:
    layer = _layer(**settings)
    assert (_routed(layer, RowPlan(OWN, OWN, OWN, OWN, share=share)) - layer(STATES)).abs().max() <= 1e-12


def test_no_plan_is_bitwise_the_replaced_processor() -> None:
    layer = _layer()
    assert torch.equal(_routed(layer, None), layer(STATES))


@pytest.mark.parametrize(("share", "keys"), [(1.0, 5), (0.5, 10)])
def test_own_keys_cost_nothing_where_they_are_not_looked_at(monkeypatch: pytest.MonkeyPatch, share: float, keys: int) -> None:
    seen = []

    def record(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        seen.append((key.shape[1], value.shape[1]))
        return query

    monkeypatch.setattr(processor, "dispatch_attention_fn", record)
    _routed(_layer(), RowPlan(OWN, OWN, SWAPPED, SWAPPED, share=share))
    assert seen == [(keys, keys)]
