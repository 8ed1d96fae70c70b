"""Scenes are decided by their seed; captions say exactly what they are asked to."""

from __future__ import annotations

import random

import pytest

from easyinv_edit.tabletop.captions import EMPTY_SHARE, NAMED_SHARE, caption, training_caption, vocabulary
from easyinv_edit.tabletop.scene import LOOKALIKES, TEXTURES, WORDS, Scene, random_scene, replace

STRIPED = Scene("ball", "striped", "red", "white", "mint", "large", "tilted")


def test_a_seed_is_a_scene() -> None:
    assert random_scene(7) == random_scene(7) != random_scene(8)


def test_a_seed_keeps_its_scene_across_versions() -> None:
    assert random_scene(0) == Scene(
        "cylinder", "plain", "purple", "black", "sky", "medium", "tilted",
        yaw=-0.17034075036601398, offset=0.04699927917848189, light=-0.2815572730847683,
    )  # fmt: skip
    scene = random_scene(20_000_001)
    assert caption(scene) == "a large tilted orange and black dotted cube on a mint background"


@pytest.mark.parametrize("field", WORDS)
def test_an_unknown_word_is_refused_with_the_allowed_ones(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} is 'fog'; choose one of {', '.join(WORDS[field])}"):
        replace(STRIPED, **{field: "fog"})


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


def test_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown attribute \['smell'\]; choose from shape, texture"):
        caption(STRIPED, ["smell"])


def test_captions_stay_inside_the_vocabulary() -> None:
    rng = random.Random(0)
    said = {word for seed in range(500) for word in training_caption(random_scene(seed), rng).split()}
    assert said <= set(vocabulary())
    assert set(TEXTURES) <= said


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
