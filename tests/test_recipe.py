"""Recipes: YAML in and out, every problem at once with its place, nothing read from the environment."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from easyinv_edit.errors import RecipeError
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.recipe import INVERSION_KEYS, EditRecipe, parse, read
from easyinv_edit.running import scene_of
from easyinv_edit.tabletop.captions import vocabulary
from easyinv_edit.tabletop.scene import WORDS

SHIPPED = sorted((Path(__file__).parent.parent / "configs" / "recipes").glob("*.yaml"))
NAMES = {
    "compose",
    "ddim",
    "easyinv-paper-variant",
    "edit-friendly",
    "masactrl",
    "masactrl-masks",
    "masactrl-union",
    "masactrl-words",
    "null-text",
    "object-add",
    "official-notebook",
    "plain",
    "plug-and-play",
    "portrait",
    "prompt-to-prompt",
    "prompt-to-prompt-reweight",
    "structure",
    "style-aligned",
}


def problems(text: str, *overrides: str) -> list[str]:
    """What `parse` finds wrong; each problem is one line."""
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml", overrides)
    assert all(len(problem.splitlines()) == 1 for problem in caught.value.problems)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def only(text: str, *overrides: str) -> str:
    """The one problem of a recipe."""
    found = problems(text, *overrides)
    assert len(found) == 1, found
    return found[0]


def test_an_empty_file_is_the_embedded_models_recipe() -> None:
    assert parse("") == parse("# nothing\n") == parse("{}") == parse("model: embedded")
    recommended = {"size": 128, "guidance_scale": 3, "control": parse("model: embedded").control}
    assert parse("") == dataclasses.replace(EditRecipe(), **recommended)
    assert parse("").control["strength"] == 0.7
    assert EditRecipe().inversion == {"name": "easyinv"}
    assert EditRecipe().control == {"name": "masactrl"}


@pytest.mark.parametrize(
    "recipe",
    [
        EditRecipe(),
        EditRecipe(image="a b.png", prompts=["a: b # c", "é", "yes", "1e3", "two\nlines"], negative_prompt="'\""),
        EditRecipe(inversion={"name": "easyinv", "window": [0.1, 0.2], "eta": 1e-3}, control={"name": "none"}),
        EditRecipe(size=[64, 96], seed=None, source_guidance_scale=0.0, dtype="bfloat16", pin_source=False),
    ],
)
def test_a_written_recipe_reads_back_equal(recipe: EditRecipe) -> None:
    assert parse(recipe.to_yaml()) == recipe
    for field in dataclasses.fields(EditRecipe):
        assert re.search(rf"^{field.name}:", recipe.to_yaml(), re.M)


def test_the_shipped_recipes_are_the_promised_eighteen() -> None:
    assert {path.stem for path in SHIPPED} == NAMES
    assert len(SHIPPED) == 18


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_says_what_it_is_for(path: Path) -> None:
    recipe = read(path)
    header = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# .{20,}\((arXiv \d{4}\.\d{5}(, )?)+\)", header)
    assert recipe.output == f"outputs/{path.stem}"
    assert recipe.model == "embedded"
    assert recipe.guidance_scale == (7.5 if path.stem == "official-notebook" else 3)
    assert parse(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_describes_its_scene(path: Path) -> None:
    """The source prompt says nothing false; of the solid whose content is carried over, the first one, no prompt names the
    texture or a colour."""
    recipe = read(path)
    scene = scene_of(str(recipe.image))
    assert int(str(recipe.image).split(":")[1]) >= 20_000_000
    assert scene.texture != "plain"
    for prompt in filter(None, [recipe.source_prompt, *recipe.prompts]):
        assert set(prompt.split()) <= set(vocabulary())
        assert not set(prompt.split(" and a ")[0].split()) & set(WORDS["texture"])
    told, said = set(recipe.source_prompt.split(" on ")[0].split()), {*WORDS["shape"], *WORDS["pose"], *WORDS["size"]}
    facts = {scene.shape, scene.pose, scene.size}
    assert told & said <= facts
    assert told & set(WORDS["colour"]) <= {scene.colour}
    assert " on " not in recipe.source_prompt or scene.background in recipe.source_prompt.split(" on ")[-1]
    if recipe.control["name"] in ("masactrl", "none"):
        assert not recipe.source_prompt or told & said == facts
        assert not any(set(prompt.split(" on ")[0].split()) & set(WORDS["second"]) for prompt in recipe.prompts)
        assert all(len(set(prompt.split()) & said - facts) == 1 for prompt in recipe.prompts)


def test_the_recipes_show_what_they_are_named_for() -> None:
    shown = {path.stem: read(path).control for path in SHIPPED}
    assert shown["masactrl-masks"]["keep_background"] is True
    assert shown["prompt-to-prompt-reweight"]["mode"] == "refine"
    assert shown["prompt-to-prompt-reweight"]["reweight"] == {"yellow": 2}


def test_the_official_notebooks_values() -> None:
    recipe = read(next(path for path in SHIPPED if path.stem == "official-notebook"))
    assert (recipe.source_prompt, recipe.num_inference_steps, recipe.inversion) == ("", 50, {"name": "ddim"})
    assert recipe.control == {"name": "masactrl", "start_step": 4, "sites": "10-15"}


FIVE_MISTAKES = """\
modle: embedded
num_inference_steps: 5000
inversion:
  name: easyinf
control:
  name: masactrl
  strengh: 0.5
fit: crp
"""


def test_five_mistakes_are_five_lines_in_order(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FIVE_MISTAKES)
    with pytest.raises(RecipeError) as caught:
        read(path)
    found = caught.value.problems
    starts = ["1:1: modle", "2:1: num_inference_steps", "4:3: inversion.name", "7:3: control.strengh", "8:1: fit"]
    assert [problem.startswith(f"{path}:{start}: ") for problem, start in zip(found, starts, strict=True)] == [True] * 5
    for problem, match in zip(found, ["'model'", "1000", "'easyinv'", "'strength'", "'crop'"], strict=True):
        assert match in problem
    assert all("did you mean" in found[i] for i in (0, 2, 3))


@pytest.mark.parametrize(
    ("text", "start", "says"),
    [
        ("model: 3", "1:1: model", "string (got 3)"),
        ("prompts: [a, 2]", "1:14: prompts.1", "string (got 2)"),
        ("prompts:\n  - a\n  - {b: c}", "3:5: prompts.1", "string"),
        ("prompts: {a: b}", "1:1: prompts", "list"),
        ("prompts: null", "1:1: prompts", "list (got None)"),
        ("source_prompt: null", "1:1: source_prompt", "string (got None)"),
        ("num_inference_steps: 2.5", "1:1: num_inference_steps", "2.5"),
        ("num_inference_steps: 0", "1:1: num_inference_steps", "greater than or equal to 1"),
        ("num_inference_steps: true", "1:1: num_inference_steps", "number (got True)"),
        ("guidance_scale: many", "1:1: guidance_scale", "number"),
        ("guidance_scale: -1", "1:1: guidance_scale", "greater than or equal to 0 (got -1)"),
        ("guidance_scale: .nan", "1:1: guidance_scale", "got nan"),
        ("guidance_scale: .inf", "1:1: guidance_scale", "less than or equal to 100"),
        ("noise_mix: 1.5", "1:1: noise_mix", "less than or equal to 1"),
        ("seed: -1", "1:1: seed", "greater than or equal to 0"),
        ("pin_source: maybe", "1:1: pin_source", "boolean"),
        ("dtype: fp16", "1:1: dtype", "'float32', 'float16' or 'bfloat16' (got 'fp16')"),
        ("size: 7", "1:1: size", "from 8 to 4096 (got 7)"),
        ("size: big", "1:1: size", "[height, width]"),
        ("size: [64, 64, 64]", "1:1: size", "[height, width]"),
        ("inversion: [ddim]", "1:1: inversion", "dictionary"),
        ("inversion: {name: [ddim]}", "1:13: inversion.name", "choose easyinv, ddim"),
        ("inversion: {name: easyinv, eta: 2}", "1:28: inversion.eta", "less than or equal to 1 (got 2)"),
        ("inversion: {name: ddim, eta: 0.5}", "1:25: inversion.eta", "unknown setting of ddim; allowed: none"),
        ("control: {strength: 2}", "1:11: control.strength", "less than or equal to 1"),
        ("control: {sites: up_blocks.}", "1:11: control.sites", "up_blocks."),
        ("control: masactl", "1:1: control.name", "did you mean 'masactrl'?"),
        ("? [1, 2]\n: 3", "1:3", "a key must be a word"),
        ("3: a", "1:1", "a key must be a word"),
        ("inversion: {1: 2}", "1:13", "a key must be a word"),
        ("model: a\nmodel: b", "2:1: model", "written twice"),
        ("control:\n  name: none\n  name: none", "3:3: control.name", "written twice"),
        ("model: [", "1:9", "not valid YAML"),
        ("model: a\n  image: b", "2:8", "not valid YAML"),
        ("---\nmodel: a\n---\nmodel: b", "3:1", "another document"),
        ("model: !!python/object:os.system {}", "1:8", "not valid YAML"),
        ("model: &a x\nimage: *a", "2:8", "aliases are not allowed"),
        ("prompts: &a [*a]", "1:14", "aliases are not allowed"),
        ("- a", "1:1", "mapping of keys"),
        ("just text", "1:1", "mapping of keys"),
        ("model: ${nothing}", "1:1: model", "'nothing' not found"),
        ("prompts: ['${model${']", "1:11: prompts.0", "a reference is ${key}"),
        ('"a\\nb": 1', "1:1: a b", "unknown key"),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, start: str, says: str) -> None:
    problem = only(text)
    assert problem.startswith(f"r.yaml:{start}: ")
    assert says in problem


@pytest.mark.parametrize("text", ["model: a\x00", "model: 2020-99-99"])
def test_what_yaml_itself_cannot_place_is_still_one_line(text: str) -> None:
    assert only(text).startswith("r.yaml: not valid YAML: ")


def test_what_was_given_is_cut_to_fit_a_line() -> None:
    assert len(only(f"seed: {'y' * 5000}")) < 250


def test_a_method_in_short() -> None:
    assert parse("inversion: ddim").inversion == {"name": "ddim"}
    assert parse("control: none").control == {"name": "none"}
    assert parse("model: ./own\ncontrol: {strength: 0.5}").control == {"name": "masactrl", "strength": 0.5}
    assert parse("prompts: a red cube").prompts == ["a red cube"]


@pytest.mark.parametrize(
    "value", ["${oc.env:HOME}", "a ${oc.env:HOME,x} b", "${oc.decode:'1'}", "${model${oc.env:HOME}}", "${x:}"]
)
def test_the_environment_is_never_read(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/secret")
    found = problems(f'prompts: ["{value}"]\nmodel: {value}')
    assert [problem.split(": ")[1] for problem in found] == ["prompts.0", "model"]
    assert all("references such as ${oc.env:NAME} are not allowed" in problem for problem in found)
    assert "command line" in only("", f"model={value}")
    assert "/secret" not in "".join(found)


def test_a_key_may_refer_to_another() -> None:
    recipe = parse("source_prompt: a red ball\nprompts: ['${source_prompt} on a table']")
    assert recipe.prompts == ["a red ball on a table"]
    assert parse("output: out/${control.name}\ncontrol: {name: none}").output == "out/none"


def test_overrides_beat_the_file_and_values_beat_overrides() -> None:
    text = "guidance_scale: 5\nprompts: [a, b]\ncontrol: {name: masactrl, strength: 0.3, start_step: 2}\noutput: a"
    recipe = parse(
        text, overrides=["guidance_scale=1e0", "prompts=[c]", "control.strength=0.4", "output=b"], values={"output": "c"}
    )
    assert (recipe.guidance_scale, recipe.prompts, recipe.output) == (1.0, ["c"], "c")
    assert recipe.control == {"name": "masactrl", "strength": 0.4, "start_step": 2}
    assert parse("", overrides=["seed=1", "seed=2"]).seed == 2
    assert parse(text, overrides=["control=none"]).control == {"name": "none"}
    assert parse("", values={"prompts": ["a ${b} c"]}).prompts == ["a ${b} c"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("x", "write key=value"),
        ("=3", "write key=value"),
        ("a..b=3", "write key=value"),
        ("prompts[0]=a", "write key=value"),
        ("prompts=[a", "not valid YAML"),
        ("prompts.0=c", "give the key's whole value"),
        ("guidance_scale=-1", "greater than or equal to 0"),
        ("modle=x", "did you mean 'model'?"),
        ("control.strengh=1", "did you mean 'strength'?"),
        ("inversion=easyinf", "did you mean 'easyinv'?"),
        ("image.colour=red", "string"),
        ("prompts=[1]", "prompts.0: should be a valid string"),
        ("model=${nothing}", "'nothing' not found"),
    ],
)
def test_a_wrong_override_is_blamed_on_the_command_line(override: str, says: str) -> None:
    problem = only("image: a.png\nprompts: [a]\nguidance_scale: 3", override)
    assert problem.startswith(f"command line: {override!r}: ")
    assert says in problem


def test_mistakes_of_file_and_overrides_come_together() -> None:
    found = problems("fit: crp\nseed: 1", "seed=-1", "dtype=half")
    assert sorted(problem.split(": ")[0] for problem in found) == ["command line", "command line", "r.yaml:1:1"]


ASKED_AGAIN = "source_prompt: a\nnum_inference_steps: 5\ninversion: ddim\ninversion_guidance_scale: 1\nsize: 64\nfit: pad\n"


def test_what_an_inversion_file_has_decided_is_refused_key_by_key() -> None:
    found = problems(f"image: a.safetensors\nprompts: [b]\n{ASKED_AGAIN}")
    told = "decided when the inversion was made; give the image instead, or leave it out"
    assert found == [f"r.yaml:{line}:1: {key}: {told}" for line, key in enumerate(INVERSION_KEYS, start=3)]
    assert only("image: a.safetensors", "inversion.eta=1").startswith("command line: 'inversion.eta=1': inversion: decided")
    assert only("size: 64", "image=a.safetensors").startswith("r.yaml:1:1: size: decided")
    mixed = problems("image: a.safetensors\nsize: 64\nfit: crp", "seed=-1")
    assert sorted(problem.split(": ")[0] for problem in mixed) == ["command line", "r.yaml:2:1", "r.yaml:3:1", "r.yaml:3:1"]


def test_beside_an_inversion_file_everything_else_may_be_set() -> None:
    recipe = parse("model: embedded\nimage: a.safetensors\nprompts: [b]\nguidance_scale: 3\ncontrol: none\nseed: 1")
    assert (recipe.guidance_scale, recipe.control, recipe.seed) == (3, {"name": "none"}, 1)
    assert parse(recipe.to_yaml()) == recipe
    assert parse(f"image: a.png\n{ASKED_AGAIN}").num_inference_steps == 5
    assert parse(f"image: a.png\n{ASKED_AGAIN}", values={"image": "a.safetensors"}).num_inference_steps == 5, "as `edit` does"
    assert parse("model: sd-turbo\nimage: a.safetensors").num_inference_steps == 4, "a preset's key is nobody's mistake"


def test_a_style_picture_beside_an_inversion_file_is_inverted_by_the_recipe() -> None:
    text = "image: a.safetensors\nstyle: b.png\ncontrol: portrait\nnum_inference_steps: 20\ninversion: ddim"
    assert parse(text).num_inference_steps == 20
    assert parse(parse(text).to_yaml()) == parse(text)
    assert only(text, "source_prompt=a face").startswith("command line: 'source_prompt=a face': source_prompt: decided")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"model: \xff\xfe"), "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, make: Callable[[Path], object], says: str) -> None:
    path = tmp_path / "r.yaml"
    make(path)
    with pytest.raises(RecipeError) as caught:
        read(path)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(f"{path}: cannot be read (")
    assert says in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert read(path).seed == 3


@pytest.mark.parametrize("method", [EditPipeline.edit, EditPipeline.invert, EditPipeline.__call__], ids=lambda m: m.__name__)
def test_defaults_are_the_pipelines(method: Callable[..., object]) -> None:
    recipe = dataclasses.asdict(EditRecipe())
    renamed = {"method": "inversion"} if method is EditPipeline.invert else {}
    renamed |= (
        {"guidance_scale": "inversion_guidance_scale", "prompt": "source_prompt"} if method is EditPipeline.invert else {}
    )
    compared = []
    for name, parameter in inspect.signature(method).parameters.items():
        key = renamed.get(name, name)
        if key in recipe and parameter.default is not inspect.Parameter.empty:
            expected = recipe[key]["name"] if key in ("inversion", "control") else recipe[key]
            assert parameter.default == expected, key
            compared.append(key)
    assert len(compared) >= 5


@pytest.mark.parametrize("prompt", ["a ${model} b", 'it\'s: "quoted" # here', "a $5 \\ b", "日本 ${"])
def test_a_prompt_of_any_letters_survives_yaml(prompt: str) -> None:
    recipe = EditRecipe(prompts=[prompt])
    assert parse(recipe.to_yaml()) == recipe


def test_a_model_preset_gives_the_defaults_and_the_file_decides_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = parse("model: sdxl\nguidance_scale: 7\ncontrol: {sites: light}", overrides=["size=512"])
    assert (recipe.dtype, recipe.size, recipe.guidance_scale) == ("float16", 512, 7)
    assert recipe.control == {**parse("model: sdxl").control, "sites": "light"}
    assert parse("", values={"model": "sd-turbo"}).num_inference_steps == 4
    assert parse("", overrides=["model=sd-turbo"]).inversion == {"name": "renoise"}
    assert parse("model: sd-turbo", overrides=["inversion.eta=0.5"]).inversion == {"name": "renoise", "eta": 0.5}
    refined = parse("", overrides=["control.start_step=0.2"]).control
    assert refined == {**parse("").control, "start_step": 0.2}, "the other recommended settings stay"
    named = parse("control: {name: masactrl, start_step: 0.2}").control
    assert named == {"name": "masactrl", "start_step": 0.2}, "a name starts from the method's defaults"
    Path("sdxl").mkdir()
    assert parse("model: sdxl").guidance_scale == EditRecipe().guidance_scale, "a folder of that name is that folder"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("schedule: {timestep_spacin: trailing}", "recipe:1:12: schedule.timestep_spacin: unknown key - did you mean"),
        ("schedule: trailing", "recipe:1:1: schedule: "),
        ("schedule: {timestep_spacing: [1]}", "recipe:1:12: schedule.timestep_spacing: "),
        ("lora_scale: 100", "recipe:1:1: lora_scale: should be less than or equal to 10"),
        ("lora_scale: true", "recipe:1:1: lora_scale: should be a number"),
        ("low_memory: 3", "recipe:1:1: low_memory: "),
        ("lora: [a, b]", "recipe:1:1: lora: "),
    ],
)
def test_mistakes_about_the_model_are_named(text: str, problem: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse(text)
    assert len(error.value.problems) == 1, error.value.problems
    assert error.value.problems[0].startswith(problem)
