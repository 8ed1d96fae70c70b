"""What an edit promises whatever the model family, the inversion method and the controller: every method and every
controller on Stable Diffusion with epsilon and with v prediction (16 attention sites) and on SDXL (70); every pair of them
with `-m slow`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from attention_control import CONTROLLERS, list_sites
from easyinv_edit.cost import Cost
from easyinv_edit.inversion import INVERSIONS, sampler_of
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.trajectory import Trajectory
from tests.models import FAMILIES

T = 3
SIDE = 8
SOURCE, TARGET, OTHER = "a red cube", "a ball", "a green cone"
QUICK: dict[str, dict[str, Any]] = {"null_text": {"iterations": 1}, "prompt_tuning": {"iterations": 1}}
"""Settings that make a method fast; the others run with their defaults."""
ROUTED: dict[str, dict[str, Any]] = {
    "masactrl": {"start_step": 0},
    "object_add": {"word": "a", "box": (0.25, 0.25, 0.75, 0.75)},
    "portrait": {"draw_content": False},
}
"""Settings with which a controller acts from the first of so few steps and leaves the source alone."""

pytestmark = pytest.mark.filterwarnings("ignore::easyinv_edit.errors.EasyInvWarning")
SLOW = pytest.mark.slow
EVERY = [*product(INVERSIONS, CONTROLLERS)]
SOME = [pair for pair in EVERY if pair[0] == "ddim" or pair[1] == "masactrl"]
"""Pairs in which every method and every controller stands."""
MORE = [pair for pair in EVERY if (pair[0] == "edict" or pair[1] == "none") and pair not in SOME]
"""The same beside pairs of latents, and beside no control."""
SOME_PAIRS = pytest.mark.parametrize(("inversion", "controller"), [*SOME, *(pytest.param(*pair, marks=SLOW) for pair in MORE)])


def pinned_or_not(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """Pairs on every family, pinned and not. Those of `SOME` on SD 1.x both, on the others pinned; the rest by `-m slow`."""
    return pytest.mark.parametrize(
        ("bench", "inversion", "controller", "pinned"),
        [
            pytest.param(family, *pair, pinned, marks=() if pair in SOME and (pinned or family == "sd") else SLOW)
            for family, pair, pinned in product(FAMILIES, pairs, (True, False))
        ],
        indirect=["bench"],
    )


def steps_of(inversion: str) -> int:
    """As few as the method takes."""
    return max(T, INVERSIONS[inversion].fewest_steps)


def tolerance(inversion: str) -> float:
    """Of float32 rounding, which differs from batch to batch; pairs of latents amplify it (2e-13 in float64)."""
    return 1e-3 if inversion in ("edict", "bdia") else 1e-4


@dataclass
class Edit:
    """The targets' latents, the source branch after each step, and the cost."""

    targets: Tensor
    source: list[Tensor]
    cost: Cost


@dataclass
class Bench:
    """One pipeline for all pairs, so that what an edit leaves behind shows in the next, and what was made with it."""

    pipe: EditPipeline
    inversions: dict[tuple[str, int], Trajectory] = field(default_factory=dict)
    edits: dict[tuple[str, str, bool], Edit] = field(default_factory=dict)

    def inverted(self, inversion: str, number: int = 0) -> Trajectory:
        """Of one of two pictures, made once."""
        if (inversion, number) not in self.inversions:
            image = Image.new("RGB", (64, 64), ((235, 235, 225), (90, 120, 200))[number])
            image.paste((200, 40, 40), (16, 20, 48, 52))
            method = {"name": inversion, **QUICK.get(inversion, {})}
            options: dict[str, Any] = {"num_inference_steps": steps_of(inversion), "size": 4 * SIDE}
            generator = torch.Generator().manual_seed(0)
            self.inversions[inversion, number] = self.pipe.invert(image, SOURCE, method, generator=generator, **options)
        return self.inversions[inversion, number]

    def edited(self, trajectory: Trajectory, controller: str, prompt: Any = TARGET, **options: Any) -> Edit:
        source: list[Tensor] = []

        def watch(_pipe: EditPipeline, _step: int, _timestep: int, tensors: dict[str, Tensor]) -> None:
            source.append(tensors["latents"][:1].clone())

        settings = {"style": self.inverted(trajectory.method, 1)} if controller == "portrait" else {}
        chosen = CONTROLLERS[controller]
        control = {"name": controller, **ROUTED.get(controller, getattr(chosen, "example", {}))}
        settings |= {"guidance_scale": 3, "output_type": "latent", "callback_on_step_end": watch, **options}
        result = self.pipe.edit(trajectory, prompt, control=control, **settings)
        assert isinstance(result.images, Tensor)
        assert result.images.isfinite().all()
        return Edit(result.images, source, result.cost["edit"])

    def first(self, inversion: str, controller: str, pinned: bool) -> Edit:
        """The edit to `TARGET`, made once."""
        key = (inversion, controller, pinned)
        if key not in self.edits:
            self.edits[key] = self.edited(self.inverted(inversion), controller, pin_source=pinned)
        return self.edits[key]


@cache
def opened(family: str) -> Bench:
    """One for all tests, in whatever order they run."""
    pipe = EditPipeline.from_pipe(FAMILIES[family]())
    pipe.set_progress_bar_config(disable=True)
    return Bench(pipe)


@pytest.fixture(params=FAMILIES)
def bench(request: pytest.FixtureRequest) -> Bench:
    return opened(request.param)


def test_the_families_have_the_published_numbers_of_sites(bench: Bench) -> None:
    for kind in ("self", "cross"):
        assert len(list_sites(bench.pipe.backbone.network, kind)) == (70 if bench.pipe.backbone.family == "sdxl" else 16)


@pinned_or_not(EVERY)
def test_a_second_edit_is_bitwise_the_first(bench: Bench, inversion: str, controller: str, pinned: bool) -> None:
    first = bench.first(inversion, controller, pinned).targets
    assert first.shape == (1, 4, SIDE, SIDE)
    assert first.dtype == torch.float32
    before = dict(bench.pipe.backbone.network.attn_processors)
    second = bench.edited(bench.inverted(inversion), controller, pin_source=pinned)
    assert torch.equal(second.targets, first)
    after = bench.pipe.backbone.network.attn_processors
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before), "its own processors are back"


@SOME_PAIRS
def test_saved_and_reloaded_it_edits_bitwise_the_same(bench: Bench, inversion: str, controller: str, tmp_path: Path) -> None:
    """Unpinned, so that all it carries is used."""
    bench.inverted(inversion).save(tmp_path / "a.safetensors")
    again = bench.edited(Trajectory.load(tmp_path / "a.safetensors"), controller, pin_source=False)
    assert torch.equal(again.targets, bench.first(inversion, controller, False).targets)


@pinned_or_not([*SOME, *MORE])
def test_two_prompts_are_two_edits(bench: Bench, inversion: str, controller: str, pinned: bool) -> None:
    """In either order, each as it is alone."""
    alone = bench.first(inversion, controller, pinned).targets
    both = bench.edited(bench.inverted(inversion), controller, [OTHER, TARGET], pin_source=pinned).targets
    assert both.shape == (2, 4, SIDE, SIDE)
    assert (both[1:] - alone).abs().max() < tolerance(inversion)
    assert (both[0] - both[1]).abs().max() > 1e-3, "the prompt matters"


@SOME_PAIRS
def test_guidance_and_control_matter(bench: Bench, inversion: str, controller: str) -> None:
    more = bench.edited(bench.inverted(inversion), controller, guidance_scale=6).targets
    first = bench.first(inversion, controller, True).targets
    assert (more - first).abs().max() > 1e-3
    if controller != "none":
        assert (bench.first(inversion, "none", True).targets - first).abs().max() > 1e-3


@SOME_PAIRS
def test_the_unpinned_source_branch_is_the_reconstruction(bench: Bench, inversion: str, controller: str) -> None:
    """What runs beside it changes nothing about it."""
    alone, _ = bench.pipe.reconstruct(bench.inverted(inversion))
    source = bench.first(inversion, controller, False).source
    assert (source[-1] - alone).abs().max() < tolerance(inversion)


@SOME_PAIRS
def test_the_network_is_called_as_often_as_the_sampler_steps(bench: Bench, inversion: str, controller: str) -> None:
    """Twice a level where a pair steps in turn; the source's row is saved where nobody reads it."""
    steps = sampler_of(bench.inverted(inversion)).start or steps_of(inversion)
    calls = steps * (2 if inversion == "edict" else 1)
    pinned, free = (bench.first(inversion, controller, p) for p in (True, False))
    assert len(pinned.source) == len(free.source) == steps
    assert pinned.cost.calls == free.cost.calls == calls
    assert pinned.cost.evaluations == 2 * calls if controller == "none" else pinned.cost.evaluations > 2 * calls
    assert free.cost.evaluations > 2 * calls
