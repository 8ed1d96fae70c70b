"""What each row of an edit is conditioned on: the layout, and conditionings and trajectories with every part."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from easyinv_edit.backbones import wrap
from easyinv_edit.conditioning import IMAGE, TEXT, Conditioning, Framing, concatenate
from easyinv_edit.conditions import Conditions, Row, denoiser_of, framing_of, given_parts, prompt_of, rows_of
from easyinv_edit.denoiser import Denoiser, Prompt
from easyinv_edit.errors import InputError, TrajectoryError
from easyinv_edit.images import Fit
from easyinv_edit.trajectory import Trajectory
from tests.helpers import make_schedule
from tests.models import FAMILIES

SCHEDULE = make_schedule(3)
FRAMINGS = [Framing((10, 20), (0, 1), (32, 32)), Framing((30, 40), (2, 0), (32, 32)), None]
SHAPES = {"embeddings": (5, 3), "pooled": (4,), "time_ids": (6,), "image.0": (1, 2), "image.1": (2, 3, 2)}
SHAPES |= {"hints": (2, 3, 4, 4), "hint_scales": (2,), "guidance": ()}
"""Of every part of one row."""
ADDED = [name for name in SHAPES if name != "embeddings"]


# A backbone that says what it was asked


@dataclass
class FakeBackbone:
    """Text is embedded as its length, no prompt as -1; a framing as its own numbers; without pictures an adapter sees -7."""

    sized: bool = False
    adapters: int = 0
    embeds_guidance: bool = False
    family: str = "fake"
    asked: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network, self.device = nn.Identity(), torch.device("cpu")

    def embed(self, prompts: Sequence[Prompt | None], framings: Sequence[Framing | None] | None = None) -> Conditioning:
        self.asked.append((list(prompts), None if framings is None else list(framings)))
        numbers = [-1 if p is None else len(p) if isinstance(p, str) else float(p.embeddings[0, 0, 0]) for p in prompts]
        rows = torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1, 1)
        blank = {f"{IMAGE}{i}": torch.full((len(prompts), 1, 2), -7.0) for i in range(self.adapters)}
        if not self.sized:
            return Conditioning(rows).having(blank)
        framed = [f or Framing((0, 0), (0, 0), (0, 0)) for f in framings or [None] * len(prompts)]
        told = torch.tensor([[*f.original, *f.crop, *f.target] for f in framed], dtype=torch.float32)
        return Conditioning(rows, rows[:, 0], told).having(blank)

    def guests(self, size: tuple[int, int], **given: Any) -> dict[str, Tensor]:
        self.asked.append((size, given))
        return {} if given["control_image"] is None else {"hints": torch.ones(1, 1, 3, *size)}


def laid_out(backbone: Any, rows: Sequence[Row], guidance: Sequence[float], negative: Any = None) -> Denoiser:
    return denoiser_of(backbone, rows, guidance, negative, SCHEDULE)


def numbers(conditioning: Conditioning | None) -> list[float]:
    assert conditioning is not None
    return conditioning.embeddings.flatten().tolist()


def part(conditioning: Conditioning | None, name: str) -> Tensor:
    assert conditioning is not None
    return conditioning.parts()[name]


# Rows of a denoiser


@pytest.mark.parametrize("negative", [None, "", "no", Conditioning(torch.full((1, 1, 1), 9.0))])
def test_rows_are_the_prompts_in_order_and_each_moves_away_from_the_negative_one(negative: Any) -> None:
    backbone = FakeBackbone()
    denoiser = laid_out(backbone, [Row("a"), Row("bb"), Row("ccc")], (1, 7.5, 3), negative)
    expected = -1 if negative is None else 9 if isinstance(negative, Conditioning) else len(negative)
    assert numbers(denoiser.conditioning) == [1, 2, 3]
    assert numbers(denoiser.negative) == [expected] * 3
    assert denoiser.guidance == (1.0, 7.5, 3.0)
    assert denoiser.has_twin == (False, True, True)
    assert (denoiser.backbone, denoiser.schedule) == (backbone, SCHEDULE)
    assert len(backbone.asked) == 1, "all prompts are encoded at once"
    assert [p if isinstance(p, str) else type(p) for p in backbone.asked[0][0][:3]] == ["a", "bb", "ccc"]


def test_embeddings_stand_for_a_prompt_at_their_place() -> None:
    given = Conditioning(torch.full((1, 1, 1), 42.0))
    assert numbers(laid_out(FakeBackbone(), [Row("a"), Row(given), Row("ccc")], (1, 1, 1)).conditioning) == [1, 42, 3]


def test_a_negative_row_is_told_the_size_of_its_own_row() -> None:
    backbone = FakeBackbone(sized=True)
    denoiser = laid_out(backbone, [Row("a", FRAMINGS[0]), Row("b", FRAMINGS[1]), Row("c", FRAMINGS[2])], (2, 2, 2), "no")
    assert backbone.asked[0][1][:3] == FRAMINGS
    assert part(denoiser.conditioning, "time_ids").tolist() == [
        [10, 20, 0, 1, 32, 32],
        [30, 40, 2, 0, 32, 32],
        [0, 0, 0, 0, 0, 0],
    ]
    assert torch.equal(part(denoiser.negative, "time_ids"), part(denoiser.conditioning, "time_ids"))
    assert part(denoiser.negative, "pooled").tolist() == [[2]] * 3


@pytest.mark.parametrize(("given", "used"), [((0, 0.5, 1, 1.5), (1, 1, 1, 1.5)), ((7.5,), (7.5,))])
def test_a_scale_of_one_or_less_is_no_guidance(given: tuple[float, ...], used: tuple[float, ...]) -> None:
    denoiser = laid_out(FakeBackbone(), [Row("a")] * len(given), given)
    assert denoiser.guidance == used
    assert denoiser.has_twin == tuple(scale > 1 for scale in given)
    assert denoiser.conditioning.guidance is None


@pytest.mark.parametrize("distilled", [True, False])
def test_a_negative_scale_is_refused_before_anything_is_encoded(distilled: bool) -> None:
    backbone = FakeBackbone(embeds_guidance=distilled)
    with pytest.raises(InputError, match=r"^guidance scale -0\.5 is negative; 1 turns guidance off, 7\.5 is usual$"):
        laid_out(backbone, [Row("a")] * 3, (1, -0.5, 2))
    assert backbone.asked == []


def test_a_distilled_model_is_told_the_scales_and_has_no_twins() -> None:
    denoiser = laid_out(FakeBackbone(embeds_guidance=True), [Row("a")] * 4, (0, 1, 2.5, 8))
    assert denoiser.guidance == (1.0,) * 4
    assert denoiser.has_twin == (False,) * 4
    for half in (denoiser.conditioning, denoiser.negative):
        assert part(half, "guidance").tolist() == [1, 1, 2.5, 8]


def hint(value: float, scale: float) -> dict[str, Tensor]:
    return {"hints": torch.full((1, 1, 3, 2, 2), value), "hint_scales": torch.tensor([[scale]])}


def test_hints_are_their_rows_own_in_both_halves_and_the_others_have_scale_0() -> None:
    rows = [Row("a"), Row("b", given=hint(0.25, 0.5)), Row("c"), Row("d", given=hint(1.0, 2.0))]
    denoiser = laid_out(FakeBackbone(), rows, (1, 2, 2, 2))
    for half in (denoiser.conditioning, denoiser.negative):
        assert part(half, "hint_scales").tolist() == [[0], [0.5], [0], [2]]
        assert part(half, "hints").mean((1, 2, 3, 4)).tolist() == [0, 0.25, 0, 1]


def test_pictures_are_their_rows_own_and_no_negatives() -> None:
    """A row without one keeps what the adapter sees for no picture."""
    given = [{"image.1": torch.full((1, 1, 2), 5.0)}, {}, {"image.0": torch.full((1, 1, 2), 6.0)}]
    rows = [Row("a", given=own) for own in given]
    denoiser = laid_out(FakeBackbone(adapters=2), rows, (2, 2, 2))
    assert [image.mean((1, 2)).tolist() for image in denoiser.conditioning.images] == [[-7, -7, 6], [5, -7, -7]]
    assert denoiser.negative is not None
    assert [image.mean((1, 2)).tolist() for image in denoiser.negative.images] == [[-7] * 3] * 2


def test_the_text_of_a_row_comes_from_its_prompt_alone() -> None:
    """A trajectory keeps its embeddings among what was given; they are the prompt already."""
    given = {"embeddings": torch.full((1, 1, 1), 3.0), "pooled": torch.full((1, 1), 4.0)}
    denoiser = laid_out(FakeBackbone(), [Row("a", given=given), Row("bb")], (1, 1))
    assert denoiser.conditioning.parts().keys() == {"embeddings"}
    assert numbers(denoiser.conditioning) == [1, 2]


def test_hints_of_another_dtype_follow_the_first() -> None:
    rows = [Row("a", given=hint(0.5, 1.0)), Row("b", given={name: p.double() for name, p in hint(0.25, 2.0).items()})]
    denoiser = laid_out(FakeBackbone(), rows, (1, 1))
    assert part(denoiser.conditioning, "hints").dtype == torch.float32
    assert part(denoiser.conditioning, "hint_scales").tolist() == [[1], [2]]


def test_one_call_of_the_network_sees_the_rows_where_the_denoiser_says() -> None:
    """Singles first, then twins, then their partners: every part of the conditioning in that order."""
    seen: list[Conditioning] = []

    class Predicting(FakeBackbone):
        def predict(self, z: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
            seen.append(conditioning)
            return conditioning.embeddings[:, :, :, None].expand(-1, 4, 1, 1).to(z)

    backbone = Predicting(sized=True, adapters=1)
    rows = [Row("a", FRAMINGS[0]), Row("bb", FRAMINGS[1], {"image.0": torch.full((1, 1, 2), 5.0), **hint(0.5, 2.0)})]
    out = laid_out(backbone, rows, (1, 3), "none")(torch.zeros(2, 4, 1, 1), 1)
    assert numbers(seen[0]) == [1, 4, 2]
    assert part(seen[0], "time_ids")[:, 0].tolist() == [10, 30, 30]
    assert part(seen[0], "image.0").mean((1, 2)).tolist() == [-7, -7, 5]
    assert part(seen[0], "hint_scales").tolist() == [[0], [2], [2]]
    assert out[:, 0, 0, 0].tolist() == [1, 4 + 3 * (2 - 4)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rows_of_a_real_family(name: str) -> None:
    backbone = wrap(FAMILIES[name]())
    texts = ["a red cube", "a ball"]
    denoiser = laid_out(backbone, [Row(text, framing) for text, framing in zip(texts, FRAMINGS, strict=False)], (1, 5), "ring")
    assert denoiser.conditioning.equals(backbone.embed(texts, FRAMINGS[:2]))
    assert denoiser.negative is not None
    assert denoiser.negative.equals(backbone.embed(["ring"] * 2, FRAMINGS[:2]))
    if name == "sdxl":
        assert part(denoiser.negative, "time_ids")[1].tolist() == [30, 40, 2, 0, 32, 32]
    else:
        assert denoiser.conditioning.parts().keys() == {"embeddings"}


# What a row is given beside its text


def test_pictures_go_to_the_backbone_under_diffusers_names() -> None:
    backbone = FakeBackbone()
    given = given_parts(backbone, "a", {"ip_adapter_image": "p", "control_image": "c"}, (4, 6))
    assert backbone.asked == [((4, 6), {"ip_adapter_image": "p", "control_image": "c", "scale": 1.0})]
    assert {name: tuple(tensor.shape) for name, tensor in given.items()} == {"hints": (1, 1, 3, 4, 6)}


@pytest.mark.parametrize(("scale", "used"), [(None, 1.0), (0.0, 0.0), (0.7, 0.7), ([0.1, 0.2], [0.1, 0.2])])
def test_the_scale_of_the_hint(scale: Any, used: Any) -> None:
    backbone = FakeBackbone()
    given_parts(backbone, "a", {"control_image": "c", "controlnet_conditioning_scale": scale}, (4, 4))
    assert backbone.asked[0][1]["scale"] == used


def test_of_embeddings_only_the_text_is_kept() -> None:
    """Sizes are the picture's, whatever a Conditioning that was made elsewhere says."""
    whole = random_conditioning(0, 1, ADDED)
    assert given_parts(FakeBackbone(), whole, {}, (4, 4)).keys() == set(TEXT)
    assert given_parts(FakeBackbone(), Conditioning(whole.embeddings), {}, (4, 4)).keys() == {"embeddings"}
    assert given_parts(FakeBackbone(), "a text", {}, (4, 4)) == {}


def test_an_unknown_argument_is_a_type_error_with_the_nearest() -> None:
    wrong: Any = {"ip_adapter_images": "p"}
    with pytest.raises(TypeError) as refusal:
        given_parts(FakeBackbone(), "a", wrong, (4, 4))
    says = "unknown argument 'ip_adapter_images' - did you mean 'ip_adapter_image'?; adapters take ip_adapter_image, control_"
    assert str(refusal.value).startswith(says)


def test_a_scale_without_a_picture_is_refused() -> None:
    lone: Conditions = {"controlnet_conditioning_scale": 0.5}
    with pytest.raises(InputError, match=r"^controlnet_conditioning_scale: there is no control_image; give one, or leave "):
        given_parts(FakeBackbone(), "a", lone, (4, 4))


# Conditionings with every part


def random_conditioning(seed: int, rows: int, added: Sequence[str]) -> Conditioning:
    """Random rows with the parts named."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(rows, *SHAPES[name], generator=generator) for name in ("embeddings", *added)}
    return Conditioning(made["embeddings"]).having(made)


def drawn(seed: int) -> tuple[random.Random, list[str]]:
    """A source of random choices, and some parts; pictures of a second adapter come with those of the first."""
    choose = random.Random(seed)
    names = [name for name in ADDED if choose.random() < 0.5]
    return choose, names if "image.0" in names else [name for name in names if name != "image.1"]


EACH_DRAW = pytest.mark.parametrize("seed", [*range(12), "all"])


def case(seed: Any) -> tuple[random.Random, list[str]]:
    return (random.Random(0), ADDED) if seed == "all" else drawn(seed)


def stacked(conditioning: Conditioning, name: str) -> list[Tensor]:
    return list(conditioning.parts()[name])


@EACH_DRAW
def test_parts_are_all_that_is_there(seed: Any) -> None:
    _, names = case(seed)
    made = random_conditioning(1, 3, names)
    assert made.parts().keys() == {"embeddings", *names}
    assert made.rows == 3
    assert len(made.images) == sum(name.startswith(IMAGE) for name in names)
    assert made.having({}).equals(made)
    assert Conditioning(made.embeddings).having(made.parts()).equals(made)


@EACH_DRAW
def test_selecting_is_indexing_and_composes(seed: Any) -> None:
    choose, names = case(seed)
    made = random_conditioning(2, 4, names)
    first = choose.choices(range(4), k=5)
    second = choose.choices(range(5), k=choose.randint(1, 6))
    chosen = made.select(first)
    for name in made.parts():
        expected = [stacked(made, name)[row] for row in first]
        assert all(map(torch.equal, stacked(chosen, name), expected))
    assert chosen.select(second).equals(made.select([first[row] for row in second]))
    assert made.select(range(4)).equals(made)


@EACH_DRAW
def test_concatenating_is_associative_and_selecting_takes_it_apart(seed: Any) -> None:
    choose, names = case(seed)
    parts = [random_conditioning(i, choose.randint(1, 3), names) for i in range(3)]
    whole = concatenate(parts)
    assert whole.rows == sum(part.rows for part in parts)
    assert whole.equals(concatenate([concatenate(parts[:2]), parts[2]]))
    start = 0
    for one in parts:
        assert whole.select(range(start, start + one.rows)).equals(one)
        start += one.rows


@EACH_DRAW
def test_having_replaces_what_is_named_and_leaves_the_rest(seed: Any) -> None:
    _, names = case(seed)
    made, other = random_conditioning(3, 2, names), random_conditioning(4, 2, ADDED)
    for name, tensor in other.parts().items():
        if name == "image.1" and "image.0" not in names:
            continue
        changed = made.having({name: tensor})
        assert torch.equal(changed.parts()[name], tensor)
        assert changed.parts().keys() == {*made.parts(), name}
        assert all(torch.equal(p, changed.parts()[n]) for n, p in made.parts().items() if n != name)


@EACH_DRAW
def test_a_blend_moves_the_text_alone(seed: Any) -> None:
    choose, names = case(seed)
    mine, theirs = random_conditioning(5, 2, names), random_conditioning(6, 2, names)
    text = {name: theirs.parts()[name] for name in TEXT if name in theirs.parts()}
    assert mine.toward(theirs, 0).equals(mine)
    assert mine.toward(theirs, 1).equals(mine.having(text))
    share = choose.uniform(0.1, 0.9)
    blended = mine.toward(theirs, share).parts()
    assert blended.keys() == mine.parts().keys()
    for name, own in mine.parts().items():
        if name in TEXT:
            assert torch.allclose(blended[name], (1 - share) * own + share * theirs.parts()[name], atol=1e-6)
        else:
            assert torch.equal(blended[name], own)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_sees_every_part(name: str) -> None:
    made = random_conditioning(7, 2, ADDED)
    assert made.equals(random_conditioning(7, 2, ADDED))
    changed = made.parts()[name].clone()
    changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9.0))
    assert not made.equals(made.having({name: changed}))
    if name in ADDED and name != "image.0":
        fewer = random_conditioning(7, 2, [other for other in ADDED if other != name])
        assert not made.equals(fewer)
        assert not fewer.equals(made)


@EACH_DRAW
def test_it_goes_to_another_dtype_whole(seed: Any) -> None:
    _, names = case(seed)
    made = random_conditioning(8, 2, names)
    moved = made.to(torch.device("cpu"), torch.float64)
    assert {tensor.dtype for tensor in moved.parts().values()} == {torch.float64}
    assert moved.to(torch.device("cpu"), torch.float32).equals(made)


@pytest.mark.parametrize("name", ADDED)
def test_what_has_a_part_and_what_lacks_it_do_not_go_together(name: str) -> None:
    bare = random_conditioning(0, 1, [])
    with pytest.raises(InputError, match="must come from the same model family"):
        concatenate([bare, bare.having({name: torch.zeros(1, *SHAPES[name])})])


def test_more_than_ten_adapters_keep_their_order() -> None:
    images = {f"{IMAGE}{i}": torch.full((1, 1), float(i)) for i in range(12)}
    made = Conditioning(torch.zeros(1, 1, 1)).having(images)
    assert [int(image) for image in made.images] == list(range(12))
    assert made.select([0, 0]).parts().keys() == {"embeddings", *images}


# Trajectories that keep what their source was given


def trajectory(given: dict[str, Tensor], rows: int = 1) -> Trajectory:
    latents = torch.randn(4, rows, 4, 2, 2, generator=torch.Generator().manual_seed(rows))
    fit = Fit("crop", (200, 100), (32, 32), (50, 0, 150, 100)).as_dict()
    return Trajectory(latents, SCHEDULE, "ddim", prompt="a cube", fit=fit, given=given)


GIVEN = random_conditioning(9, 2, ["pooled", "image.0", "image.1", "hints", "hint_scales"]).parts()
EACH_PART = pytest.mark.parametrize("name", GIVEN)


def test_what_was_given_is_saved_bit_for_bit(tmp_path: Path) -> None:
    mixed = {**GIVEN, "hints": GIVEN["hints"].half(), "image.0": GIVEN["image.0"].transpose(1, 2)}
    trajectory(mixed, 2).save(tmp_path / "a.safetensors")
    again = Trajectory.load(tmp_path / "a.safetensors")
    assert again.given.keys() == mixed.keys()
    assert all(
        again.given[name].dtype == tensor.dtype and torch.equal(again.given[name], tensor) for name, tensor in mixed.items()
    )
    assert dict(again.extras) == {}


def test_what_was_given_and_what_a_method_keeps_are_told_apart(tmp_path: Path) -> None:
    made = replace(trajectory({"hints": torch.zeros(1, 2)}), extras={"hints": torch.ones(3, 1), "given.x": torch.ones(1)})
    made.save(tmp_path / "a.safetensors")
    again = Trajectory.load(tmp_path / "a.safetensors")
    assert (again.given.keys(), again.extras.keys()) == ({"hints"}, {"hints", "given.x"})
    assert torch.equal(again.given["hints"], torch.zeros(1, 2))


def test_nothing_given_is_nothing_saved(tmp_path: Path) -> None:
    trajectory({}).save(tmp_path / "a.safetensors")
    assert dict(Trajectory.load(tmp_path / "a.safetensors").given) == {}


@EACH_PART
def test_rows_keep_their_own(name: str) -> None:
    for number, row in enumerate(trajectory(GIVEN, 2).rows()):
        assert torch.equal(row.given[name], GIVEN[name][number : number + 1])
        assert row.given.keys() == GIVEN.keys()


@EACH_PART
def test_joined_trajectories_have_what_each_was_given(name: str) -> None:
    rows = trajectory(GIVEN, 2).rows()
    joined = Trajectory.join(rows)
    assert joined.latents.shape[1] == 2
    for again, row in zip(joined.rows(), rows, strict=True):
        assert torch.equal(again.given[name], row.given[name])


def test_what_was_given_does_not_keep_trajectories_apart() -> None:
    """A style picture may have been shown something else, or nothing; a batch has what all of them have."""
    given, bare = trajectory({"hints": torch.zeros(1, 2)}), trajectory({})
    assert Trajectory.join([given, given]).given.keys() == {"hints"}
    assert Trajectory.join([given, bare]).given == Trajectory.join([bare, given]).given == {}
    with pytest.raises(TrajectoryError, match="they are no batch"):
        Trajectory.join([bare, replace(bare, method="easyinv")])


def test_the_rows_of_a_trajectory_are_what_it_was_inverted_with(tmp_path: Path) -> None:
    made = trajectory(GIVEN, 2)
    made.save(tmp_path / "a.safetensors")
    for source in (made, Trajectory.load(tmp_path / "a.safetensors")):
        rows = rows_of(source)
        assert len(rows) == 2
        for number, row in enumerate(rows):
            assert isinstance(row.prompt, Conditioning)
            assert row.prompt.equals(Conditioning(GIVEN["embeddings"], GIVEN["pooled"]).select([number]))
            assert row.framing == Framing((100, 200), (0, 16), (32, 32))
            assert all(torch.equal(row.given[name], GIVEN[name][number : number + 1]) for name in GIVEN)


def test_a_text_is_its_own_prompt_and_no_fit_is_no_framing() -> None:
    bare = replace(trajectory({"hints": torch.zeros(1, 2)}), fit=None)
    assert prompt_of("a cube", bare.given) == rows_of(bare)[0].prompt == "a cube"
    assert framing_of(bare) is rows_of(bare)[0].framing is None
    lone = prompt_of("", {"embeddings": torch.zeros(1, 2, 3)})
    assert isinstance(lone, Conditioning)
    assert lone.pooled is None
