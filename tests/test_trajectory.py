"""Trajectories on disk: bit for bit or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from easyinv_edit import trajectory as module
from easyinv_edit.cost import Cost
from easyinv_edit.errors import InputError, TrajectoryError
from easyinv_edit.trajectory import Trajectory
from tests.helpers import make_schedule


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


def full() -> Trajectory:
    """A trajectory with every field set to something of its own."""
    return Trajectory(
        latents=random(11, 1, 4, 6, 8),
        schedule=make_schedule(10, "v_prediction"),
        method="easyinv",
        settings={"variant": "repo", "eta": 0.1 + 0.2, "window": [0.05, 1 / 3], "preset": None},
        prompt="a “quoted” prompt\nof two lines, 猫",
        guidance_scale=1.5,
        extras={"noises": random(10, 1, 4, 6, 8, dtype=torch.float64), "flags": torch.tensor([True, False])},
        model={"name": "toy", "hash": {"unet": "00ff"}},
        source=torch.arange(48 * 64 * 3).remainder(256).to(torch.uint8).reshape(48, 64, 3),
        fit={"policy": "crop", "box": [0, 1, 2, 3]},
        cost=Cost(evaluations=10, calls=10, seconds=1 / 7, peak_memory_bytes=2**40 + 1),
    )


def saved_and_loaded(trajectory: Trajectory, folder: Path) -> Trajectory:
    trajectory.save(folder / "a.safetensors")
    return Trajectory.load(folder / "a.safetensors")


def assert_same_tensor(a: torch.Tensor | None, b: torch.Tensor | None) -> None:
    assert a is not None
    assert b is not None
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


def test_every_field_comes_back_bit_for_bit(tmp_path: Path) -> None:
    made = full()
    again = saved_and_loaded(made, tmp_path)
    assert_same_tensor(again.latents, made.latents)
    assert_same_tensor(again.source, made.source)
    assert again.extras.keys() == made.extras.keys()
    for name in made.extras:
        assert_same_tensor(again.extras[name], made.extras[name])
    tensors = {"latents", "source", "extras"}
    for name in {f.name for f in fields(Trajectory)} - tensors:
        assert getattr(again, name) == getattr(made, name), name


def test_a_bare_trajectory_comes_back_bare(tmp_path: Path) -> None:
    again = saved_and_loaded(Trajectory(random(11, 1, 4, 8, 8), make_schedule(10), "ddim"), tmp_path)
    assert (again.source, again.fit, dict(again.extras), dict(again.settings), again.prompt) == (None, None, {}, {}, "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e-45])
def test_special_values_are_kept(tmp_path: Path, value: float) -> None:
    latents = torch.full((11, 1, 4, 2, 2), value)
    again = saved_and_loaded(replace(full(), latents=latents), tmp_path)
    assert torch.equal(again.latents.view(torch.int32), latents.view(torch.int32))


def test_views_and_strides_are_no_obstacle(tmp_path: Path) -> None:
    """Extras that share the latents' memory, as a second stream does, and a channels-last source."""
    made = full()
    source = made.source.permute(1, 0, 2) if made.source is not None else None
    made = replace(made, extras={"second": made.latents[1:], "same": made.latents}, source=source)
    again = saved_and_loaded(made, tmp_path)
    assert_same_tensor(again.extras["second"], made.latents[1:])
    assert_same_tensor(again.source, source)


def test_clean_and_noise_are_the_ends() -> None:
    made = full()
    assert torch.equal(made.clean, made.latents[0])
    assert torch.equal(made.noise, made.latents[10])


def test_missing_folders_are_made_and_old_files_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    full().save(path)
    replace(full(), prompt="second").save(str(path))
    assert Trajectory.load(str(path)).prompt == "second"
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def cut_short(path: Path) -> None:
    full().save(path)
    path.write_bytes(path.read_bytes()[:-64])


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda _path: None,
    "empty": lambda path: path.write_bytes(b""),
    "random bytes": lambda path: path.write_bytes(bytes(range(1, 256)) * 4),
    "text": lambda path: path.write_text("{}\n" * 50),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "folder": lambda path: path.mkdir(),
    "cut short": cut_short,
    "other safetensors": lambda path: save_file({"latents": torch.zeros(2)}, path),
    "other format": lambda path: save_file({"latents": torch.zeros(2)}, path, metadata={"format": "pt"}),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_loading_something_else_is_one_line_naming_the_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.safetensors"
    BAD_FILES[kind](path)
    with pytest.raises(TrajectoryError) as caught:
        Trajectory.load(path)
    assert_one_line(caught.value, path)


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("kept")
    return folder / "file" / "a.safetensors"


def onto_a_folder(folder: Path) -> Path:
    (folder / "a.safetensors").mkdir()
    return folder / "a.safetensors"


@pytest.mark.parametrize("place", [below_a_file, onto_a_folder])
def test_saving_where_nothing_can_be_written_is_one_line_and_leaves_nothing(
    tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    path = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(TrajectoryError, match="cannot be written") as caught:
        full().save(path)
    assert_one_line(caught.value, path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_breaks_off_leaves_the_old_file_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "a.safetensors"
    full().save(path)
    before = path.read_bytes()

    def broken(_tensors: object, target: Path, **_options: object) -> None:
        target.write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "save_file", broken)
    with pytest.raises((TrajectoryError, KeyboardInterrupt)):
        full().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def assert_one_line(error: TrajectoryError, path: Path) -> None:
    assert str(path) in str(error)
    assert "\n" not in str(error)
    assert isinstance(error, InputError)
