"""Words and where their tokens stand: looked up in a prompt, and found in one by a Stable Diffusion tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attention_control import ControlError, Words
from attention_control.words import normal
from easyinv_edit.backbones.sd import StableDiffusion
from easyinv_edit.errors import EasyInvWarning
from easyinv_edit.pipeline import EditPipeline
from easyinv_edit.rows import words_of

PROMPT = Words(
    ("A", "red", "Cube", ",", "a", "zebra's", "tail", "and", "a", "blue", "cube"),
    ((1,), (2,), (3, 4), (5,), (6,), (7, 8), (9,), (10,), (11,), (12,), ()),
    14,
)
LISTED = "'A', 'red', 'Cube', ',', 'a', \"zebra's\", 'tail', 'and', 'a', 'blue', 'cube'"


# --- looking up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrase", "places", "tokens"),
    [
        ("red", [1], [2]),
        ("RED", [1], [2]),
        (" red\n", [1], [2]),
        ("cube", [2], [3, 4]),
        ("cube,", [2], [3, 4]),
        ('"Cube"!', [2], [3, 4]),
        ("red cube", [1, 2], [2, 3, 4]),
        ("  Red   CUBE. ", [1, 2], [2, 3, 4]),
        ("a red", [0, 1], [1, 2]),
        ("a", [0], [1]),
        ("a blue", [8, 9], [11, 12]),
        ("zebra's tail", [5, 6], [7, 8, 9]),
        ("\uff32\uff25\uff24", [1], [2]),
    ],
)
def test_a_phrase_is_found_whatever_its_case_and_punctuation(phrase: str, places: list[int], tokens: list[int]) -> None:
    assert PROMPT.places(phrase) == places
    assert PROMPT.find(phrase) == tokens


@pytest.mark.parametrize(
    "phrase", ["cat", "zebra", "cub", "red blue", "cube red", "red a", "tail and a blue cube cube", "", " "]
)
def test_a_phrase_that_is_not_there_is_an_error_that_lists_the_words(phrase: str) -> None:
    for look in (PROMPT.places, PROMPT.find):
        with pytest.raises(ControlError) as refusal:
            look(phrase)
        assert str(refusal.value) == f"the word {phrase!r} is not in its prompt; its words are {LISTED}"


def test_an_empty_prompt_has_no_words_and_says_so() -> None:
    empty = Words((), (), 7)
    with pytest.raises(ControlError, match="'cat' is not in its prompt; its words are none, the prompt is empty"):
        empty.find("cat")
    assert (empty.keys, empty.end) == ((), 1)


def test_a_word_that_was_cut_off_is_an_error_that_says_how_much_is_read() -> None:
    assert PROMPT.places("blue cube") == [9, 10]
    with pytest.raises(ControlError, match="'blue cube' was cut off: the text encoder reads only 14 tokens; shorten"):
        PROMPT.find("blue cube")


def test_the_end_is_after_the_last_token() -> None:
    assert PROMPT.end == 13
    assert Words(("a", "cube"), ((1,), (2, 3)), 7).end == 4


def test_keys_are_the_words_without_case_and_punctuation() -> None:
    assert PROMPT.keys == ("a", "red", "cube", ",", "a", "zebra's", "tail", "and", "a", "blue", "cube")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("Cat", "cat"),
        ("cat,", "cat"),
        ("(cat)", "cat"),
        ("“Cat”…", "cat"),
        ("zebra's", "zebra's"),
        ("well-known", "well-known"),
        ("-known-", "known"),
        ("Straße", "strasse"),
        ("ﬁsh", "fish"),
        ("e\u0301te\u0301", "été"),
        ("3.5", "3.5"),
        ("_a_", "a"),
        (",", ","),
        ("", ""),
    ],
)
def test_normal_takes_case_and_surrounding_punctuation_away(word: str, expected: str) -> None:
    assert normal(word) == expected
    assert normal(expected) == expected


# --- in a prompt, by its tokenizer ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(untrained_folder: Path) -> StableDiffusion:
    """That of the fixture `untrained`, loaded once: nothing here changes it."""
    backbone = EditPipeline.from_pretrained(untrained_folder, local_files_only=True).backbone
    assert isinstance(backbone, StableDiffusion)
    return backbone


def _words(backbone: StableDiffusion, prompt: str) -> Words:
    (words,) = words_of(backbone, [prompt])
    return words


def _ids(backbone: StableDiffusion, text: str, **settings: bool) -> list[int]:
    return list(backbone.pipe.tokenizer(text, verbose=False, **settings)["input_ids"])


PLAIN = "a large red cube on a mint background"
LONG = "a zebra and a gnu"
MARKED = "A red, (striped) cube: blue!"


@pytest.mark.parametrize("prompt", [PLAIN, LONG, MARKED, "  a \t red\ncube ", "naïve café", "日本 cube", "well-known zebra's"])
def test_every_words_positions_hold_its_own_tokens(backbone: StableDiffusion, prompt: str) -> None:
    ids = _ids(backbone, prompt)
    words = _words(backbone, prompt)
    assert words.words
    for word, places in zip(words.words, words.tokens, strict=True):
        assert [ids[place] for place in places] == _ids(backbone, word, add_special_tokens=False)
    assert [place for places in words.tokens for place in places] == list(range(1, len(ids) - 1)), "each token is one word's"
    assert words.end == len(ids) - 1


def test_one_token_a_word_stands_after_the_start_mark(backbone: StableDiffusion) -> None:
    pairs, length = backbone.words(PLAIN)
    assert pairs == [(word, (1 + i,)) for i, word in enumerate(PLAIN.split())]
    assert length == backbone.embed([PLAIN]).embeddings.shape[1]


def test_a_word_of_several_tokens_has_all_their_positions(backbone: StableDiffusion) -> None:
    pairs, _ = backbone.words(LONG)
    assert pairs[:3] == [("a", (1,)), ("zebra", (2, 3, 4, 5, 6)), ("and", (7,))]


def test_punctuation_marks_are_words_of_their_own(backbone: StableDiffusion) -> None:
    pairs, _ = backbone.words(MARKED)
    assert [word for word, _ in pairs] == ["A", "red", ",", "(", "striped", ")", "cube", ":", "blue", "!"]
    assert _words(backbone, MARKED).find("CUBE") == [7]


def test_the_first_of_two_equal_words_is_found(backbone: StableDiffusion) -> None:
    assert _words(backbone, "a cube and a red cube").find("cube") == [2]
    assert _words(backbone, "a cube and a red cube").find("red cube") == [5, 6]


def test_an_empty_prompt_has_no_words(backbone: StableDiffusion) -> None:
    assert backbone.words("") == ([], backbone.pipe.tokenizer.model_max_length)


def test_a_prompt_that_just_fits_is_read_whole(backbone: StableDiffusion) -> None:
    words = _words(backbone, " ".join(["red"] * 22))
    assert words.tokens == tuple((1 + i,) for i in range(22))


@pytest.mark.parametrize(
    ("prompt", "dropped"),
    [
        (" ".join(["red"] * 22 + ["cube", "ball"]), "cube ball"),
        (" ".join(["red"] * 20 + ["zebra", "ball"]), "zebra ball"),
        (" ".join(["red"] * 21 + ["cube,", "ball"]), "cube, ball"),
    ],
    ids=["two words too many", "one in the middle of a word", "one before a comma"],
)
def test_words_that_do_not_fit_have_no_positions_and_are_those_the_encoder_drops(
    backbone: StableDiffusion, prompt: str, dropped: str
) -> None:
    words = _words(backbone, prompt)
    cut = [word for word, tokens in zip(words.words, words.tokens, strict=True) if not tokens]
    assert " ".join(cut).replace(" ,", ",") == dropped
    read = prompt.removesuffix(dropped).strip()
    ids = _ids(backbone, read)
    assert [place for places in words.tokens for place in places] == list(range(1, len(ids) - 1))
    with pytest.warns(EasyInvWarning, match=f"these words are dropped: '{dropped}'"):
        embedded = backbone.embed([prompt]).embeddings
    assert torch.equal(embedded, backbone.embed([read]).embeddings)
    with pytest.raises(ControlError, match=f"'ball' was cut off: the text encoder reads only {words.length} tokens"):
        words.find("ball")


@pytest.mark.parametrize("phrase", ["red, striped", "zebra's", "and/or", "3.5", "cube."])
def test_a_phrase_is_found_as_it_stands_in_its_prompt(backbone: StableDiffusion, phrase: str) -> None:
    prompt = "a red, striped zebra's and/or 3.5 cube."
    ids = _ids(backbone, prompt)
    found = [ids[place] for place in _words(backbone, prompt).find(phrase)]
    assert [i for i in _ids(backbone, phrase, add_special_tokens=False) if i in found] == found
    assert len(found) >= len(phrase.replace(",", "").split())


@pytest.mark.parametrize("prompt", ["un e\u0301te\u0301 red", "un \u00e9t\u00e9 red"], ids=["decomposed", "composed"])
def test_an_accent_does_not_split_a_word_however_it_was_typed(backbone: StableDiffusion, prompt: str) -> None:
    words = _words(backbone, prompt)
    assert len(words.words) == 3
    assert words.find("été") == words.find("e\u0301te\u0301") == list(range(words.find("un")[-1] + 1, words.find("red")[0]))


def test_an_emoji_is_a_word_that_can_be_named(backbone: StableDiffusion) -> None:
    words = _words(backbone, "a red 😀 and a 🐱")
    assert words.find("🐱") == list(words.tokens[-1])
    assert words.find("😀") == list(words.tokens[2])
