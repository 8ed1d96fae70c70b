"""Conditioning: rows that travel together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from easyinv_edit.conditioning import Conditioning, concatenate


def full(rows: int, seed: int = 0) -> Conditioning:
    """Conditioning with every part present, as SDXL's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, 5, 3), (rows, 2), (rows, 6))
    return Conditioning(*(torch.randn(shape, generator=generator) for shape in shapes))


def parts(conditioning: Conditioning) -> tuple[Tensor | None, ...]:
    return conditioning.embeddings, conditioning.pooled, conditioning.time_ids


def test_rows() -> None:
    assert full(3).rows == 3


@pytest.mark.parametrize("rows", [[1], [2, 0], [1, 1, 0], range(2)])
def test_select_takes_the_given_rows_of_every_part(rows: list[int]) -> None:
    whole = full(3)
    for part, source in zip(parts(whole.select(rows)), parts(whole), strict=True):
        assert part is not None
        assert source is not None
        assert torch.equal(part, torch.stack([source[r] for r in rows]))


def test_select_keeps_missing_parts_missing() -> None:
    assert parts(Conditioning(torch.ones(2, 5, 3)).select([1]))[1:] == (None, None)


def test_concatenate_then_select_gives_the_parts_back() -> None:
    a, b = full(2), full(3, seed=1)
    joined = concatenate([a, b])
    assert joined.rows == 5
    assert joined.select(range(2)).equals(a)
    assert joined.select(range(2, 5)).equals(b)


def test_concatenate_refuses_parts_of_different_families() -> None:
    with pytest.raises(ValueError, match="same model family"):
        concatenate([full(1), Conditioning(torch.ones(1, 5, 3))])


@pytest.mark.parametrize("part", ["embeddings", "pooled", "time_ids"])
def test_equals_sees_the_smallest_difference_in_every_part(part: str) -> None:
    assert full(2).equals(full(2))
    changed = full(2)
    tensor = getattr(changed, part)
    tensor[-1, -1] = torch.nextafter(tensor[-1, -1], torch.tensor(9.0))
    assert not full(2).equals(changed)


def test_a_missing_part_equals_only_a_missing_part() -> None:
    bare = Conditioning(full(2).embeddings)
    assert bare.equals(Conditioning(full(2).embeddings))
    assert not bare.equals(full(2))
    assert not full(2).equals(bare)
