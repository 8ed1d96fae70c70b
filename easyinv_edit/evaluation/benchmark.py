"""Benchmark: everything that decides what is measured, as a YAML file, read as recipes are.

Every problem is reported at once, as `file:line:column: key: what is wrong`, before any weight is loaded; keys can be decided
otherwise on the command line, as `data.count=8`. Paths start at the current folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from easyinv_edit import merging, recipe
from easyinv_edit.choices import nearest
from easyinv_edit.errors import RecipeError
from easyinv_edit.evaluation import columns
from easyinv_edit.evaluation.metrics import MaskForm
from easyinv_edit.evaluation.weights import Weights
from easyinv_edit.places import places_of
from easyinv_edit.recipe import Scale, Seed, Side, Steps

Kind = Literal["inversion", "edits"]
Dtype = Literal["float32", "float16", "bfloat16"]
Number = Annotated[int, BeforeValidator(recipe.no_switch), Field(ge=1)]
FORBID = ConfigDict(extra="forbid")
FIRST_SEED = 24_000_000
"""Scenes of benchmarks: held out from training and from the other evaluations."""


@dataclass(frozen=True, config=FORBID)
class Data:
    """Which pictures. set: rendered scenes, rendered edits, a folder, or a published set by `path`; count: how many pictures,
    of each task for tabletop_edits and of each kind for pie_bench, None for all of a set on disk or of a suite; first_seed: of
    the scenes; suite: for tabletop_edits a version of the fixed suite (`suite.SUITES`), which has scenes of its own; tasks,
    types, splits: parts of the set, none for all; captions: for a folder the captions file, for coco whether its captions are
    the prompts."""

    set: Literal["tabletop", "tabletop_edits", "folder", "coco", "pie_bench"] = "tabletop"
    path: str | None = None
    count: Number | None = None
    first_seed: Seed = FIRST_SEED
    suite: Annotated[str, BeforeValidator(lambda given: str(given) if type(given) is int else given)] | None = None
    captions: bool | str | None = None
    tasks: list[str] = dataclasses.field(default_factory=list)
    types: list[str] = dataclasses.field(default_factory=list)
    splits: list[str] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, config=FORBID)
class Published:
    """Numbers of a paper that stand beside ours. source: where they are from; inversion, control, dtype, num_inference_steps:
    the line they belong to, None where it does not matter; values: numbers by the titles of columns; count: how many results
    they are means of; why: what keeps them from being comparable, empty where the protocol is the same."""

    source: str
    inversion: str
    values: dict[str, float]
    control: str | None = None
    dtype: Dtype | None = None
    num_inference_steps: Steps | None = None
    count: Number | None = None
    why: str = ""


@dataclass(frozen=True, config=FORBID)
class Benchmark:
    """One benchmark. Keys are those of an EditRecipe where it has them.

    kind: inversions are sampled back alone, edits are made under every control; data: see `Data`; schedule: what of the
    scheduler's configuration is decided otherwise; size: side in pixels, by default the model's own; dtypes: of the weights,
    one after the other; inversions: names or mappings of name and settings, and maybe label, num_inference_steps and
    pin_source of their own; controls: of edits, names of `variants.CONTROLS` or mappings of name and settings, and maybe label
    and source_prompt ({source_word} and {target_word} stand for the item's words); num_inference_steps: one T or several;
    guidance_scale: of edits, and of the columns called guided; pin_source: of edits; batch: pictures inverted at once;
    metrics: columns of `columns.COLUMNS`; weights: see `weights.Weights`; mask_form: how background columns count their mask;
    pictures: of how many items pictures are kept, None for all; protocol: keys, with the values that the published numbers
    were made with, inversions and controls being compared by their label; seed: of what methods draw: for each edit, and for
    the first picture of inversions, counted on from there; output: the folder.
    """

    kind: Kind
    title: str
    inversions: list[dict[str, Any]]
    data: Data = dataclasses.field(default_factory=Data)
    model: str = "embedded"
    schedule: dict[str, str | bool | int | float] = dataclasses.field(default_factory=dict)
    size: Side | None = None
    fit: Literal["crop", "pad", "stretch"] = "crop"
    dtypes: Annotated[list[Dtype], Field(min_length=1)] = dataclasses.field(default_factory=lambda: ["float32"])
    device: str = "auto"
    controls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    num_inference_steps: Annotated[list[Steps], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [50])
    inversion_guidance_scale: Scale = 1.0
    guidance_scale: Scale = 7.5
    negative_prompt: str | None = None
    pin_source: bool = True
    batch: Number = 1
    metrics: list[str] = dataclasses.field(default_factory=list)
    weights: Weights = dataclasses.field(default_factory=Weights)
    mask_form: MaskForm = "masked_mean"
    pictures: Annotated[int, BeforeValidator(recipe.no_switch), Field(ge=0)] | None = None
    published: list[Published] = dataclasses.field(default_factory=list)
    protocol: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: Seed = 0
    output: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """What is measured, by default what goes with the kind and the data."""
        usual = columns.TRUE_EDITS if self.data.set == "tabletop_edits" else columns.EDITS
        return tuple(self.metrics) or (columns.INVERSION if self.kind == "inversion" else usual)

    def request(self) -> dict[str, Any]:
        """Every key but `output`, JSON-able."""
        content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=os.fspath))
        return {key: value for key, value in content.items() if key != "output"}

    def to_yaml(self) -> str:
        """The benchmark as YAML with every key that decides something; `parse` gives it back equal."""
        content = {**self.request(), "output": self.output}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def read(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[Benchmark, str]:
    """Read a file; see `parse`. Returns the benchmark and the file's text. Raises RecipeError with every problem."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        known = ", ".join(sorted(each.stem for each in recipe_files()))
        problem = (
            f"{path}: cannot be read ({reason}); give a YAML file, or one of {known}{nearest(str(path), known.split(', '))}"
        )
        raise RecipeError([merging.one_line(problem)]) from error
    return parse(text, str(path), overrides), text


def recipe_files() -> list[Path]:
    """The configurations that come with this package."""
    from easyinv_edit.terminal import shipped

    return shipped("benchmarks")


def parse(text: str, name: str = "benchmark", overrides: Sequence[str] = ()) -> Benchmark:
    """Read a benchmark from YAML text; `name` stands for the file in problems.

    overrides: `key=value` or `group.key=value`, read as YAML. Raises RecipeError with every problem, in the file's order.
    """
    places, found = places_of(text, name)
    merging.refuse_all(found)
    content, found = merging.merged_content(text, name, places, overrides, recipe.REGISTRIES)
    merging.refuse_all(found)
    from easyinv_edit.evaluation.benchmark_checks import checked  # late: the checks know the classes above

    made, problems = checked(content)
    problems.sort(key=lambda item: merging.place_of(item[0], places))
    merging.refuse_all([merging.problem_at(name, places, overrides, key, problem) for key, problem in problems])
    assert made is not None
    return made


def from_mapping(content: Mapping[str, Any]) -> Benchmark:
    """A benchmark from keys and values. Raises RecipeError with every problem."""
    from easyinv_edit.evaluation.benchmark_checks import checked

    made, problems = checked(content)
    merging.refuse_all([f"{'.'.join(key)}: {problem}" for key, problem in problems])
    assert made is not None
    return made


def flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a mapping and of those within it; the schedule, whose keys may be any, is one value."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value and key != "schedule":
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
