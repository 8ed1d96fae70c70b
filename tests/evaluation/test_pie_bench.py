"""PIE-Bench by path: masks, prompts, kinds and what is refused. A made-up set in the exact format stands in for it."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from easyinv_edit.errors import EasyInvWarning, InputError
from easyinv_edit.evaluation import pie_bench
from easyinv_edit.evaluation.pie_bench import TYPES, decode_mask

SIDE = 512
FULL = [0, SIDE * SIDE]
ROUND = {
    "image_path": "0_random_140/000000000001.jpg",
    "original_prompt": "a [round] cake  with a [red  cherry]",
    "editing_prompt": "a [square] cake with a candle",
    "editing_instruction": "Make it square",
    "editing_type_id": "0",
    "blended_word": "cake cake",
    "mask": [SIDE * 100 + 50, 20, SIDE * 101 + 50, 20],
}
POSE = {
    "image_path": "5_change_attribute_pose_40/2_natural/1_animal/521000000000.jpg",
    "original_prompt": "a dog [is standing]",
    "editing_prompt": "a dog [is running]",
    "editing_instruction": "",
    "editing_type_id": "5",
    "blended_word": "dog dog",
    "mask": [],
}
STYLE = {
    "image_path": "9_change_style_80/1_artificial/4_outdoor/914000000000.jpg",
    "original_prompt": "a lake",
    "editing_prompt": "[a sketch of] a lake",
    "editing_instruction": "Sketch it",
    "editing_type_id": "9",
    "blended_word": "",
    "mask": FULL,
}
MADE_UP: dict[str, dict[str, Any]] = {"914000000000": STYLE, "000000000001": ROUND, "521000000000": POSE}


def write(root: Path, entries: dict[str, dict[str, Any]], size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    """The set with a grey picture at every path."""
    root.mkdir(exist_ok=True)
    (root / "mapping_file.json").write_text(json.dumps(entries))
    for path in {str(entry["image_path"]) for entry in entries.values()}:
        file = root / "annotation_images" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "grey").save(file)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "data", MADE_UP)


def load(root: Path, *arguments: Any) -> list[pie_bench.PieItem]:
    return pie_bench.load(root, *arguments, on_mismatch="ignore")


def refused(root: Path, *arguments: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(root, *arguments)
    return str(caught.value).splitlines()


def by_pixels(runs: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The rule written out one pixel after the other."""
    ones = {start + i for start, length in zip(runs[::2], runs[1::2], strict=True) for i in range(length)}
    rim = (0, SIDE - 1)
    return np.array([[y * SIDE + x in ones or y in rim or x in rim for x in range(SIDE)] for y in range(SIDE)], dtype=float)


# --- masks --------------------------------------------------------------------------------------------------------------


def test_an_empty_mask_is_its_rim() -> None:
    mask = decode_mask([])
    assert (mask.shape, mask.dtype) == ((SIDE, SIDE), torch.float32)
    assert mask.sum() == 2044
    assert mask[1:-1, 1:-1].sum() == 0


def test_a_full_mask_is_all_ones() -> None:
    assert decode_mask(FULL).sum() == SIDE * SIDE


def test_one_run_lies_in_its_row() -> None:
    mask = decode_mask([SIDE * 7 + 3, 10])
    assert mask[7, 3:13].sum() == 10
    assert mask.sum() == 2044 + 10
    assert mask[3:13, 7].sum() == 1, "rows come first"


@pytest.mark.parametrize(
    "runs",
    [
        [SIDE * 200 + 500, 40],
        [SIDE * 10 + 10, 30, SIDE * 10 + 20, 30],
        [SIDE * 10 + 20, 30, SIDE * 10 + 10, 5],
        [SIDE * 10 + 20, 5, SIDE * 10 + 20, 50, SIDE * 10 + 20, 0],
        [SIDE * SIDE - 600, 10_000],
        [SIDE * SIDE - 1, 1],
        [SIDE * 3 + 3, 0],
    ],
    ids=["over two rows", "overlap", "out of order", "same start", "past the end", "last pixel", "no length"],
)
def test_runs_are_those_of_the_rule(runs: list[int]) -> None:
    assert np.array_equal(decode_mask(runs).numpy(), by_pixels(runs))


def test_runs_by_chance_are_those_of_the_rule() -> None:
    rng = random.Random(0)
    for _ in range(3):
        runs = [n for _ in range(60) for n in (rng.randrange(SIDE * SIDE), rng.randrange(3000))]
        assert np.array_equal(decode_mask(runs).numpy(), by_pixels(runs))


def test_a_run_may_be_longer_than_any_picture() -> None:
    assert decode_mask([0, 10**30]).sum() == SIDE * SIDE


def test_each_decoded_mask_is_its_own(root: Path) -> None:
    item = load(root)[0]
    assert item.mask is not None
    item.mask.zero_()
    assert item.mask.sum() > 0


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ([1, 2, 3], "holds 3 numbers, but runs are pairs of start and length"),
        (
            [-1, 5],
            "a run of 5 pixels from -1 is outside the 512 x 512 picture; starts are 0 to 262143 and lengths not negative",
        ),
        ([SIDE * SIDE, 1], "a run of 1 pixels from 262144 is outside"),
        ([0, 1, 5, -2], "a run of -2 pixels from 5 is outside"),
    ],
)
def test_runs_outside_the_picture_are_refused(tmp_path: Path, runs: list[int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        decode_mask(runs)
    (line,) = refused(write(tmp_path, {"7": ROUND | {"mask": runs}}))
    assert line.startswith(f"{tmp_path / 'mapping_file.json'}: 7: mask: {says}")


# --- items --------------------------------------------------------------------------------------------------------------


def test_items_hold_what_the_mapping_says_in_the_order_of_their_ids(root: Path) -> None:
    made = load(root)
    assert [item.name for item in made] == ["000000000001", "521000000000", "914000000000"]
    cake, dog, lake = made
    assert (cake.prompt, cake.target_prompt) == ("a round cake with a red cherry", "a square cake with a candle")
    assert (cake.source_words, cake.target_words) == (("round", "red cherry"), ("square",))
    assert (cake.words, cake.instruction) == (("cake", "cake"), "Make it square")
    assert [(item.type_id, item.edit_type, item.group) for item in made] == [
        (0, "random", "random"),
        (5, "change_attribute_pose", "change_attribute_pose"),
        (9, "change_style", "change_style"),
    ]
    assert (lake.words, lake.source_words, lake.target_words) == (None, (), ("a sketch of",))
    assert [int(item.mask.sum()) for item in made if item.mask is not None] == [2044 + 40, 2044, SIDE * SIDE]
    assert dog.truth is None


def test_pictures_are_read_when_they_are_asked_for(root: Path) -> None:
    cake = load(root)[0]
    assert isinstance(cake.source, Path)
    Image.new("RGB", (SIDE, SIDE), "white").save(cake.source)
    assert cake.picture.getpixel((5, 5)) == (255, 255, 255)


def test_the_kinds_are_those_of_the_folders() -> None:
    """The README's folder names: id, name and number of pictures."""
    folders = (
        "0_random_140 1_change_object_80 2_add_object_80 3_delete_object_80 4_change_attribute_content_40 "
        "5_change_attribute_pose_40 6_change_attribute_color_40 7_change_attribute_material_40 8_change_background_80 "
        "9_change_style_80"
    )
    assert [f"{i}_{name}_{count}" for i, (name, count) in enumerate(TYPES.items())] == folders.split()
    assert pie_bench.COUNT == 700


@pytest.mark.parametrize("name", TYPES)
def test_each_id_has_its_kind(tmp_path: Path, name: str) -> None:
    number = list(TYPES).index(name)
    for given in (str(number), number):
        (item,) = load(write(tmp_path, {"1": ROUND | {"editing_type_id": given}}))
        assert (item.type_id, item.edit_type) == (number, name)


def test_what_rides_along_is_not_read(root: Path) -> None:
    (root / "mapping_file_ti2i_benchmark.json").write_text("{")
    extra = root / "annotation_images" / "ti2i_benchmark" / "horse.jpg"
    extra.parent.mkdir()
    extra.write_bytes(b"no picture")
    assert len(load(root)) == 3


def test_instruction_and_blended_words_may_be_left_out(tmp_path: Path) -> None:
    short = {key: value for key, value in ROUND.items() if key not in ("editing_instruction", "blended_word")}
    (item,) = load(write(tmp_path, {"1": short}))
    assert (item.words, item.instruction) == (None, "")


def test_kinds_can_be_chosen_and_only_their_pictures_are_needed(root: Path) -> None:
    (root / "annotation_images" / str(STYLE["image_path"])).unlink()
    assert [item.name for item in load(root, ["change_attribute_pose", "random"])] == ["000000000001", "521000000000"]
    assert len(refused(root)) == 1


def test_the_first_of_each_kind(tmp_path: Path) -> None:
    entries = {f"{n}{k}": entry for k in range(3) for n, entry in enumerate((ROUND, POSE))}
    write(tmp_path, entries)
    assert [item.name for item in load(tmp_path, (), 2)] == ["00", "01", "10", "11"]
    assert [item.name for item in load(tmp_path, ["change_attribute_pose"], 1)] == ["10"]


# --- counts -------------------------------------------------------------------------------------------------------------


def whole() -> dict[str, Any]:
    """A mapping with the right number of every kind, all on one picture."""
    names = [(i, k) for i, count in enumerate(TYPES.values()) for k in range(count)]
    return {f"{i}{k:011d}": ROUND | {"editing_type_id": str(i)} for i, k in names}


def test_a_whole_set_is_taken_without_a_word(tmp_path: Path) -> None:
    write(tmp_path, whole())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(pie_bench.load(tmp_path)) == 700
        assert len(pie_bench.load(tmp_path, ["add_object"])) == 80
        assert len(pie_bench.load(tmp_path, per_type=2, on_mismatch="raise")) == 20


def test_a_set_of_other_numbers_is_told(tmp_path: Path) -> None:
    entries = whole()
    entries["000000000000"] = ROUND | {"editing_type_id": "9"}
    write(tmp_path, entries)
    says = r"holds 700 edits, PIE-Bench has 700 \(random 139 of 140, change_style 81 of 80\)"
    with pytest.warns(EasyInvWarning, match=says) as caught:
        assert len(pie_bench.load(tmp_path)) == 700
    assert caught[0].filename == __file__
    with pytest.raises(InputError, match=says):
        pie_bench.load(tmp_path, on_mismatch="raise")


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_everything_wrong_is_told_with_its_entry(tmp_path: Path) -> None:
    short = {key: value for key, value in POSE.items() if key != "editing_prompt"}
    write(tmp_path, {"1": ROUND, "2": POSE | {"editing_type_id": "10"}, "3": STYLE})
    content = json.loads((tmp_path / "mapping_file.json").read_text()) | {
        "4": short | {"mask": [0, 1, "x", "y"]},
        "5": POSE | {"image_path": "../../secret.jpg", "blended_word": "dog"},
        "6": "a dog",
        "7": POSE | {"image_path": "gone.jpg"},
    }
    (tmp_path / "mapping_file.json").write_text(json.dumps(content))
    Image.new("RGB", (640, 480)).save(tmp_path / "annotation_images" / str(STYLE["image_path"]))
    file, folder = tmp_path / "mapping_file.json", tmp_path / "annotation_images"
    lines = refused(tmp_path)
    starts = [
        f"{file}: 2: editing_type_id: should be less than 10 (got '10')",
        f"{file}: 4: editing_prompt: is missing",
        f"{file}: 4: mask.2: should be a valid integer (got 'x')",
        f"{file}: 5: image_path: must be a path below annotation_images (got '../../secret.jpg')",
        f"{file}: 5: blended_word: must be a word of the source and one of the target, or empty (got 'dog')",
        f"{file}: 6: should be a valid dictionary",
        f"{file}: 3: {folder / str(STYLE['image_path'])} is 640 x 480 pixels, its mask 512 x 512",
        f"{file}: 7: {folder / 'gone.jpg'}: there is no such file",
    ]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)


def test_of_many_problems_ten_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    write(tmp_path, {str(i): ROUND | {"mask": [0]} for i in range(25)})
    lines = refused(tmp_path)
    assert len(lines) == 11
    assert lines[-1] == "and 15 more"


def test_a_long_mask_does_not_make_a_long_line(tmp_path: Path) -> None:
    (line,) = refused(write(tmp_path, {"1": ROUND | {"mask": [5, 5] * 5000 + [5]}}))
    assert len(line) - len(str(tmp_path)) < 250


def test_the_mapping_must_be_there(tmp_path: Path) -> None:
    (line,) = refused(tmp_path)
    assert line.endswith("there is no such file; give the folder that holds mapping_file.json and annotation_images")
    write(tmp_path / "PIE-Bench_v1", MADE_UP)
    (line,) = refused(tmp_path)
    assert line.endswith(f"there is no such file; give {tmp_path / 'PIE-Bench_v1'}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"000000000000": {"image_path": "0_ran', ":1:33: is no JSON"),
        ("[1, 2]", ": holds no mapping of ids to edits"),
        ("{}", ": holds no edits of random, change_object"),
    ],
)
def test_a_mapping_that_is_none_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "mapping_file.json").write_text(text)
    (line,) = refused(tmp_path)
    assert line.startswith(f"{tmp_path / 'mapping_file.json'}{says}")


def test_arguments_out_of_range_are_refused(root: Path) -> None:
    assert refused(root, ["change_pose", "9"]) == [
        f"types: 'change_pose' is unknown - did you mean 'change_style'?; choose {', '.join(TYPES)}",
        f"types: '9' is unknown; choose {', '.join(TYPES)}",
    ]
    assert refused(root, (), 0) == ["count is 0; it must be at least 1"]
    assert refused(root, ["add_object"]) == [f"{root / 'mapping_file.json'}: holds no edits of add_object; give the whole set"]
    with pytest.raises(InputError, match="on_mismatch is 'no'"):
        pie_bench.load(root, on_mismatch="no")  # type: ignore[arg-type]
