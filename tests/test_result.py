"""EditResult: what it writes, what it shows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from easyinv_edit.errors import InputError
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.recipe import EditRecipe
from easyinv_edit.result import EditResult, versions, write_text

PROMPTS = ["a blue cube", "a <green> cone"]


@pytest.fixture(scope="module")
def result(untrained_folder: Path) -> EditResult:
    """Two prompts on a picture that is not square."""
    pipe = EditPipeline.from_pretrained(untrained_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe(Image.new("RGB", (100, 60), "red"), PROMPTS, "a red ball", inversion="ddim", num_inference_steps=2, fit="pad")


def test_save_writes_every_promised_file(result: EditResult, tmp_path: Path) -> None:
    facts = result.save(tmp_path / "a" / "b")
    names = {"source.png", "reconstruction.png", "edited-1.png", "edited-2.png", "comparison.png"}
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {*names, "result.json"}
    assert facts == json.loads((tmp_path / "a" / "b" / "result.json").read_text())
    assert facts["images"] == {Path(name).stem: name for name in names}
    assert Image.open(tmp_path / "a" / "b" / "edited-2.png").size == (100, 60)
    assert Image.open(tmp_path / "a" / "b" / "source.png").size == (64, 64)


def test_one_edit_is_edited_png(result: EditResult, tmp_path: Path) -> None:
    single = replace(result, images=result.images[:1], edited=result.edited[:1], prompts=PROMPTS[:1])
    assert single.save(tmp_path)["images"]["edited"] == "edited.png"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "edited.png")), np.asarray(result.images[0]))


def test_result_json_holds_what_is_promised(result: EditResult) -> None:
    facts = result.summary()
    promised = {"recipe", "model", "evaluations", "seconds", "peak_memory_bytes", "reconstruction", "versions"}
    assert promised <= facts.keys()
    assert facts["evaluations"] == {"invert": 2, "edit": 10}  # two guided targets twice, the source's pair once
    assert facts["seconds"].keys() == facts["evaluations"].keys()
    assert facts["reconstruction"].keys() == {"psnr", "vae_psnr"}
    assert facts["peak_memory_bytes"] > 0
    assert facts["model"].keys() == {"family", "name"}
    assert facts["versions"] == versions()
    assert {"python", "easyinv-edit", "torch", "diffusers"} <= facts["versions"].keys()


def test_the_recorded_recipe_is_one(result: EditResult) -> None:
    recipe = EditRecipe(**result.summary()["recipe"])
    assert (recipe.prompts, recipe.source_prompt, recipe.fit, recipe.size) == (PROMPTS, "a red ball", "pad", [64, 64])
    assert recipe.inversion == {"name": "ddim"}
    assert recipe.control["name"] == "masactrl"


def test_result_json_is_json_even_for_a_perfect_reconstruction(result: EditResult, tmp_path: Path) -> None:
    perfect = replace(result, quality={"psnr": math.inf, "vae_psnr": math.nan})
    perfect.save(tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    facts = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    assert facts["reconstruction"] == {"psnr": None, "vae_psnr": None}


@pytest.mark.parametrize("images", [np.zeros((2, 64, 64, 3)), None])
def test_arrays_are_saved_as_pictures(result: EditResult, images: Any, tmp_path: Path) -> None:
    replace(result, images=images).save(tmp_path)
    assert Image.open(tmp_path / "edited-1.png").size == (64, 64)


def test_latents_alone_cannot_be_shown(result: EditResult, tmp_path: Path) -> None:
    latents = result.trajectory.clean
    bare = EditResult(latents, PROMPTS, result.trajectory, result.recipe, result.cost)
    with pytest.raises(InputError, match="output_type='pil'"):
        bare.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(result: EditResult, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (lambda: result.save(tmp_path / "file" / "a"), lambda: write_text(tmp_path / "file" / "a.txt", "x")):
        with pytest.raises(InputError, match="cannot be written") as caught:
            write()
        assert len(str(caught.value).splitlines()) == 1


def test_write_text_replaces_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "é")
    write_text(tmp_path / "new" / "a.txt", "b")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
    assert (tmp_path / "new" / "a.txt").read_text() == "b"


def test_it_shows_itself_in_a_notebook(result: EditResult) -> None:
    shown = result._repr_html_()
    assert shown.startswith('<img src="data:image/png;base64,')
    assert "&#x27;edit&#x27;: 10" in shown
    assert result.comparison.width > 4 * 64
    assert result.comparison is result.comparison
