"""The reference cache holds what it was given and no more, and a recorder fills it with what the network really saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from attention_control import ControlError, MasaCtrl, ReferenceCache, StreamRow, controlled, list_sites, recording
from attention_control.side_copies import SideCopies
from tests.attention_control.reference import STEPS, TIMESTEP, make_scene
from tests.helpers import tiny_unet

ROW, TWIN = StreamRow("source", 0, "conditional"), StreamRow("source", 0, "unconditional")
SCENE = make_scene(targets=2)


def inputs(rows: int = 1, seed: int = 0) -> Tensor:
    """Layer inputs (rows, 3 tokens, 5 channels), float32: 60 bytes a row."""
    return torch.randn(rows, 3, 5, generator=torch.Generator().manual_seed(seed))


def paths_of(unet: UNet2DConditionModel, numbers: Sequence[int]) -> list[str]:
    return [list_sites(unet)[number].path for number in numbers]


def call(unet: UNet2DConditionModel, rows: Sequence[int]) -> Tensor:
    """One UNet call on these rows of the scene."""
    index = list(rows)
    return unet(SCENE.latents[index], TIMESTEP, SCENE.text[index]).sample


def seen_by_hooks(unet: UNet2DConditionModel, paths: Sequence[str], rows: Sequence[int]) -> dict[str, Tensor]:
    """What a plain forward hook on each module sees go in during one call."""
    seen: dict[str, Tensor] = {}

    def watch(path: str) -> None:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen[path] = (args[0] if args else kwargs["hidden_states"]).clone()

        hooks.append(unet.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for path in paths:
        watch(path)
    call(unet, rows)
    for handle in hooks:
        handle.remove()
    return seen


# --- putting and getting ------------------------------------------------------------------------------------------------


def test_what_was_put_is_what_is_got() -> None:
    cache = ReferenceCache((TWIN, ROW))
    given = {(step, path): inputs(2, seed) for seed, (step, path) in enumerate([(3, "a"), (3, "b"), (1, "a")])}
    for (step, path), tensor in given.items():
        cache.put(step, path, tensor)
    for (step, path), tensor in given.items():
        streams, kept = cache.get(step, path)
        assert streams.rows == (TWIN, ROW)
        assert kept.dtype == tensor.dtype
        assert torch.equal(kept, tensor)


def test_an_empty_cache_holds_nothing() -> None:
    cache = ReferenceCache((ROW,))
    assert (cache.bytes, cache.steps, cache.stored) == (0, [], None)
    assert not cache.holds(0, ["a"])
    with pytest.raises(KeyError):
        cache.get(0, "a")


def test_it_holds_a_step_only_where_every_site_is_kept() -> None:
    cache = ReferenceCache((ROW,))
    cache.put(2, "a", inputs())
    cache.put(2, "b", inputs())
    cache.put(4, "a", inputs())
    assert cache.holds(2, ["a"])
    assert cache.holds(2, ["b", "a"])
    assert not cache.holds(2, ["a", "b", "c"])
    assert not cache.holds(4, ["a", "b"])
    assert not cache.holds(3, ["a"])


def test_steps_are_sorted_and_named_once() -> None:
    cache = ReferenceCache((ROW,))
    for step, path in [(9, "a"), (2, "a"), (9, "b"), (5, "a")]:
        cache.put(step, path, inputs())
    assert cache.steps == [2, 5, 9]


def test_bytes_are_those_of_all_that_is_kept() -> None:
    cache = ReferenceCache((TWIN, ROW))
    for step, path in [(0, "a"), (0, "b"), (7, "a")]:
        cache.put(step, path, inputs(2))
    assert cache.bytes == 3 * 2 * 3 * 5 * 4


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 2), (torch.bfloat16, 2), (torch.float64, 8), (None, 4)])
def test_the_storage_dtype_is_the_one_asked_for(dtype: torch.dtype | None, size: int) -> None:
    cache = ReferenceCache((ROW,), dtype=dtype)
    given = inputs()
    cache.put(0, "a", given)
    kept = cache.get(0, "a")[1]
    assert kept.dtype == (dtype or torch.float32)
    assert torch.equal(kept, given if dtype is None else given.to(dtype))
    assert cache.bytes == given.numel() * size
    assert cache.stored == (kept.dtype, given.device)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_what_is_kept_is_a_copy(dtype: torch.dtype | None) -> None:
    cache = ReferenceCache((ROW,), dtype=dtype)
    given = inputs()
    before = given.clone()
    cache.put(0, "a", given)
    given.zero_()
    assert torch.equal(cache.get(0, "a")[1], before if dtype is None else before.to(dtype))


def test_what_is_kept_carries_no_gradient() -> None:
    cache = ReferenceCache((ROW,))
    with torch.enable_grad():
        cache.put(0, "a", inputs().requires_grad_(True) * 2)
    assert not cache.get(0, "a")[1].requires_grad


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_another_number_of_rows_is_refused(rows: int) -> None:
    cache = ReferenceCache((TWIN, ROW))
    with pytest.raises(ControlError, match=f"holds 2 source rows, but {rows} were given"):
        cache.put(0, "a", inputs(rows))
    assert cache.bytes == 0


def test_fetching_ahead_changes_nothing_where_there_is_no_second_memory() -> None:
    cache = ReferenceCache((ROW,))
    cache.put(0, "a", inputs())
    for step in (0, 1):
        cache.fetch(step, torch.device("cpu"))
    assert torch.equal(cache.get(0, "a")[1], inputs())
    assert cache.bytes == 60


@dataclass
class _Streams:
    """Stands in for torch.cuda's streams: notes, in order, what is queued on which and what waits for what."""

    log: list[str] = field(default_factory=list)
    name: str = "side"

    def wait_stream(self, other: _Streams) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} marks its end")
        return "mark"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for the {event}")


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the two streams did. Tensors move as on the CPU: there is no CUDA here."""
    main = _Streams(name="main")

    @contextmanager
    def on(stream: _Streams) -> Iterator[None]:
        main.log.append(f"on {stream.name}")
        yield
        main.log.append("on main")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: _Streams(main.log))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: main)
    return main.log


STARTED = ["side waits for main", "on side", "side marks its end", "on main"]


def test_copies_run_beside_and_what_reads_them_waits(queued: list[str]) -> None:
    given = {"a": inputs(seed=1), "b": inputs(seed=2)}
    copied = SideCopies(torch.device("cpu")).start(given)
    assert queued == STARTED
    found = copied()
    assert queued == [*STARTED, "main waits for the mark"]
    assert all(torch.equal(found[path], given[path]) for path in given)


def test_a_step_is_fetched_once_and_two_are_on_the_device_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    class Copies:
        def __init__(self, device: torch.device) -> None:
            assert device == torch.device("cuda")

        def start(self, tensors: dict[str, Tensor]) -> Any:
            started.append(next(step for step in range(4) if torch.equal(tensors["a"], inputs(seed=step))))
            return lambda: {path: tensor + 100 for path, tensor in tensors.items()}

    monkeypatch.setattr("attention_control.reference_cache.SideCopies", Copies)
    cache = ReferenceCache((ROW,))
    for step in range(4):
        cache.put(step, "a", inputs(seed=step))
    for step in range(4):
        cache.fetch(step, torch.device("cuda"))
        cache.fetch(step + 1, torch.device("cuda"))
        assert started == list(range(min(step + 2, 4)))
        assert torch.equal(cache.get(step, "a")[1], inputs(seed=step) + 100), "not what was fetched"
        assert sorted(cache._ahead)[-2:] == sorted(cache._ahead)
    assert torch.equal(cache.get(0, "a")[1], inputs(seed=0)), "let go of, and so where it is kept"
    cache.clear()
    assert not cache._ahead


# --- the limit ----------------------------------------------------------------------------------------------------------


def test_up_to_its_limit_it_keeps_and_above_it_says_what_would_fit() -> None:
    cache = ReferenceCache((ROW,), max_bytes=120)
    cache.put(0, "a", inputs())
    cache.put(0, "b", inputs())
    with pytest.raises(
        ControlError, match=r"more than the 120 bytes allowed: 120 are kept, and step 5 needs 60 more at a;.*half"
    ):
        cache.put(5, "a", inputs())
    assert cache.bytes == 120
    assert cache.steps == [0], "what was refused is not kept"


def test_the_limit_counts_what_is_stored_not_what_is_given() -> None:
    cache = ReferenceCache((ROW,), dtype=torch.float16, max_bytes=60)
    cache.put(0, "a", inputs())
    cache.put(0, "b", inputs())
    assert cache.bytes == 60
    with pytest.raises(ControlError, match="60 bytes"):
        cache.put(0, "c", inputs())


def test_an_entry_that_is_replaced_is_not_counted_twice() -> None:
    cache = ReferenceCache((ROW,), max_bytes=60)
    for seed in range(3):
        cache.put(0, "a", inputs(seed=seed))
    assert cache.bytes == 60
    assert torch.equal(cache.get(0, "a")[1], inputs(seed=2))


def test_a_refused_replacement_leaves_the_entry_as_it_was() -> None:
    cache = ReferenceCache((ROW,), max_bytes=60)
    cache.put(0, "a", inputs())
    with pytest.raises(ControlError, match="60 bytes"):
        cache.put(0, "a", torch.zeros(1, 6, 5))
    assert torch.equal(cache.get(0, "a")[1], inputs())


# --- recording ----------------------------------------------------------------------------------------------------------


def test_what_is_recorded_is_what_a_plain_hook_sees(unet: UNet2DConditionModel) -> None:
    paths = paths_of(unet, [0, 6, 10, 15])
    seen = seen_by_hooks(unet, paths, [0, 1])
    cache = ReferenceCache((TWIN, ROW))
    with recording(unet, paths, cache) as recorder:
        recorder.at([7])
        call(unet, [0, 1])
    assert cache.steps == [7]
    assert {path for path in seen if torch.equal(cache.get(7, path)[1], seen[path])} == set(paths)
    assert (seen[paths[0]][0] - seen[paths[0]][1]).abs().max() > 1e-3, "the rows differ, so that their order shows"


def test_only_the_sites_asked_for_are_recorded(unet: UNet2DConditionModel) -> None:
    paths = paths_of(unet, range(16))
    cache = ReferenceCache((ROW,))
    with recording(unet, paths[3:5], cache) as recorder:
        recorder.at([0])
        call(unet, [0])
    assert [path for path in paths if cache.holds(0, [path])] == paths[3:5]


@pytest.mark.parametrize("rows", [(ROW,), (TWIN, ROW)])
def test_several_steps_in_one_call_each_get_their_own_rows(unet: UNet2DConditionModel, rows: tuple[StreamRow, ...]) -> None:
    path = paths_of(unet, [10])[0]
    order, count = [2, 0, 1, 2, 1, 0][: 3 * len(rows)], len(rows)
    seen = seen_by_hooks(unet, [path], order)[path]
    cache = ReferenceCache(rows)
    with recording(unet, [path], cache) as recorder:
        recorder.at([4, 9, 2])
        call(unet, order)
    assert cache.steps == [2, 4, 9]
    for number, step in enumerate([4, 9, 2]):
        assert torch.equal(cache.get(step, path)[1], seen[number * count : (number + 1) * count])


def test_a_step_seen_again_is_kept_anew(unet: UNet2DConditionModel) -> None:
    path = paths_of(unet, [10])[0]
    cache = ReferenceCache((ROW,))
    with recording(unet, [path], cache) as recorder:
        recorder.at([3])
        call(unet, [0])
        call(unet, [1])
    assert torch.equal(cache.get(3, path)[1], seen_by_hooks(unet, [path], [1])[path])


def test_nothing_is_kept_before_a_step_is_named(unet: UNet2DConditionModel) -> None:
    cache = ReferenceCache((ROW,))
    with recording(unet, paths_of(unet, [10]), cache):
        call(unet, [0])
    assert cache.steps == []


def test_recording_leaves_the_output_as_it_is(unet: UNet2DConditionModel) -> None:
    plain = call(unet, [0, 1])
    with recording(unet, paths_of(unet, range(16)), ReferenceCache((TWIN, ROW))) as recorder:
        recorder.at([0])
        assert torch.equal(call(unet, [0, 1]), plain)


def test_a_call_of_too_few_rows_is_refused(unet: UNet2DConditionModel) -> None:
    with recording(unet, paths_of(unet, [10]), ReferenceCache((TWIN, ROW))) as recorder:
        recorder.at([0])
        with pytest.raises(ControlError, match="holds 2 source rows, but 1 were given"):
            call(unet, [0])


class _Interruption(RuntimeError):
    pass


@pytest.mark.parametrize("interruption", [None, _Interruption, KeyboardInterrupt, ControlError])
def test_the_same_processor_objects_are_back_whatever_happens(
    unet: UNet2DConditionModel, interruption: type[BaseException] | None
) -> None:
    paths = paths_of(unet, [0, 10, 15])
    before = {name: id(processor) for name, processor in unet.attn_processors.items()}
    with (
        pytest.raises(interruption) if interruption else nullcontext(),
        recording(unet, paths, ReferenceCache((ROW,))) as recorder,
    ):
        changed = {name.removesuffix(".processor") for name, p in unet.attn_processors.items() if id(p) != before[name]}
        assert changed == set(paths)
        recorder.at([0])
        call(unet, [0])
        if interruption:
            raise interruption
    assert {name: id(processor) for name, processor in unet.attn_processors.items()} == before


def test_processors_are_back_where_the_limit_was_reached(unet: UNet2DConditionModel) -> None:
    before = {name: id(processor) for name, processor in unet.attn_processors.items()}

    def record() -> None:
        with recording(unet, paths_of(unet, [10]), ReferenceCache((ROW,), max_bytes=100)) as recorder:
            recorder.at([0])
            call(unet, [0])

    with pytest.raises(ControlError, match="100 bytes"):
        record()
    assert {name: id(processor) for name, processor in unet.attn_processors.items()} == before


def test_a_unet_under_control_cannot_be_recorded(unet: UNet2DConditionModel) -> None:
    with (
        controlled(unet, MasaCtrl(), num_steps=STEPS, latent_size=SCENE.size),
        pytest.raises(ControlError, match="already under attention control"),
        recording(unet, paths_of(unet, [0]), ReferenceCache((ROW,))),
    ):
        pass


def test_two_unets_are_recorded_apart(unet: UNet2DConditionModel) -> None:
    other, path = tiny_unet(seed=1), paths_of(unet, [10])[0]
    mine, theirs = ReferenceCache((ROW,)), ReferenceCache((ROW,))
    with recording(unet, [path], mine) as first, recording(other, [path], theirs) as second:
        first.at([0])
        second.at([1])
        call(unet, [0])
        call(other, [0])
    assert (mine.steps, theirs.steps) == ([0], [1])
    assert torch.equal(mine.get(0, path)[1], seen_by_hooks(unet, [path], [0])[path])
    assert torch.equal(theirs.get(1, path)[1], seen_by_hooks(other, [path], [0])[path])
