"""Streams: which source row each row of a batch reads."""

from __future__ import annotations

import pytest

from attention_control import ControlError, StreamRow, Streams
from attention_control.streams import layout
from tests.attention_control.reference import official_rows, single_source_rows, unguided_rows

LAYOUTS = {
    "paired source": (official_rows(), [0, 0, 2, 2]),
    "paired source, three targets": (official_rows(3), [0, 0, 0, 0, 4, 4, 4, 4]),
    "single source": (single_source_rows(), [0, 0, 0]),
    "single source, two targets": (single_source_rows(2), [0, 0, 0, 0, 0]),
    "guidance off": (unguided_rows(), [0, 0]),
    "guidance off, three targets": (unguided_rows(3), [0, 0, 0, 0]),
    "source alone": (unguided_rows(0), [0]),
    "paired source alone": (official_rows(0), [0, 1]),
    "any order": (
        layout(
            [
                ("target", 0, "conditional"),
                ("source", 0, "conditional"),
                ("target", 1, "unconditional"),
                ("target", 1, "conditional"),
                ("source", 0, "unconditional"),
                ("target", 0, "unconditional"),
            ]
        ),
        [1, 1, 4, 1, 4, 4],
    ),
    "one guided target of two": (
        layout(
            [
                ("source", 0, "conditional"),
                ("target", 0, "conditional"),
                ("target", 1, "unconditional"),
                ("target", 1, "conditional"),
            ]
        ),
        [0, 0, 0, 0],
    ),
    "unconditional source only": (layout([("source", 0, "unconditional"), ("target", 0, "conditional")]), [0, 0]),
}


@pytest.mark.parametrize(("streams", "expected"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_each_row_reads_the_source_of_its_own_half(streams: Streams, expected: list[int]) -> None:
    assert [streams.source_of(i) for i in range(len(streams))] == expected


@pytest.mark.parametrize(("streams", "expected"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_targets_are_all_rows_that_are_not_the_source(streams: Streams, expected: list[int]) -> None:
    assert streams.targets == [i for i in range(len(expected)) if streams.rows[i].role != "source"]


@pytest.mark.parametrize("half", ["unconditional", "conditional"])
def test_no_source_to_read_is_an_error_that_says_what_to_do(half: str) -> None:
    streams = layout([("target", 0, half), ("target", 1, half)])
    with pytest.raises(ControlError, match=r"no source row.*keep the source"):
        streams.source_of(1)


def test_layout_keeps_batch_order() -> None:
    streams = layout([("target", 1, "conditional"), ("source", 0, "unconditional")])
    assert streams.rows == (StreamRow("target", 1, "conditional"), StreamRow("source", 0, "unconditional"))
    assert len(streams) == 2
