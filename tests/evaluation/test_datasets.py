"""Scenes, folders with captions, and edits: what an item holds, when it is read, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from easyinv_edit.errors import EasyInvWarning, ImageError, InputError
from easyinv_edit.evaluation import datasets, set_files
from easyinv_edit.evaluation.datasets import EditItem, Item, edits_folder, folder, read_captions, scenes, tabletop_edits
from easyinv_edit.evaluation.edit_bench import cases_of
from easyinv_edit.evaluation.ground_truth import ALL_TASKS
from easyinv_edit.images import load, to_pil
from easyinv_edit.tabletop.render import render
from easyinv_edit.tabletop.scene import random_scene

HEADER = "file,prompt,target_prompt\n"


def fill(place: Path, names: str = "a.png b.png c.jpg") -> Path:
    """A folder of small pictures, each of another colour."""
    place.mkdir(exist_ok=True)
    for i, name in enumerate(names.split()):
        Image.new("RGB", (16, 16), (40 * i, 0, 90)).save(place / name)
    return place


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return fill(tmp_path / "pictures")


def listed(place: Path, text: str, encoding: str = "utf-8") -> Path:
    """The folder with that captions.csv."""
    (place / "captions.csv").write_bytes(text.encode(encoding))
    return place


def complaint(call: Callable[[], object]) -> list[str]:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value).splitlines()


def pixels(picture: Image.Image | None) -> Tensor:
    assert picture is not None
    return torch.from_numpy(np.array(picture))


# --- items --------------------------------------------------------------------------------------------------------------


def test_a_picture_on_disk_is_read_when_it_is_asked_for_and_not_kept(pictures: Path) -> None:
    item = folder(pictures)[1]
    Image.new("RGB", (24, 16), "white").save(pictures / "b.png")
    assert item.picture.size == (24, 16)
    (pictures / "b.png").unlink()
    with pytest.raises(ImageError, match=r"b\.png: there is no such file"):
        _ = item.picture


def test_a_picture_on_disk_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (24, 16)).save(tmp_path / "turned.jpg", exif=exif)
    assert folder(tmp_path)[0].picture.size == (16, 24)


def test_an_item_may_hold_its_picture_or_make_it(picture: Image.Image) -> None:
    assert Item("held", picture).picture is picture
    assert Item("made", lambda: picture).picture is picture


def test_an_edit_without_mask_and_truth_says_so(picture: Image.Image) -> None:
    item = EditItem("x", picture, "a cat", "turn", target_prompt="a dog")
    assert (item.mask, item.truth, item.words, item.edit_type) == (None, None, None, "turn")


# --- tabletop -----------------------------------------------------------------------------------------------------------


def test_scenes_are_those_rendered_together_also_over_several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = to_pil(render([random_scene(30 + i) for i in range(5)], 16)[0] * 2 - 1)
    monkeypatch.setattr(datasets, "AT_ONCE", 2)
    made = scenes(30, 5, 16)
    assert [item.name for item in made] == [f"scene-{30 + i}" for i in range(5)]
    assert all(torch.equal(pixels(item.picture), pixels(p)) for item, p in zip(made, expected, strict=True))


@pytest.mark.parametrize("task", ALL_TASKS.values(), ids=lambda task: task.name)
def test_tabletop_edits_are_the_cases_of_the_edit_benchmark(task: object) -> None:
    made, cases = tabletop_edits(task, 700, 3, 32), cases_of(task, 700, 3)  # type: ignore[arg-type]
    assert [item.case for item in made] == cases
    for item, case in zip(made, cases, strict=True):
        assert (item.prompt, item.target_prompt, item.edit_type) == (case.source_prompt, case.prompt, case.task.name)
        assert item.words == (case.source.shape, case.truth.shape)
        for got, scene in ((item.picture, case.source), (item.truth, case.truth)):
            assert torch.equal(pixels(got), pixels(to_pil(render([scene], 32)[0] * 2 - 1)[0]))


@pytest.mark.parametrize("task", ALL_TASKS.values(), ids=lambda task: task.name)
def test_outside_its_mask_a_true_edit_changes_nothing(task: object) -> None:
    for item in tabletop_edits(task, 40, 4, 32):  # type: ignore[arg-type]
        mask = item.mask
        assert mask is not None
        assert (mask.shape, mask.dtype) == ((32, 32), torch.float32)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        changed = (pixels(item.picture) != pixels(item.truth)).any(-1)
        assert changed.any()
        assert not (changed & (mask == 0)).any()


def test_a_tabletop_mask_holds_both_objects_or_what_is_behind_one() -> None:
    (shape,), (behind,) = (tabletop_edits(ALL_TASKS[name], 42, 1, 32) for name in ("shape", "background"))
    objects = render([shape.case.source, shape.case.truth], 32)[1][:, 0]
    assert shape.mask is not None
    assert bool((shape.mask[(objects > 0).any(0)] == 1).all())
    inside = render([behind.case.source], 32)[1][0, 0] == 1
    assert behind.mask is not None
    assert inside.any()
    assert float(behind.mask[inside].mean()) < 0.1
    assert float(behind.mask[0].mean()) == 1


def test_tabletop_edits_of_all_tasks_have_names_of_their_own() -> None:
    names = [item.name for task in ALL_TASKS.values() for item in tabletop_edits(task, 0, 4, 16)]
    assert len(set(names)) == len(names) == 4 * len(ALL_TASKS)


# --- folders ------------------------------------------------------------------------------------------------------------


def test_a_folder_without_captions_has_no_prompts(pictures: Path) -> None:
    made = folder(pictures)
    assert [(item.name, item.prompt) for item in made] == [("a.png", ""), ("b.png", ""), ("c.jpg", "")]
    assert torch.equal(pixels(made[1].picture), pixels(load(pictures / "b.png")))


def test_what_is_no_picture_is_left_out(pictures: Path) -> None:
    (pictures / "notes.txt").write_text("x")
    (pictures / "._a.png").write_bytes(b"a file that an archive carries beside a picture")
    (pictures / "folder.png").mkdir()
    assert [item.name for item in folder(pictures)] == ["a.png", "b.png", "c.jpg"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_captions_are_found_by_name(pictures: Path, encoding: str, end: str) -> None:
    rows = ["Prompt,File", "a café,c.jpg", '"red, round",  a.png', "", ","]
    listed(pictures, end.join(rows), encoding)
    assert [item.prompt for item in folder(pictures)] == ["red, round", "", "a café"]
    assert [item.prompt for item in folder(pictures, 1)] == ["red, round"]


def test_captions_may_lie_elsewhere_and_come_before_the_folders_own(pictures: Path, tmp_path: Path) -> None:
    listed(pictures, "file,prompt\na.png,near\n")
    other = tmp_path / "other.csv"
    other.write_text("file,prompt\na.png,far\n")
    assert folder(pictures)[0].prompt == "near"
    assert folder(pictures, captions=other)[0].prompt == "far"
    with pytest.raises(InputError, match=r"gone\.csv: there is no such file"):
        folder(pictures, captions=tmp_path / "gone.csv")


def test_edits_come_in_the_order_of_their_file(pictures: Path) -> None:
    listed(pictures, HEADER + "c.jpg,a cat,a dog\na.png,,a fish\n")
    made = edits_folder(pictures)
    assert [(i.name, i.prompt, i.target_prompt) for i in made] == [("c.jpg", "a cat", "a dog"), ("a.png", "", "a fish")]
    assert torch.equal(pixels(made[0].picture), pixels(load(pictures / "c.jpg")))
    assert [item.name for item in edits_folder(pictures, 1)] == ["c.jpg"]
    assert [item.prompt for item in folder(pictures)] == ["", "", "a cat"]


def test_everything_wrong_with_captions_is_told_with_its_line(pictures: Path) -> None:
    rows = ["a.png,a cat,a dog", "a.png,again,x", "a.pgn,typo,x", "b.png,short", 'c.jpg,"two', 'lines",', "d.png,x,y"]
    listed(pictures, HEADER + "\n".join(rows))
    name = pictures / "captions.csv"
    assert complaint(lambda: edits_folder(pictures)) == [
        f"{name}:3: 'a.png' is listed above already; list each picture once",
        f"{name}:4: 'a.pgn' is no picture of the folder - did you mean 'a.png'?; give the name of a file in it",
        f"{name}:5: has 2 cells, the first row 3; put quotes around text that holds commas",
        f"{name}:6: has no target prompt; say what the edited picture shows",
        f"{name}:8: 'd.png' is no picture of the folder - did you mean 'b.png'?; give the name of a file in it",
    ]


def test_target_prompts_are_needed_for_edits_only(pictures: Path) -> None:
    listed(pictures, "file,prompt\na.png,a cat\n")
    assert complaint(lambda: edits_folder(pictures)) == [
        f"{pictures / 'captions.csv'}:1: has no column 'target_prompt'; "
        "the columns are file, prompt, target_prompt, separated by commas"
    ]
    assert folder(pictures)[0].prompt == "a cat"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["1: has no column 'file'", "1: has no column 'prompt'"]),
        (
            "file;prompt\na.png;x\n",
            ["1: column 'file;prompt' is unknown", "1: has no column 'file'", "1: has no column 'prompt'"],
        ),
        ("file,promt\na.png,x\n", ["1: column 'promt' is unknown - did you mean 'prompt'?", "1: has no column 'prompt'"]),
        ("file,prompt,file\na.png,x,y\n", ["1: column 'file' is named twice"]),
        ('file,prompt\na.png,x\nb.png,"open\nand on\n', ["3: is no row of a CSV file (unexpected end of data)"]),
        ('file,prompt\nz.png,x\nb.png,"a"b\n', ["2: 'z.png' is no picture", "3: is no row of a CSV file"]),
    ],
    ids=["empty", "semicolons", "typo", "twice", "open quote", "two kinds"],
)
def test_a_file_that_is_no_captions_file_is_told(pictures: Path, text: str, says: list[str]) -> None:
    listed(pictures, text)
    lines = complaint(lambda: folder(pictures))
    assert len(lines) == len(says)
    for line, say in zip(lines, says, strict=True):
        assert line.startswith(f"{pictures / 'captions.csv'}:{say}")


def test_captions_in_another_encoding_are_refused(pictures: Path) -> None:
    listed(pictures, "file,prompt\na.png,caf\xe9\n", "latin-1")
    assert complaint(lambda: folder(pictures)) == [f"{pictures / 'captions.csv'}: is no UTF-8 text (byte 21); save it as UTF-8"]


def test_of_many_problems_ten_are_told_and_the_rest_counted(pictures: Path) -> None:
    listed(pictures, "file,prompt\n" + "".join(f"x{i}.png,x\n" for i in range(13)))
    lines = complaint(lambda: folder(pictures))
    assert [line.split(":")[1] for line in lines[:-1]] == [str(i) for i in range(2, 12)]
    assert lines[-1] == "and 3 more"


def test_damaged_pictures_are_told_together_before_any_is_used(pictures: Path) -> None:
    for name in ("a.png", "c.jpg"):
        (pictures / name).write_bytes(b"no picture")
    lines = complaint(lambda: folder(pictures))
    assert [line.split(":")[0] for line in lines] == [str(pictures / "a.png"), str(pictures / "c.jpg")]
    assert all("cannot be read as a picture" in line for line in lines)
    listed(pictures, HEADER + "b.png,x,y\n")
    assert len(edits_folder(pictures)) == 1, "pictures that no edit uses are not asked about"


def test_a_number_of_pictures_below_one_is_refused(pictures: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: folder(pictures, 0),
        lambda: edits_folder(pictures, 0),
        lambda: tabletop_edits(ALL_TASKS["shape"], 0, 0, 16),
    ]
    for call in calls:
        assert complaint(call) == ["count is 0; it must be at least 1"]


def test_a_folder_for_edits_needs_pictures_and_captions(tmp_path: Path, pictures: Path) -> None:
    assert complaint(lambda: edits_folder(tmp_path / "none")) == [
        f"{tmp_path / 'none'}: is no folder; give one that holds pictures"
    ]
    assert "captions.csv: there is no such file" in complaint(lambda: edits_folder(pictures))[0]


# --- shared -------------------------------------------------------------------------------------------------------------


def test_captions_read_alone_keep_every_column(tmp_path: Path) -> None:
    listed(tmp_path, HEADER + "b,two,2\na,one,1\n")
    rows = read_captions(tmp_path / "captions.csv", ["a", "b", "c"])
    assert list(rows) == ["b", "a"]
    assert rows["a"] == {"file": "a", "prompt": "one", "target_prompt": "1"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a": 1,\n "b" 2}', r":2:6: is no JSON \(Expecting ':' delimiter\)"),
        ("", r":1:1: is no JSON"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_broken_json_is_one_line(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(InputError, match=says) as caught:
        set_files.read_json(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_json_is_read_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "x.json").write_text(json.dumps({"é": 1}, ensure_ascii=False), encoding=encoding)
        assert set_files.read_json(tmp_path / "x.json") == {"é": 1}
    with pytest.raises(InputError, match="cannot be read"):
        set_files.read_json(tmp_path)


def test_a_mismatch_is_a_warning_an_error_or_nothing() -> None:
    with pytest.warns(EasyInvWarning, match=r"^too few$"):
        set_files.mismatch("too few", "warn")
    with pytest.raises(InputError, match=r"^too few$"):
        set_files.mismatch("too few", "raise")
    set_files.mismatch("too few", "ignore")
    with pytest.raises(InputError, match=r"on_mismatch is 'rais'; choose warn, raise, ignore - did you mean 'raise'\?"):
        set_files.check_mismatch("rais")


def test_chunks_keep_every_item_in_order() -> None:
    parts = datasets.chunks(range(7), 3)
    assert [len(part) for part in parts] == [3, 3, 1]
    assert list(itertools.chain(*parts)) == list(range(7))
