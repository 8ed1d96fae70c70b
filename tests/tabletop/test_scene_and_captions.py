"""Scenes are decided by their seed; captions say exactly what they are asked to."""

from __future__ import annotations

import random

import pytest

from easyinv_edit.tabletop import networks
from easyinv_edit.tabletop.captions import EMPTY_SHARE, NAMED_SHARE, caption, training_caption, vocabulary
from easyinv_edit.tabletop.scene import (
    BESIDE,
    LOOKALIKES,
    PAIR_SHARE,
    PLACE_WEIGHTS,
    PLACES,
    SHAPES,
    WORDS,
    YAWS,
    Scene,
    Solid,
    early_scene,
    middle,
    random_scene,
    random_table,
    replace,
)

STRIPED = Scene(shape="ball", texture="striped", colour="red", second="white", background="mint", size="large", pose="tilted")


def test_a_seed_is_a_scene() -> None:
    assert random_scene(7) == random_scene(7) != random_scene(8)


def test_a_seed_keeps_its_scene_across_versions() -> None:
    assert early_scene(0) == Scene(
        shape="cylinder", texture="plain", colour="purple", second="black", background="sky", size="medium", pose="tilted",
        yaw=-0.17034075036601398, offset=0.04699927917848189, light=-0.2815572730847683,
    )  # fmt: skip
    scene = random_scene(0)
    assert scene == replace(early_scene(0), yaw=0.33580493746949885, offset=scene.offset)
    scene = random_scene(20_000_001)
    assert caption(scene) == "a large tilted orange and black dotted cube on a mint background"


@pytest.mark.parametrize("field", WORDS)
def test_an_unknown_word_is_refused_with_the_allowed_ones(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} is 'fog'; choose one of {', '.join(WORDS[field])}"):
        replace(STRIPED, **{field: "fog"})


def test_a_seed_keeps_its_wider_scene_across_versions() -> None:
    assert caption(random_table(0)) == "a tilted purple plain cylinder and a tilted yellow plain cone on a white background"
    assert caption(random_table(2)) == "a small tilted red plain ball on the right on a white background"


def test_solids_turn_as_little_as_the_range_says() -> None:
    for make, (least, most) in ((random_scene, YAWS), (random_table, YAWS), (early_scene, (-0.6, 0.6))):
        turns = [solid.yaw for seed in range(300) for solid in make(seed).solids]
        assert least <= min(turns) < least + 0.05 * (most - least)
        assert most >= max(turns) > most - 0.05 * (most - least)


def test_what_stands_in_the_wider_world_fits_into_the_picture() -> None:
    scenes = [random_table(seed) for seed in range(2000)]
    pairs = [scene for scene in scenes if scene.beside]
    assert abs(len(pairs) / 2000 - PAIR_SHARE) < 4 * (0.25 / 2000) ** 0.5
    assert {(scene.size, scene.place) for scene in scenes if not scene.beside} == {
        (size, place) for size, weights in PLACE_WEIGHTS.items() for place, w in zip(PLACES, weights, strict=True) if w
    }
    assert all(
        {solid.size for solid in scene.solids} == {"small"} and scene.offset < 0 < scene.beside.offset for scene in pairs
    )


def test_a_solid_alone_stands_in_the_middle_whatever_its_shape() -> None:
    scenes = [random_scene(seed) for seed in range(300)]
    assert {scene.shape for scene in scenes} == {*SHAPES}
    assert max(abs(middle(scene)) for scene in scenes) < 1e-6
    assert max(abs(middle(early_scene(seed))) for seed in range(300)) > 0.2, "a tilted cone's outline is not about its body"


def test_two_in_five_backgrounds_are_white() -> None:
    white = sum(random_scene(seed).background == "white" for seed in range(2000))
    assert abs(white / 2000 - 0.40) < 4 * (0.4 * 0.6 / 2000) ** 0.5


def test_no_object_wears_two_colours_that_look_alike() -> None:
    pairs = [frozenset((s.colour, s.second)) for s in map(random_scene, range(2000))]
    assert all(len(pair) == 2 and pair not in LOOKALIKES for pair in pairs)


def test_every_word_of_every_attribute_turns_up() -> None:
    scenes = [random_scene(seed) for seed in range(2000)]
    assert all({getattr(scene, field) for scene in scenes} == set(words) for field, words in WORDS.items())


@pytest.mark.parametrize(
    ("unnamed", "text"),
    [
        ((), "a large tilted red and white striped ball on a mint background"),
        (("texture",), "a large tilted red and white ball on a mint background"),
        (("colour",), "a large tilted striped ball on a mint background"),
        (("second",), "a large tilted red striped ball on a mint background"),
        (("size", "pose", "background"), "a red and white striped ball"),
        (("shape",), "a large tilted red and white striped object on a mint background"),
        (tuple(WORDS), "a object"),
    ],
)
def test_a_caption_leaves_out_what_it_is_told_to(unnamed: tuple[str, ...], text: str) -> None:
    assert caption(STRIPED, unnamed) == text


def test_a_plain_object_has_no_second_colour_to_name() -> None:
    assert caption(replace(STRIPED, texture="plain")) == "a large tilted red plain ball on a mint background"


PAIR = replace(STRIPED, size="small", offset=-BESIDE, beside=Solid(shape="cube", colour="blue", size="small", offset=BESIDE))


def test_two_solids_are_named_from_left_to_right_and_each_leaves_out_its_own() -> None:
    assert caption(PAIR) == "a tilted red and white striped ball and a upright blue plain cube on a mint background"
    unnamed = ("pose", "texture", "colour", "background")
    assert caption(PAIR, unnamed) == "a ball and a cube"
    assert caption(PAIR, unnamed, ()) == "a ball and a upright blue plain cube"


@pytest.mark.parametrize(("place", "said"), [("left", " on the left"), ("middle", ""), ("right", " on the right")])
def test_a_solid_alone_is_said_to_stand_at_a_side(place: str, said: str) -> None:
    unnamed = ("pose", "texture", "colour", "background")
    scene = replace(STRIPED, size="small", place=place)
    assert caption(scene, unnamed) == f"a small ball{said}"
    assert caption(scene, (*unnamed, "place")) == "a small ball"


def test_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown attribute \['smell'\]; choose from size, pose"):
        caption(STRIPED, ["smell"])


def test_captions_use_the_whole_vocabulary_and_nothing_else() -> None:
    rng = random.Random(0)
    said = {word for seed in range(1000) for word in training_caption(random_table(seed), rng).split()}
    assert said == set(vocabulary())


def test_no_caption_is_cut_off() -> None:
    tokenizer = networks.build_tokenizer()
    longest = max(len(tokenizer(caption(random_table(seed))).input_ids) for seed in range(500))
    assert 21 <= longest <= networks.TOKENS


def test_a_tenth_of_training_captions_is_empty() -> None:
    rng, count = random.Random(2), 4000
    share = sum(training_caption(STRIPED, rng) == "" for _ in range(count)) / count
    assert abs(share - EMPTY_SHARE) < 4 * (EMPTY_SHARE * (1 - EMPTY_SHARE) / count) ** 0.5


@pytest.mark.parametrize("field", ["texture", "background", "size"])
def test_training_captions_name_an_attribute_as_often_as_they_say(field: str) -> None:
    rng, count = random.Random(1), 4000
    word = getattr(STRIPED, field)
    share = sum(word in training_caption(STRIPED, rng).split() for _ in range(count)) / count
    expected = (1 - EMPTY_SHARE) * NAMED_SHARE[field]
    assert abs(share - expected) < 4 * (0.25 / count) ** 0.5
