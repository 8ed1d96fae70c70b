"""The README says what the registries hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from attention_control import CONTROLLERS
from easyinv_edit.inversion import INVERSIONS

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "method"), [*INVERSIONS.items(), *CONTROLLERS.items()])
def test_every_method_has_its_row_with_its_paper(name: str, method: type) -> None:
    rows = [line for line in README.splitlines() if line.startswith(f"| `{name}`")]
    assert sum(f"| {method.paper} |" in row for row in rows) == 1  # type: ignore[attr-defined]


def test_pictures_exist() -> None:
    shown = [part.split(")")[0] for part in README.split("](") if part.split(")")[0].endswith(".png")]
    assert shown
    assert all((Path(__file__).parents[1] / path).is_file() for path in shown)
