"""Source features: evaluated once for many targets they make the same edits as the source's rows beside them, and cost less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from attention_control import ReferenceCache, list_sites
from easyinv_edit.errors import InputError
from easyinv_edit.inversion import INVERSIONS
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.result import EditResult
from easyinv_edit.trajectory import Trajectory
from tests.helpers import relative_error

T, START = 6, 2
SOURCE, TARGETS, THIRD = "a red ball", ["a blue cube", "a green cone"], "a ring"
PROMPTS = [*TARGETS, THIRD]
EXACT, SINGLE = 1e-10, 1e-5
"""Relative errors that are rounding in float64 and in float32."""
MASA: dict[str, Any] = {"name": "masactrl", "start_step": START}
QUICK: dict[str, dict[str, Any]] = {"null_text": {"iterations": 1}}
FRONT = torch.zeros(8, 8).index_fill_(1, torch.arange(2, 6), 1.0)
CONTROLS: dict[str, dict[str, Any]] = {
    "masactrl": MASA,
    "half": {**MASA, "start_step": 0, "strength": 0.5},
    "masked": {**MASA, "source_mask": FRONT, "target_mask": FRONT.mT.contiguous(), "keep_background": True},
    "structure": {"name": "structure"},
    "style_aligned": {"name": "style_aligned"},
    "compose": {
        "name": "compose",
        "controllers": [{"name": "structure", "stop_step": 3}, {"name": "masactrl", "start_step": 3}],
    },
    "none": {"name": "none"},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning"),
    pytest.mark.filterwarnings("ignore:the mask is"),
]


def picture_of(number: int = 0) -> Image.Image:
    image = Image.new("RGB", (64, 64), ((255, 255, 255), (90, 120, 200))[number])
    image.paste((200, 40, 40), (16, 20, 48, 52))
    image.paste((240, 220, 60), (16, 32, 48, 40))
    return image


def inverted(pipe: EditPipeline, method: Any = "ddim", prompt: str = "", **options: Any) -> Trajectory:
    """A 32-pixel picture, so 8 x 8 latents, inverted in T steps."""
    chosen = {"name": method, **QUICK.get(method, {})} if isinstance(method, str) else method
    steps = max(T, INVERSIONS[chosen["name"]].fewest_steps)
    settings = {"num_inference_steps": steps, "size": 32, **options}
    return pipe.invert(picture_of(), prompt, chosen, **settings)


def edited(pipe: EditPipeline, trajectory: Trajectory, features: Any, **options: Any) -> EditResult:
    settings = {"prompt": TARGETS, "control": MASA, "guidance_scale": 3.0, "output_type": "latent", **options}
    return pipe.edit(trajectory, source_features=features, **settings)


def spent(result: EditResult) -> tuple[int, int]:
    """(evaluations, calls) of the edit."""
    return result.cost["edit"].evaluations, result.cost["edit"].calls


@dataclass
class Bench:
    """One float64 pipeline, and its inversions and live edits, each made once."""

    pipe: EditPipeline
    inversions: dict[tuple[str, str], Trajectory] = field(default_factory=dict)
    edits: dict[tuple[str, str, str, float], Tensor] = field(default_factory=dict)
    threefold: list[Tensor] = field(default_factory=list)

    def inverted(self, method: str = "ddim", prompt: str = "") -> Trajectory:
        if (method, prompt) not in self.inversions:
            self.inversions[method, prompt] = inverted(self.pipe, method, prompt)
        return self.inversions[method, prompt]

    def live(self, method: str, prompt: str, control: str, guidance: float) -> Tensor:
        """The edit to all targets with the source's rows beside them."""
        key = (method, prompt, control, guidance)
        if key not in self.edits:
            options = {"control": CONTROLS[control], "guidance_scale": guidance}
            self.edits[key] = edited(self.pipe, self.inverted(method, prompt), "live", **options).images
        return self.edits[key]

    def three(self) -> Tensor:
        """The live edit to three prompts, guided, of the DDIM inversion without a prompt."""
        if not self.threefold:
            self.threefold.append(edited(self.pipe, self.inverted(), "live", prompt=PROMPTS).images)
        return self.threefold[0]


@pytest.fixture(scope="module")
def bench(untrained_folder: Path) -> Bench:
    pipe = EditPipeline.from_pretrained(untrained_folder, dtype=torch.float64, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return Bench(pipe)


EVERY = list(product(["", SOURCE], [1.0, 3.0]))
ONE = [(SOURCE, 3.0)]
"""Source prompt and guidance."""


def cases(every: list[str], one: list[str]) -> list[tuple[str, str, float]]:
    """(name, prompt, guidance): all pairs for some names, one pair for others."""
    return [(name, *pair) for names, pairs in ((every, EVERY), (one, ONE)) for name in names for pair in pairs]


# --- the same edits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("control", "prompt", "guidance"), cases(["masactrl", "structure", "style_aligned"], ["half", "masked", "compose"])
)
def test_exact_features_make_the_live_edit(bench: Bench, control: str, prompt: str, guidance: float) -> None:
    exact = edited(bench.pipe, bench.inverted("ddim", prompt), "exact", control=CONTROLS[control], guidance_scale=guidance)
    live = bench.live("ddim", prompt, control, guidance)
    assert live.dtype == torch.float64
    assert relative_error(exact.images, live) <= EXACT
    plain = bench.live("ddim", prompt, "none", guidance)
    assert relative_error(live, plain) > 1e-3, "control matters, so that reading nothing would show"


@pytest.mark.parametrize(("method", "prompt", "guidance"), cases(["null_text"], ["negative_prompt", "bdia"]))
def test_exact_features_make_the_live_edit_whatever_the_inversion(
    bench: Bench, method: str, prompt: str, guidance: float
) -> None:
    """With embeddings of every level's own, with another negative prompt, and with latents in pairs."""
    exact = edited(bench.pipe, bench.inverted(method, prompt), "exact", guidance_scale=guidance).images
    assert relative_error(exact, bench.live(method, prompt, "masactrl", guidance)) <= EXACT


@pytest.mark.parametrize("method", ["null_text", "negative_prompt"])
def test_exact_features_of_joined_keys_whatever_the_inversion(bench: Bench, method: str) -> None:
    exact = edited(bench.pipe, bench.inverted(method, SOURCE), "exact", control="style_aligned").images
    assert relative_error(exact, bench.live(method, SOURCE, "style_aligned", 3.0)) <= EXACT


def test_auto_makes_the_live_edit_of_pairs_of_latents(bench: Bench) -> None:
    """EDICT evaluates the source at two latents a level, neither of which is the level's own."""
    made = edited(bench.pipe, bench.inverted("edict"), "auto", batch_size=1, guidance_scale=1.0).images
    assert relative_error(made, bench.live("edict", "", "masactrl", 1.0)) <= EXACT


@pytest.mark.parametrize(("count", "size"), [(1, None), (1, 2), (3, None), (3, 2), (3, 1)])
def test_exact_features_are_evaluated_once_whatever_the_batches(bench: Bench, count: int, size: int | None) -> None:
    """The same edits at one evaluation of the source per controlled step."""
    made = edited(bench.pipe, bench.inverted(), "exact", prompt=PROMPTS[:count], batch_size=size)
    assert made.images.shape == (count, 4, 8, 8)
    assert relative_error(made.images, bench.three()[:count]) <= EXACT
    assert made.cost["invert"].evaluations == T
    assert spent(made) == (T - START + 2 * T * count, 1 + T * -(-count // (size or count)))


@pytest.mark.parametrize(("count", "size"), [(1, None), (3, 2), (3, 1)])
def test_batches_do_not_change_a_live_edit(bench: Bench, count: int, size: int | None) -> None:
    made = edited(bench.pipe, bench.inverted(), "live", prompt=PROMPTS[:count], batch_size=size)
    assert relative_error(made.images, bench.three()[:count]) <= EXACT
    assert spent(made)[0] == -(-count // (size or count)) * (T - START) + 2 * T * count, "the source again for each batch"


@pytest.mark.parametrize(("control", "prompt", "guidance"), cases([], ["masactrl", "structure", "style_aligned"]))
def test_in_single_precision_too(untrained: EditPipeline, control: str, prompt: str, guidance: float) -> None:
    trajectory = inverted(untrained, "ddim", prompt)
    options = {"control": CONTROLS[control], "guidance_scale": guidance}
    live, exact = (edited(untrained, trajectory, features, **options).images for features in ("live", "exact"))
    assert exact.dtype == torch.float32
    assert relative_error(exact, live) <= SINGLE


def test_more_levels_than_are_evaluated_at_once(bench: Bench) -> None:
    trajectory = inverted(bench.pipe, num_inference_steps=10)
    options: dict[str, Any] = {"control": {"name": "masactrl", "start_step": 0}, "prompt": TARGETS[:1]}
    live, exact = (edited(bench.pipe, trajectory, features, **options) for features in ("live", "exact"))
    assert relative_error(exact.images, live.images) <= EXACT
    assert spent(exact) == (3 * 10, 10 + 2), "eight levels, then two"


def test_another_negative_prompt_makes_both_halves_matter(bench: Bench) -> None:
    live, exact = (edited(bench.pipe, bench.inverted(), f, negative_prompt="a dark ring") for f in ("live", "exact"))
    assert relative_error(exact.images, live.images) <= EXACT
    assert spent(exact)[0] == 2 * (T - START) + 2 * T * 2
    assert relative_error(exact.images, bench.live("ddim", "", "masactrl", 3.0)) > 1e-3


def test_oblong_pictures_and_skipped_steps(bench: Bench) -> None:
    """Where sampling starts below level T and features of the first steps are not needed."""
    method = {"name": "edit_friendly", "skip": 0.5}
    trajectory = inverted(bench.pipe, method, SOURCE, size=(32, 64), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"control": {"name": "structure", "stop_step": 1.0}, "batch_size": 1}
    live, exact = (edited(bench.pipe, trajectory, features, **options) for features in ("live", "exact"))
    assert relative_error(exact.images, live.images) <= EXACT
    assert spent(exact)[0] == 3 + 2 * 3 * 2


def test_noise_mix_is_the_same_noise_whatever_the_batch(bench: Bench) -> None:
    def mixed(size: int | None, seed: int = 1) -> Tensor:
        noise = {"noise_mix": 0.5, "generator": torch.Generator().manual_seed(seed)}
        return edited(bench.pipe, bench.inverted(), "auto", prompt=[TARGETS[0]] * 2, batch_size=size, **noise).images

    together = mixed(None)
    assert relative_error(mixed(1), together) <= EXACT
    assert (together[0] - together[1]).abs().max() > 1e-3, "each target has noise of its own"
    assert relative_error(mixed(None, seed=2), together) > 1e-3


def test_an_unpinned_source_does_not_mind_batches(bench: Bench) -> None:
    together, apart = (
        edited(bench.pipe, bench.inverted("ddim", SOURCE), "auto", pin_source=False, batch_size=size) for size in (None, 1)
    )
    assert relative_error(apart.images, together.images) <= EXACT
    assert spent(apart)[0] > spent(together)[0], "live: its row is evaluated in every batch"


# --- what it costs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "prompt", "control", "guidance", "source"),
    [
        ("ddim", "", "masactrl", 3.0, T - START),
        ("ddim", SOURCE, "masactrl", 3.0, 2 * (T - START)),
        ("ddim", SOURCE, "masactrl", 1.0, T - START),
        ("ddim", SOURCE, "half", 3.0, 2 * T),
        ("ddim", SOURCE, "structure", 3.0, 5),
        ("ddim", SOURCE, "style_aligned", 3.0, 2 * T),
        ("negative_prompt", SOURCE, "masactrl", 3.0, T - START),
        ("null_text", "", "masactrl", 3.0, 2 * (T - START)),
        ("null_text", "", "masactrl", 1.0, T - START),
    ],
)
def test_only_the_halves_that_are_read_are_evaluated(
    bench: Bench, method: str, prompt: str, control: str, guidance: float, source: int
) -> None:
    options = {"control": CONTROLS[control], "guidance_scale": guidance, "prompt": TARGETS[0]}
    made = edited(bench.pipe, bench.inverted(method, prompt), "exact", **options)
    assert spent(made)[0] == source + T * (1 if guidance == 1 else 2)


def test_auto_is_live_for_one_batch_and_exact_for_several(bench: Bench) -> None:
    for size, chosen, calls in ((2, "live", T), (1, "exact", 1 + 2 * T)):
        auto, named = (edited(bench.pipe, bench.inverted(), features, batch_size=size) for features in ("auto", chosen))
        assert torch.equal(auto.images, named.images)
        assert spent(auto) == spent(named)
        assert spent(auto)[1] == calls


def test_auto_is_live_where_features_cannot_be_kept(bench: Bench) -> None:
    """And each batch is edited by the words of its own prompts."""
    options: dict[str, Any] = {"control": "prompt_to_prompt", "prompt": ["a red cube", "a ball"]}
    trajectory = bench.inverted("ddim", SOURCE)
    apart = edited(bench.pipe, trajectory, "auto", batch_size=1, **options)
    alone = [edited(bench.pipe, trajectory, "live", **{**options, "prompt": prompt}) for prompt in options["prompt"]]
    assert relative_error(apart.images, torch.cat([made.images for made in alone])) <= EXACT
    assert spent(apart)[0] == sum(spent(made)[0] for made in alone)


def test_without_control_nothing_is_evaluated_before(bench: Bench) -> None:
    assert spent(edited(bench.pipe, bench.inverted(), "exact", control="none", batch_size=1)) == (2 * T * 2, 2 * T)


# --- features of the inversion ------------------------------------------------------------------------------------------


def seen_by_a_hook(pipe: EditPipeline, z: Tensor, label: int, prompt: str, path: str) -> Tensor:
    """What a plain hook sees go into a site when the source alone is evaluated at a latent."""
    seen: list[Tensor] = []

    def watch(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    hook = pipe.backbone.network.get_submodule(path).register_forward_pre_hook(watch, with_kwargs=True)
    with torch.no_grad():
        pipe.backbone.predict(z, label, pipe.backbone.embed([prompt]))
    hook.remove()
    return seen[0]


def features_of(trajectory: Trajectory) -> ReferenceCache:
    assert isinstance(trajectory.features, ReferenceCache)
    return trajectory.features


@pytest.mark.parametrize("prompt", ["", SOURCE])
def test_ddim_keeps_what_it_saw_at_the_level_below(bench: Bench, prompt: str) -> None:
    trajectory = inverted(bench.pipe, "ddim", prompt, keep_features=MASA)
    features, sites = features_of(trajectory), list_sites(bench.pipe.backbone.network)
    assert {site.index for site in sites if features.holds(START, [site.path])} == set(range(10, 16))
    for step in range(START, T):
        level = T - step
        here = (trajectory.schedule.timesteps[level], prompt, sites[12].path)
        kept = features.get(step, sites[12].path)[1]
        assert torch.equal(kept, seen_by_a_hook(bench.pipe, trajectory.latents[level - 1], *here))
        assert relative_error(kept, seen_by_a_hook(bench.pipe, trajectory.latents[level], *here)) > 1e-3


def test_keeping_features_changes_nothing_about_the_inversion(bench: Bench) -> None:
    trajectory = inverted(bench.pipe, keep_features=MASA)
    assert torch.equal(trajectory.latents, bench.inverted().latents)
    assert trajectory.cost.evaluations == T
    assert bench.inverted().features is None


@pytest.mark.parametrize("size", [1, None])
def test_features_of_the_inversion_cost_no_evaluation(bench: Bench, size: int | None) -> None:
    trajectory = inverted(bench.pipe, keep_features=MASA)
    made = edited(bench.pipe, trajectory, "inversion", batch_size=size)
    assert spent(made) == (2 * T * 2, T * (2 if size == 1 else 1))
    assert made.cost["invert"].evaluations == T


def test_features_of_ddim_are_an_approximation(bench: Bench) -> None:
    trajectory = inverted(bench.pipe, keep_features=MASA)
    made = edited(bench.pipe, trajectory, "inversion").images
    assert 1e-3 < relative_error(made, bench.live("ddim", "", "masactrl", 3.0)) < 1


def test_features_of_a_fixed_point_are_exact(bench: Bench) -> None:
    """Its last evaluation of a level is at the level's own latent."""
    method = {"name": "fixed_point", "iterations": 40, "tolerance": 1e-5}
    trajectory = inverted(bench.pipe, method, keep_features=MASA)
    features, site = features_of(trajectory), list_sites(bench.pipe.backbone.network)[15]
    for step in range(START, T):
        label = trajectory.schedule.timesteps[T - step]
        exact = seen_by_a_hook(bench.pipe, trajectory.latents[T - step], label, "", site.path)
        assert relative_error(features.get(step, site.path)[1], exact) <= 1e-4
    kept, exact = (edited(bench.pipe, trajectory, f).images for f in ("inversion", "exact"))
    assert relative_error(kept, exact) <= 1e-4


def test_a_guided_inversion_keeps_both_halves(bench: Bench) -> None:
    trajectory = inverted(bench.pipe, "ddim", SOURCE, keep_features=MASA, guidance_scale=2.0)
    features, site = features_of(trajectory), list_sites(bench.pipe.backbone.network)[12]
    streams, kept = features.get(START, site.path)
    assert [row.half for row in streams.rows] == ["unconditional", "conditional"]
    level = T - START
    here = trajectory.latents[level - 1], trajectory.schedule.timesteps[level]
    halves = torch.cat([seen_by_a_hook(bench.pipe, *here, prompt, site.path) for prompt in ("", SOURCE)])
    assert relative_error(kept, halves) <= EXACT


def test_kept_features_can_be_given_as_they_are(bench: Bench) -> None:
    trajectory = inverted(bench.pipe, keep_features=MASA)
    named = edited(bench.pipe, trajectory, "inversion", batch_size=1)
    given = edited(bench.pipe, bench.inverted(), trajectory.features, batch_size=1)
    assert torch.equal(given.images, named.images)
    assert spent(given) == spent(named)


def test_features_of_more_sites_and_steps_serve_a_controller_of_fewer(bench: Bench) -> None:
    trajectory = inverted(bench.pipe, keep_features="style_aligned")
    made = edited(bench.pipe, trajectory, "inversion").images
    assert torch.equal(made, edited(bench.pipe, inverted(bench.pipe, keep_features=MASA), "inversion").images)


def test_an_empty_cache_is_filled_and_serves_more_prompts(bench: Bench) -> None:
    cache = ReferenceCache()
    first = edited(bench.pipe, bench.inverted("ddim", SOURCE), cache, prompt=TARGETS[:1])
    filled = cache.bytes
    more = edited(bench.pipe, bench.inverted("ddim", SOURCE), cache, prompt=TARGETS[1:])
    assert cache.bytes == filled > 0
    assert [spent(made)[0] for made in (first, more)] == [2 * (T - START) + 2 * T, 2 * T]
    assert relative_error(torch.cat([first.images, more.images]), bench.live("ddim", SOURCE, "masactrl", 3.0)) <= EXACT


def test_a_cache_filled_without_guidance_does_not_pass_for_a_guided_one(bench: Bench) -> None:
    """It lacks the half that the targets' unconditional rows read: refused, or filled anew, but no other edit."""
    cache, trajectory = ReferenceCache(), bench.inverted("ddim", SOURCE)
    edited(bench.pipe, trajectory, cache, guidance_scale=1.0)
    try:
        again = edited(bench.pipe, trajectory, cache).images
    except InputError:
        return
    assert relative_error(again, bench.live("ddim", SOURCE, "masactrl", 3.0)) <= EXACT


def test_a_cache_stores_in_the_dtype_it_was_made_with(bench: Bench) -> None:
    caches = {dtype: ReferenceCache(dtype=dtype) for dtype in (None, torch.float32)}
    made = {dtype: edited(bench.pipe, bench.inverted(), cache).images for dtype, cache in caches.items()}
    assert caches[None].bytes == 2 * caches[torch.float32].bytes > 0
    assert made[torch.float32].dtype == torch.float64
    assert 0 < relative_error(made[torch.float32], made[None]) < 1e-5


def test_a_cache_that_is_too_small_is_refused(bench: Bench) -> None:
    with pytest.raises(InputError, match="more than the 1,000 bytes allowed"):
        edited(bench.pipe, bench.inverted(), ReferenceCache(max_bytes=1000))


def test_features_are_not_saved(bench: Bench, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("with", "without")}
    inverted(bench.pipe, keep_features="style_aligned").save(files["with"])
    bench.inverted().save(files["without"])
    names = []
    for file in files.values():
        with safe_open(file, framework="pt") as content:
            names.append(set(content.keys()))
    assert names[0] == names[1]
    loaded = Trajectory.load(files["with"])
    assert loaded.features is None
    with pytest.raises(InputError, match="none were kept; invert with keep_features"):
        edited(bench.pipe, loaded, "inversion")


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_inversion_features_that_were_not_kept_are_refused(bench: Bench) -> None:
    with pytest.raises(InputError, match="none were kept; invert with keep_features"):
        edited(bench.pipe, bench.inverted(), "inversion")


@pytest.mark.parametrize("features", ["exact", "inversion", "cache"])
def test_an_unpinned_source_is_refused(bench: Bench, features: str) -> None:
    trajectory = inverted(bench.pipe, keep_features=MASA)
    given = trajectory.features if features == "cache" else features
    with pytest.raises(InputError, match="the source is not pinned; use 'live'") as refusal:
        edited(bench.pipe, trajectory, given, pin_source=False)
    assert len(str(refusal.value)) < 200, "a cache is named, not printed"


@pytest.mark.parametrize("control", ["prompt_to_prompt", "plug_and_play"])
def test_a_controller_that_needs_the_sources_rows_is_refused(bench: Bench, control: str) -> None:
    with pytest.raises(InputError, match="needs the source's own rows; use 'live'"):
        edited(bench.pipe, bench.inverted("ddim", SOURCE), "exact", control=control)


@pytest.mark.parametrize(("mode", "size"), [("Exact", None), ("", 1), ("cached", None)])
def test_an_unknown_mode_is_refused(bench: Bench, mode: str, size: int | None) -> None:
    with pytest.raises(InputError, match=f"source_features '{mode}' is unknown; choose auto, live, exact, inversion"):
        edited(bench.pipe, bench.inverted(), mode, batch_size=size)


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("features", ["auto", "exact"])
def test_a_batch_of_nothing_is_refused(bench: Bench, features: str, size: int) -> None:
    with pytest.raises(InputError, match=f"batch_size is {size}; it must be at least 1"):
        edited(bench.pipe, bench.inverted(), features, batch_size=size)


@pytest.mark.parametrize("kept_for", ["structure", {**MASA, "sites": "10-14"}])
def test_features_of_another_controller_are_refused(bench: Bench, kept_for: Any) -> None:
    trajectory = inverted(bench.pipe, keep_features=kept_for)
    for given in ("inversion", trajectory.features):
        with pytest.raises(InputError, match=r"lack step \d; they were kept for another controller or step count"):
            edited(bench.pipe, trajectory, given)


@pytest.mark.parametrize("steps", [T - 2, T + 2])
def test_features_of_another_step_count_are_refused(bench: Bench, steps: int) -> None:
    """Fewer steps than the edit has leave some out; of more, the same numbers stand for other levels."""
    control = {"name": "masactrl", "start_step": 0}
    given = inverted(bench.pipe, keep_features=control, num_inference_steps=steps).features
    with pytest.raises(InputError, match="another controller or step count"):
        edited(bench.pipe, bench.inverted(), given, control=control)


def test_features_of_another_size_are_refused(bench: Bench) -> None:
    given = inverted(bench.pipe, keep_features=MASA, size=64).features
    with pytest.raises(InputError, match="size"):
        edited(bench.pipe, bench.inverted(), given)


@pytest.mark.parametrize("method", ["null_text", "prompt_tuning"])
def test_a_method_that_visits_levels_twice_keeps_no_features(bench: Bench, method: str) -> None:
    with pytest.raises(InputError, match=f"{method}: features cannot be kept while it inverts; use source_features='exact'"):
        inverted(bench.pipe, method, keep_features=MASA)


def test_a_batch_of_images_keeps_no_features(bench: Bench) -> None:
    options: dict[str, Any] = {"num_inference_steps": T, "size": 32, "keep_features": MASA}
    with pytest.raises(InputError, match="features cannot be kept while it inverts"):
        bench.pipe.invert_batch([picture_of(0), picture_of(1)], ["", ""], "ddim", **options)
    (single,) = bench.pipe.invert_batch([picture_of(0)], [""], "ddim", **options)
    assert set(features_of(single).steps) >= set(range(START, T))


@pytest.mark.parametrize("control", ["prompt_to_prompt", "plug_and_play"])
@pytest.mark.parametrize("prompt", ["", SOURCE])
def test_features_are_not_kept_for_a_controller_that_needs_the_sources_rows(bench: Bench, control: str, prompt: str) -> None:
    with pytest.raises(InputError, match=f"{control}: needs the source's own rows, so its features cannot be kept"):
        inverted(bench.pipe, "ddim", prompt, keep_features=control)


def test_features_are_kept_for_a_controller_whose_masks_are_pictures(bench: Bench) -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    control = {**MASA, "source_mask": mask, "target_mask": mask}
    trajectory = inverted(bench.pipe, keep_features=control)
    assert set(features_of(trajectory).steps) >= set(range(START, T))
    assert spent(edited(bench.pipe, trajectory, "inversion", control=control))[0] == 2 * T * 2


def test_processors_are_back_after_keeping_evaluating_and_refusing(bench: Bench) -> None:
    before = dict(bench.pipe.backbone.network.attn_processors)
    trajectory = inverted(bench.pipe, keep_features=MASA)
    edited(bench.pipe, trajectory, "exact", batch_size=1)
    edited(bench.pipe, trajectory, "inversion")
    with pytest.raises(InputError):
        edited(bench.pipe, trajectory, "inversion", control="structure")
    after = bench.pipe.backbone.network.attn_processors
    assert all(after[name] is before[name] for name in before)


# --- memory -------------------------------------------------------------------------------------------------------------


@contextmanager
def room_for(pipe: EditPipeline, rows: int) -> Iterator[list[int]]:
    """A network that has memory for so many rows; the rows of every call it was given."""
    calls: list[int] = []

    def check(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(len(args[0]))
        if calls[-1] > rows:
            raise torch.OutOfMemoryError(f"no memory for {calls[-1]} rows")

    hook = pipe.backbone.network.register_forward_pre_hook(check)
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.parametrize("features", ["auto", "live"])
def test_a_batch_that_does_not_fit_is_halved(bench: Bench, features: str) -> None:
    options = {"control": {**MASA, "start_step": 3}}
    live = edited(bench.pipe, bench.inverted(), "live", **options).images
    with room_for(bench.pipe, 3) as calls:
        made = edited(bench.pipe, bench.inverted(), features, **options).images
    assert calls.count(4) + calls.count(5) == 1, "two targets are tried once"
    assert relative_error(made, live) <= EXACT


def test_levels_that_do_not_fit_are_evaluated_in_smaller_groups(bench: Bench) -> None:
    """The source's features need no more memory than the edit itself: two halves of one target and the source."""
    with room_for(bench.pipe, 3):
        made = edited(bench.pipe, bench.inverted(), "auto", batch_size=1).images
    assert relative_error(made, bench.live("ddim", "", "masactrl", 3.0)) <= EXACT


def test_one_target_that_does_not_fit_is_an_error(bench: Bench) -> None:
    before = dict(bench.pipe.backbone.network.attn_processors)
    with room_for(bench.pipe, 1), pytest.raises(torch.OutOfMemoryError):
        edited(bench.pipe, bench.inverted(), "live")
    after = bench.pipe.backbone.network.attn_processors
    assert all(after[name] is before[name] for name in before)


# --- callbacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["live", "exact"])
def test_callbacks_are_called_for_every_batch(bench: Bench, features: str) -> None:
    calls: list[tuple[int, int, int]] = []

    def watch(_pipe: EditPipeline, step: int, timestep: int, tensors: dict[str, Tensor]) -> None:
        calls.append((step, timestep, len(tensors["latents"])))

    trajectory = bench.inverted()
    edited(bench.pipe, trajectory, features, batch_size=1, callback_on_step_end=watch)
    labels = trajectory.schedule.timesteps[:0:-1]
    assert calls == [(step, label, 2) for _ in range(2) for step, label in enumerate(labels)], "the source is row 0"


@pytest.mark.parametrize("features", ["live", "exact"])
def test_what_callbacks_change_counts_in_every_batch(bench: Bench, features: str) -> None:
    def halve(_pipe: EditPipeline, step: int, _timestep: int, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return {"latents": tensors["latents"] / 2} if step == T - 1 else None

    made = edited(bench.pipe, bench.inverted(), features, batch_size=1, callback_on_step_end=halve).images
    assert relative_error(made, bench.live("ddim", "", "masactrl", 3.0) / 2) <= EXACT
