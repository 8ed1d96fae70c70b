"""The README says what the registries hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from attention_control import CONTROLLERS
from easyinv_edit.inversion import INVERSIONS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.mark.parametrize(("name", "method"), [*INVERSIONS.items(), *CONTROLLERS.items()])
def test_every_method_has_its_row_with_its_paper(name: str, method: type) -> None:
    rows = [line for line in README.splitlines() if line.startswith(f"| `{name}`")]
    assert sum(f"| {method.paper} |" in row for row in rows) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", ["README.md", "configs/benchmarks/README.md"])
def test_what_a_page_links_to_exists(page: str) -> None:
    linked = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert any(path.endswith(".png") for path in linked)
    assert [path for path in linked if not (ROOT / page).parent.joinpath(path).exists()] == []
