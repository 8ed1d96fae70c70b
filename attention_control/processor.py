"""The one routed attention processor.

It computes attention exactly as diffusers' default processor does, except that each row may be given another row's queries,
keys and values. It is put on routed sites only and passes through to the processor it replaced while no route is active.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class RowPlan:
    """For every batch row, the batch rows its queries, keys and values come from; share: see `Route`."""

    query: Sequence[int]
    key: Sequence[int]
    value: Sequence[int]
    share: float = 1.0


class PlanSource(Protocol):
    """What a processor asks at each call: the rows to route at this site now, or None to pass through."""

    def plan_for(self, path: str, batch_rows: int) -> RowPlan | None: ...


class RoutedProcessor:
    """A plain object, no nn.Module: it must not enter the UNet's state dict. `_attention_backend` lets diffusers' attention
    backends reach it."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, path: str, inner: Any, plans: PlanSource) -> None:
        self.path, self.inner, self.plans = path, inner, plans

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states (batch, tokens, channels) -> the same shape; the rest goes to the replaced processor as it came."""
        plan = self.plans.plan_for(self.path, hidden_states.shape[0])
        if plan is None:
            return self.inner(attn, hidden_states, *args, **kwargs)
        x = hidden_states if attn.group_norm is None else attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = (rearrange(f(x), "b n (h d) -> b n h d", h=attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        out = self._attend(query, key, value, plan)
        out = attn.to_out[1](attn.to_out[0](rearrange(out, "b n h d -> b n (h d)")))
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, plan: RowPlan) -> Tensor:
        """All (batch, tokens, heads, dim)."""
        routed_key, routed_value, bias = key[list(plan.key)], value[list(plan.value)], None
        if plan.share < 1:
            routed_key, routed_value = torch.cat([routed_key, key], 1), torch.cat([routed_value, value], 1)
            bias = _log_weights(plan.share, key)
        return dispatch_attention_fn(
            query[list(plan.query)], routed_key, routed_value, attn_mask=bias, backend=self._attention_backend
        )


def _log_weights(share: float, key: Tensor) -> Tensor:
    """(1, 1, 1, 2 tokens): log(share) for the source's keys, log(1 - share) for a row's own; finite in half precision."""
    floor = -1e4
    logs = [math.log(w) if w > 0 else floor for w in (share, 1 - share)]
    return torch.tensor(logs, dtype=key.dtype, device=key.device).repeat_interleave(key.shape[1])[None, None, None]
