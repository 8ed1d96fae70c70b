"""Rendered edits as files: what is written is what the items hold, and the edit benchmark reads the folder."""

from __future__ import annotations

from pathlib import Path

import torch
from typer.testing import CliRunner

from easyinv_edit import images
from easyinv_edit.cli import app
from easyinv_edit.evaluation.company import COMPANY
from easyinv_edit.evaluation.datasets import edits_folder, tabletop_edits
from easyinv_edit.evaluation.edit_files import write

SEED, SIZE = 31_000_000, 32


def test_the_folder_is_one_of_edits(tmp_path: Path) -> None:
    items = [item for name in ("repaint", "add") for item in tabletop_edits(COMPANY[name], SEED, 2, SIZE)]
    lines = list(write(items, tmp_path))
    assert len(lines) == 4
    read = edits_folder(tmp_path)
    assert [(r.prompt, r.target_prompt) for r in read] == [(item.prompt, item.target_prompt) for item in items]
    for item, got in zip(items, read, strict=True):
        assert torch.equal(images.to_tensor(got.picture), images.to_tensor(item.picture))
        assert item.truth is not None
        truth = images.load(tmp_path / "truths" / got.name)
        assert torch.equal(images.to_tensor(truth), images.to_tensor(item.truth))
    assert len(list((tmp_path / "masks").glob("*.png"))) == 8
    assert len(list((tmp_path / "styles").glob("*.png"))) == 2


def test_the_command_writes_and_names_them(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["tabletop", "edits", "move", "--count", "2", "--size", "32", "-o", str(tmp_path / "edits")])
    assert done.exit_code == 0, done.output
    assert done.output.count("on the right") == 2
    assert len(list((tmp_path / "edits").glob("*.png"))) == 2
