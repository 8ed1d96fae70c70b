"""The routed attention processors.

`RoutedProcessor` computes self-attention exactly as diffusers' default processor does, except that each row may be given
another row's queries, keys and values. `CrossProcessor` lets cross-attention be watched and changed. Both are put on the sites
that need them only and pass through to the processor they replaced while nothing is to be done.
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

from attention_control.cross_maps import probabilities
from attention_control.masks import readable

FLOOR = -1e4  # the logarithm of nothing: finite in half precision


@dataclass(frozen=True, eq=False)
class RowPlan:
    """What one site does in one call.

    Positions count the reference's rows first, then the batch's. routed: batch positions whose attention is routed, the others
    attending to themselves; query, key, value: for every routed row, the position that supplies it; source: for every routed
    row, the position of its source; share, adain, away: see `Route`; reference: layer inputs (rows, tokens, channels) of source
    rows that are not in the batch; key_mask, query_mask: (routed rows, tokens) foreground of the source and of the row.
    """

    routed: Sequence[int]
    query: Sequence[int]
    key: Sequence[int]
    value: Sequence[int]
    source: Sequence[int] = ()
    share: float = 1.0
    adain: bool = False
    away: float = 1.0
    reference: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None


class PlanSource(Protocol):
    """What processors ask at each call."""

    def plan_for(self, path: str, batch_rows: int) -> RowPlan | None:
        """The rows to route at this self-attention site now, or None to pass through."""

    def record(self, path: str, hidden_states: Tensor) -> None:
        """Told what goes into a site."""


class RoutedProcessor:
    """A plain object, no nn.Module: it must not enter the UNet's state dict. `_attention_backend` lets diffusers' attention
    backends reach it."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, path: str, inner: Any, plans: PlanSource) -> None:
        self.path, self.inner, self.plans = path, inner, plans

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states (batch, tokens, channels) -> the same shape; the rest goes to the replaced processor as it came."""
        self.plans.record(self.path, hidden_states)
        plan = self.plans.plan_for(self.path, hidden_states.shape[0])
        if plan is None:
            return self.inner(attn, hidden_states, *args, **kwargs)
        seen = hidden_states if plan.reference is None else torch.cat([plan.reference.to(hidden_states), hidden_states])
        x = seen if attn.group_norm is None else attn.group_norm(seen.transpose(1, 2)).transpose(1, 2)
        query, key, value = (rearrange(f(x), "b n (h d) -> b n h d", h=attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        out = self._all_rows(query, key, value, plan, hidden_states.shape[0])
        out = attn.to_out[1](attn.to_out[0](rearrange(out, "b n h d -> b n (h d)")))
        out = out + hidden_states if attn.residual_connection else out
        return out / attn.rescale_output_factor

    def _all_rows(self, query: Tensor, key: Tensor, value: Tensor, plan: RowPlan, batch: int) -> Tensor:
        """Attention of the batch's rows; query, key, value (reference + batch, tokens, heads, dim)."""
        routed = self._routed(query, key, value, plan)
        if len(plan.routed) == batch:
            return routed
        offset = query.shape[0] - batch
        others = [i for i in range(batch) if i not in plan.routed]
        plain = self._attend(*(_pick(x, [offset + i for i in others]) for x in (query, key, value)))
        order = [*plan.routed, *others]
        return torch.cat([routed, plain])[[order.index(i) for i in range(batch)]]

    def _routed(self, query: Tensor, key: Tensor, value: Tensor, plan: RowPlan) -> Tensor:
        offset = 0 if plan.reference is None else plan.reference.shape[0]
        own = [offset + i for i in plan.routed]
        q, k, v = _pick(query, plan.query), _pick(key, plan.key), _pick(value, plan.value)
        own_key, own_value = (None, None) if plan.share == 1 else (_pick(key, own), _pick(value, own))
        if plan.adain:
            q = adain(q, _pick(query, plan.source))
            own_key = None if own_key is None else adain(own_key, k)

        def attended(queries: Tensor) -> Tensor:
            out = self._weighed(queries, k, v, own_key, own_value, plan, plan.key_mask)
            if plan.query_mask is None:
                return out
            if plan.key_mask is None:
                outside = self._attend(*(_pick(x, own) for x in (query, key, value)))
            else:
                outside = self._weighed(queries, k, v, own_key, own_value, plan, 1 - plan.key_mask)
            inside = plan.query_mask.to(out)[:, :, None, None]
            return inside * out + (1 - inside) * outside

        if plan.away == 1:
            return attended(q)
        base = attended(_pick(query, plan.source))
        return base + plan.away * (attended(q) - base)

    def _weighed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_key: Tensor | None,
        own_value: Tensor | None,
        plan: RowPlan,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention to the source's keys, weighed by a mask, joined with the row's own where the share says so."""
        dtype = torch.promote_types(key.dtype, torch.float32)
        weights = None if mask is None else readable(mask).to(key.device, dtype)
        if own_key is None or own_value is None:
            return self._attend(query, key, value, None if weights is None else _log(weights, key))
        rows, tokens = key.shape[:2]
        theirs = plan.share * (torch.ones(rows, tokens, device=key.device, dtype=dtype) if weights is None else weights)
        mine = torch.full_like(theirs, 1 - plan.share)
        bias = _log(torch.cat([theirs, mine], 1), key)
        return self._attend(query, torch.cat([key, own_key], 1), torch.cat([value, own_value], 1), bias)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Fused attention; all (rows, tokens, heads, dim), bias (rows, 1, 1, key tokens)."""
        return dispatch_attention_fn(query, key, value, attn_mask=bias, backend=self._attention_backend)


class CrossPlanSource(Protocol):
    """What a cross-attention processor asks at each call."""

    def cross_plan(self, path: str, batch_rows: int) -> CrossPlan | None:
        """What to watch and change at this site now, or None to pass through."""


class CrossPlan(Protocol):
    """Watches and changes the probabilities of a site."""

    @property
    def watched(self) -> Sequence[int]:
        """Batch positions whose probabilities are wanted."""

    @property
    def changed(self) -> Sequence[int]:
        """Those of them whose output is computed anew."""

    def bias(self, row: int) -> Tensor | None:
        """Added to a row's logits before the softmax."""

    def settle(self, maps: dict[int, Tensor]) -> dict[int, Tensor]:
        """Told the probabilities (heads, tokens, text tokens) by row; returns those of the changed rows."""


class CrossProcessor:
    """Watches cross-attention, and recomputes the rows that are changed; the others come from the processor it replaced."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, path: str, inner: Any, plans: CrossPlanSource) -> None:
        self.path, self.inner, self.plans = path, inner, plans

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """hidden_states (batch, tokens, channels) -> the same shape."""
        out = self.inner(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        plan = self.plans.cross_plan(self.path, hidden_states.shape[0])
        if plan is None or not plan.watched:
            return out
        rows = list(plan.watched)
        text = encoder_hidden_states if not isinstance(encoder_hidden_states, tuple) else encoder_hidden_states[0]
        x, words = hidden_states[rows], text[rows]
        words = attn.norm_encoder_hidden_states(words) if attn.norm_cross else words
        query, key, value = (
            rearrange(f(y), "b n (h d) -> b n h d", h=attn.heads)
            for f, y in ((attn.to_q, x), (attn.to_k, words), (attn.to_v, words))
        )
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        maps = {}
        for place, row in enumerate(rows):
            bias = plan.bias(row)
            maps[row] = probabilities(query[place : place + 1], key[place : place + 1], bias)[0]
        settled = plan.settle(maps)
        if not settled:
            return out
        out = out.clone()
        for row, changed in settled.items():
            heads = torch.einsum("hnm,mhd->nhd", changed.to(value), value[rows.index(row)])
            new = attn.to_out[1](attn.to_out[0](rearrange(heads, "n h d -> n (h d)")))
            new = new + hidden_states[row] if attn.residual_connection else new
            out[row] = new / attn.rescale_output_factor
        return out


def adain(x: Tensor, like: Tensor) -> Tensor:
    """x (rows, tokens, heads, dim) with the mean and deviation, per channel over the tokens, of `like`."""
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True, correction=0) + 1e-5
    return (x - mean) / deviation * (like.std(1, keepdim=True, correction=0) + 1e-5) + like.mean(1, keepdim=True)


def _pick(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of x; without a copy where they are all one row, or all of them in order."""
    index = list(rows)
    if len(set(index)) == 1:
        return x[index[0] : index[0] + 1].expand(len(index), *x.shape[1:])
    return x if index == list(range(x.shape[0])) else x[index]


def _log(weights: Tensor, like: Tensor) -> Tensor:
    """Logarithms of weights (rows, key tokens) as a bias (rows, 1, 1, key tokens), never below FLOOR."""
    return weights.clamp_min(math.exp(FLOOR / 100)).log().where(weights > 0, FLOOR).to(like)[:, None, None, :]
