"""COCO by path: which pictures are near-square, which are drawn, and what is told. Made-up pictures in the real layout."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from easyinv_edit.errors import EasyInvWarning, ImageError, InputError
from easyinv_edit.evaluation import coco

VAL = {139: (64, 43), 285: (59, 64), 632: (64, 64), 724: (37, 50), 776: (43, 64)}
TEST = {1: (64, 48), 16: (64, 60), 19: (60, 64), 57: (50, 50), 63: (80, 72)}
SQUARE = [16, 19, 57, 285, 632]
"""Ids whose shorter side is more than 0.9 of the longer; 63 has exactly 0.9."""


def write(place: Path, sizes: dict[int, tuple[int, int]]) -> None:
    place.mkdir(parents=True)
    for number, size in sizes.items():
        Image.new("RGB", size, (number % 256, 0, 0)).save(place / f"{number:012d}.jpg")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "val2017", VAL)
    write(tmp_path / "test2017", TEST)
    return tmp_path


def annotate(root: Path, annotations: object, split: str = "val2017") -> Path:
    file = root / "annotations" / f"captions_{split}.json"
    file.parent.mkdir(exist_ok=True)
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in VAL]
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return file


def ids(root: Path, count: int | None = None, **options: Any) -> list[int]:
    return [int(item.name.split("-")[1]) for item in coco.load(root, count, **options)]


def test_near_square_pictures_of_both_splits_in_the_order_of_their_ids(root: Path) -> None:
    made = coco.load(root, None)
    assert [item.name for item in made] == [
        "test2017-000000000016",
        "test2017-000000000019",
        "test2017-000000000057",
        "val2017-000000000285",
        "val2017-000000000632",
    ]
    assert [item.group for item in made] == ["test2017"] * 3 + ["val2017"] * 2
    assert {item.prompt for item in made} == {""}
    assert made[0].picture.size == (64, 60)


@pytest.mark.parametrize("near_square", [0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99])
def test_the_filter_is_the_one_of_the_authors(root: Path, near_square: float) -> None:
    """Their two conditions, written out: either side above that share of the other."""
    sizes = VAL | TEST
    expected = [n for n in sorted(sizes) if sizes[n][1] > near_square * sizes[n][0] and sizes[n][0] > near_square * sizes[n][1]]
    assert ids(root, near_square=near_square) == expected


def test_one_split_alone(root: Path) -> None:
    assert ids(root, splits=["val2017"]) == [285, 632]
    assert ids(root, splits=["test2017", "test2017"]) == [16, 19, 57]


def test_a_split_unpacked_into_a_folder_of_its_name_is_found(root: Path) -> None:
    (root / "test2017").rename(root / "moved")
    (root / "test2017").mkdir()
    (root / "moved").rename(root / "test2017" / "test2017")
    assert ids(root) == SQUARE


def test_only_headers_are_read(root: Path) -> None:
    for file in (root / "val2017").iterdir():
        file.write_bytes(file.read_bytes()[:-30])
    made = coco.load(root, None)
    assert [int(item.name.split("-")[1]) for item in made] == SQUARE
    with pytest.raises(ImageError, match=r"000000000632\.jpg: cannot be read as a picture"):
        _ = made[-1].picture


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_draw_is_the_same_each_time_and_part_of_a_larger_one(root: Path, seed: int | None) -> None:
    draws = [ids(root, count, seed=seed, near_square=0.0) for count in range(1, 11)]
    assert draws == [ids(root, count, seed=seed, near_square=0.0) for count in range(1, 11)]
    for smaller, larger in itertools.pairwise(draws):
        assert set(smaller) < set(larger)
        assert larger == sorted(larger)


def test_a_draw_does_not_change_with_what_else_is_there(root: Path) -> None:
    drawn = ids(root, 5, seed=3, near_square=0.0)
    other = next(number for number in VAL | TEST if number not in drawn)
    next(root.glob(f"*/{other:012d}.jpg")).unlink()
    assert ids(root, 5, seed=3, near_square=0.0) == drawn


def test_seeds_draw_differently_and_none_takes_the_lowest_ids(root: Path) -> None:
    assert len({tuple(ids(root, 4, seed=seed, near_square=0.0)) for seed in range(8)}) > 4
    assert ids(root, 4, seed=None, near_square=0.0) == sorted(VAL | TEST)[:4]


def test_every_picture_is_drawn_about_equally_often(tmp_path: Path) -> None:
    """A fair draw of 5 in 20 takes each 100 of 400 times, with a deviation of 8.7."""
    files = [tmp_path / f"{number:012d}.jpg" for number in range(20)]
    drawn = [file for seed in range(400) for file in sorted(files, key=lambda file: coco._rank(file, seed))[:5]]
    assert all(60 < drawn.count(file) < 140 for file in files)


TOLD = (
    r"5 near-square pictures among 10 in val2017, test2017, 2,298 were asked for \(the paper has 2,298\); "
    r"unpack every split whole, or ask for fewer$"
)


def test_fewer_pictures_than_the_papers_are_told(root: Path) -> None:
    with pytest.warns(EasyInvWarning, match=TOLD) as caught:
        assert len(coco.load(root)) == 5
    assert caught[0].filename == __file__
    with pytest.raises(InputError, match=TOLD):
        coco.load(root, on_mismatch="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(coco.load(root, on_mismatch="ignore")) == 5
        assert len(coco.load(root, 5)) == 5


def test_the_first_caption_of_a_picture_is_its_prompt(root: Path) -> None:
    told = [(9, 632, "later"), (4, 632, " A dog\n on  a rug. "), (7, 285, "A bear."), (8, 99999, "of another picture")]
    annotate(root, [{"id": i, "image_id": n, "caption": text} for i, n, text in told])
    prompts = {item.name.split("-")[1][-3:]: item.prompt for item in coco.load(root, None, captions=True)}
    assert prompts == {"016": "", "019": "", "057": "", "285": "A bear.", "632": "A dog on a rug."}
    assert {item.prompt for item in coco.load(root, None)} == {""}


def test_damaged_captions_are_told_with_their_place(root: Path) -> None:
    file = annotate(root, [{"id": 1, "image_id": "632", "caption": "x"}])
    with pytest.raises(InputError, match=r"annotations\.0\.image_id: should be a valid integer \(got '632'\)") as caught:
        coco.load(root, None, captions=True)
    assert str(caught.value).startswith(f"{file}: ")
    file.write_text('{"annotations": [')
    with pytest.raises(InputError, match=rf"{file}:1:18: is no JSON"):
        coco.load(root, None, captions=True)
    file.write_text("[]")
    with pytest.raises(InputError, match=str(file)):
        coco.load(root, None, captions=True)
    file.unlink()
    with pytest.raises(InputError, match=r"captions_val2017\.json, .*captions_test2017\.json: there is no such file"):
        coco.load(root, None, captions=True)


def test_everything_missing_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "0.jpg").write_bytes(b"numbered anew")
    with pytest.raises(InputError) as caught:
        coco.load(tmp_path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path / 'val2017'}: holds no COCO pictures")
    assert second.startswith(f"{tmp_path / 'test2017'}: is no folder")


def test_damaged_pictures_are_told_at_once(root: Path) -> None:
    for number in (139, 285):
        (root / "val2017" / f"{number:012d}.jpg").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        coco.load(root)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "000000000139.jpg: cannot be read as a picture" in lines[0]
    assert "000000000285.jpg: cannot be read as a picture" in lines[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"count": 0}, "count is 0; it must be at least 1"),
        ({"near_square": 1.0}, r"near_square is 1\.0; it is a share of the longer side"),
        ({"near_square": float("nan")}, "near_square is nan"),
        ({"splits": []}, "splits: the list is empty"),
        ({"on_mismatch": "stop"}, "on_mismatch is 'stop'; choose warn, raise, ignore"),
        ({"near_square": 0.999, "splits": ["val2017"], "count": None}, None),
    ],
)
def test_arguments_out_of_range_are_refused(root: Path, options: dict[str, Any], says: str | None) -> None:
    if says is None:
        assert ids(root, **options) == [632]
        return
    with pytest.raises(InputError, match=says):
        coco.load(root, **options)


def test_a_set_without_near_square_pictures_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "val2017", {1: (64, 43)})
    with pytest.raises(InputError, match=r"0 near-square pictures among 1 in val2017; unpack the whole set$"):
        coco.load(tmp_path, splits=["val2017"], on_mismatch="ignore")
