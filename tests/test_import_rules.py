"""Who may import whom: section 4 of the design, read from the code's own import statements."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

import attention_control

ROOT = Path(__file__).parents[1]
STDLIB = tuple(sys.stdlib_module_names)
CORE = ("schedule", "conditioning", "denoiser", "trajectory", "sampling", "cost", "errors")
CORE_FILES = tuple(f"easyinv_edit/{name}.py" for name in CORE)
CORE_MODULES = tuple(f"easyinv_edit.{name}" for name in CORE)
MODEL_ROOMS = (
    "easyinv_edit/backbones/*",
    "easyinv_edit/tabletop/*",
    "easyinv_edit/evaluation/clip_score.py",
    "easyinv_edit/evaluation/dino.py",
    "easyinv_edit/evaluation/shapes.py",
)
SHARED_BY_METHODS = tuple(
    f"easyinv_edit.inversion.{name}" for name in ("base", "ancestral", "pivotal", "regularise", "two_latents")
)
LOGGERS = ("diffusers.utils", "transformers.utils")
RECIPE_FILES = (
    "easyinv_edit/recipe.py",
    "easyinv_edit/merging.py",
    "easyinv_edit/places.py",
    "easyinv_edit/models.py",
    "easyinv_edit/tabletop/training.py",
    "easyinv_edit/evaluation/benchmark.py",
)
CONTROL_USERS = (
    "easyinv_edit/pipeline.py",
    "easyinv_edit/rows.py",
    "easyinv_edit/editing.py",
    "easyinv_edit/inverting.py",
    "easyinv_edit/source_features.py",
    "easyinv_edit/feature_storage.py",
    "easyinv_edit/recipe.py",
    "easyinv_edit/cli.py",
    "easyinv_edit/evaluation/*",
    "easyinv_edit/tabletop/*",
)
DIFFUSERS_ATTENTION = ("diffusers.models.attention_dispatch", "diffusers.models.attention_processor.FusedAttnProcessor2_0")


@dataclass(frozen=True)
class Rule:
    """For files matching `files` and none of `except_files`: imports come from `only` (None: anywhere) and never from `never`.

    Names are dotted prefixes; `spared` are allowed in spite of `never`. at_least: so many files must match.
    """

    files: tuple[str, ...]
    at_least: int
    only: tuple[str, ...] | None = None
    never: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    except_files: tuple[str, ...] = ()

    def covers(self, file: str) -> bool:
        return _matches(file, self.files) and not _matches(file, self.except_files)

    def broken_by(self, name: str) -> bool:
        outside = self.only is not None and not _within(name, self.only)
        return outside or (_within(name, self.never) and not _within(name, self.spared))


RULES = {
    "attention_control knows torch, einops, pydantic and diffusers' attention, never easyinv_edit": Rule(
        ("attention_control/*",), 8, only=(*STDLIB, "torch", "einops", "pydantic", *DIFFUSERS_ATTENTION, "attention_control")
    ),
    "the core is torch and safetensors only": Rule(
        CORE_FILES, len(CORE), only=(*STDLIB, "torch", "safetensors", *CORE_MODULES)
    ),
    "an inversion method knows the core and the protocol, no other method": Rule(
        ("easyinv_edit/inversion/*",),
        3,
        only=(*STDLIB, "torch", "pydantic", *CORE_MODULES, *SHARED_BY_METHODS),
        except_files=("easyinv_edit/inversion/__init__.py", "easyinv_edit/inversion/base.py"),
    ),
    "what methods share may ask the registry for a base": Rule(
        ("easyinv_edit/inversion/base.py",),
        1,
        only=(*STDLIB, "torch", "pydantic", *CORE_MODULES, "easyinv_edit.choices", "easyinv_edit.inversion.INVERSIONS"),
    ),
    "the inversion package names its methods and nothing else": Rule(
        ("easyinv_edit/inversion/__init__.py",),
        1,
        only=(*STDLIB, *CORE_MODULES, "easyinv_edit.choices", "easyinv_edit.inversion"),
    ),
    "models are loaded in backbones and tabletop only": Rule(
        ("easyinv_edit/*",), 15, never=("diffusers", "transformers"), spared=LOGGERS, except_files=MODEL_ROOMS
    ),
    "YAML is read by recipes only": Rule(
        ("easyinv_edit/*", "attention_control/*"), 25, never=("omegaconf", "yaml"), except_files=RECIPE_FILES
    ),
    "attention control is used where edits are put together": Rule(
        ("easyinv_edit/*",), 15, never=("attention_control",), except_files=CONTROL_USERS
    ),
    "nothing imports the command line": Rule(
        ("easyinv_edit/*", "attention_control/*"), 25, never=("easyinv_edit.cli",), except_files=("easyinv_edit/__main__.py",)
    ),
}


def _matches(file: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


def _within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def imported(source: str, file: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of a file, at whatever depth; `from a import b` is a.b."""
    package = file.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(rule: Rule, file: str, source: str) -> list[str]:
    if not rule.covers(file):
        return []
    return [f"{file}:{line}: imports {name}" for line, name in imported(source, file) if rule.broken_by(name)]


def files() -> list[str]:
    """Every Python file of both packages, relative to the repository."""
    found = (path for package in ("easyinv_edit", "attention_control") for path in (ROOT / package).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@pytest.mark.parametrize("name", RULES)
def test_the_rule_holds(name: str) -> None:
    rule = RULES[name]
    covered = [file for file in files() if rule.covers(file)]
    assert len(covered) >= rule.at_least, covered
    assert [line for file in covered for line in violations(rule, file, (ROOT / file).read_text(encoding="utf-8"))] == []


def test_every_name_of_the_rules_exists() -> None:
    """A renamed room must take its rule along."""
    named = [*CORE_FILES, *RECIPE_FILES, *CONTROL_USERS[:5], "easyinv_edit/__main__.py", "easyinv_edit/inversion/base.py"]
    assert [file for file in named if not (ROOT / file).is_file()] == []


CAUGHT = [
    ("attention_control", "attention_control/new.py", "import easyinv_edit"),
    ("attention_control", "attention_control/new.py", "from easyinv_edit.errors import InputError"),
    ("attention_control", "attention_control/new.py", "from diffusers import DDIMScheduler"),
    ("attention_control", "attention_control/new.py", "from diffusers.models.attention_processor import Attention"),
    ("the core", "easyinv_edit/sampling.py", "import torch, diffusers"),
    ("the core", "easyinv_edit/schedule.py", "def f():\n    from PIL import Image"),
    ("the core", "easyinv_edit/cost.py", "from easyinv_edit import images"),
    ("the core", "easyinv_edit/denoiser.py", "from easyinv_edit.inversion import DDIM"),
    ("the core", "easyinv_edit/denoiser.py", "from . import pipeline"),
    ("an inversion method", "easyinv_edit/inversion/new.py", "from easyinv_edit.inversion.ddim import DDIM"),
    ("an inversion method", "easyinv_edit/inversion/new.py", "from .ddim import DDIM"),
    ("an inversion method", "easyinv_edit/inversion/new.py", "from easyinv_edit.inversion import DDIM"),
    ("an inversion method", "easyinv_edit/inversion/new.py", "if TYPE_CHECKING:\n    import attention_control"),
    ("the inversion package", "easyinv_edit/inversion/__init__.py", "import diffusers"),
    ("models are loaded", "easyinv_edit/pipeline.py", "from diffusers import DiffusionPipeline"),
    ("models are loaded", "easyinv_edit/evaluation/clip.py", "import transformers.models.clip"),
    ("YAML", "easyinv_edit/pipeline.py", "from omegaconf import OmegaConf"),
    ("attention control is used", "easyinv_edit/inversion/new.py", "from attention_control import MasaCtrl"),
    ("attention control is used", "easyinv_edit/backbones/sd.py", "import attention_control.sites as sites"),
    ("nothing imports", "easyinv_edit/recipe.py", "from easyinv_edit import cli"),
    ("nothing imports", "easyinv_edit/evaluation/run.py", "from ..cli import main"),
    ("nothing imports", "attention_control/new.py", "import easyinv_edit.cli"),
]
SPARED = [
    ("attention_control", "attention_control/new.py", "from diffusers.models.attention_dispatch import dispatch_attention_fn"),
    ("attention_control", "attention_control/new.py", "from .sites import list_sites\nimport einops, math"),
    ("the core", "easyinv_edit/sampling.py", "from .schedule import NoiseSchedule\nimport torch.nn.functional as F"),
    ("an inversion method", "easyinv_edit/inversion/new.py", "from .base import climb\nfrom ..schedule import NoiseSchedule"),
    ("an inversion method", "easyinv_edit/inversion/__init__.py", "from easyinv_edit.inversion.ddim import DDIM"),
    ("models are loaded", "easyinv_edit/terminal.py", "from diffusers.utils import logging"),
    ("models are loaded", "easyinv_edit/tabletop/networks.py", "import diffusers"),
    ("YAML", "easyinv_edit/recipe.py", "import omegaconf, yaml"),
    ("attention control is used", "easyinv_edit/evaluation/run.py", "import attention_control"),
    ("nothing imports", "easyinv_edit/__main__.py", "from easyinv_edit.cli import main"),
    ("nothing imports", "easyinv_edit/recipe.py", "from easyinv_edit import client"),
]


def rule_named(start: str) -> Rule:
    (found,) = (rule for name, rule in RULES.items() if name.startswith(start))
    return found


@pytest.mark.parametrize(("rule", "file", "source"), CAUGHT)
def test_the_checker_catches(rule: str, file: str, source: str) -> None:
    assert len(violations(rule_named(f"{rule} "), file, source)) == 1


@pytest.mark.parametrize(("rule", "file", "source"), SPARED)
def test_the_checker_spares(rule: str, file: str, source: str) -> None:
    assert violations(rule_named(f"{rule} "), file, source) == []


def test_all_of_attention_control_names_what_it_exports() -> None:
    """Every public name that is neither a submodule nor borrowed from the standard library, once."""
    public = {
        name
        for name, value in vars(attention_control).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "attention_control").startswith("attention_control")
    } - {"annotations"}
    assert sorted(attention_control.__all__) == sorted(public)
