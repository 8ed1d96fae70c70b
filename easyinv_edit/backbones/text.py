"""Prompts as a CLIP text encoder reads them: how much of one fits, and which tokens are which word's."""

from __future__ import annotations

import re
import unicodedata
import warnings
from typing import Any

from easyinv_edit.errors import EasyInvWarning

WordTokens = tuple[list[tuple[str, tuple[int, ...]]], int]
"""The words of a prompt with the positions of their tokens, and how many positions there are."""


def fitting(pipe: Any, prompt: str) -> str:
    """The prompt as far as the text encoder reads; warns of the words that do not fit."""
    kept = _cut(pipe, prompt)
    if kept != prompt:
        tokens, room = len(_offsets(pipe, _read(pipe, prompt))), _room(pipe)
        warnings.warn(
            f"the prompt has {tokens} tokens and the model reads {room}; these words are dropped: "
            f"{prompt[len(kept) :].strip()!r}",
            EasyInvWarning,
            stacklevel=3,
        )
    return kept


def words(pipe: Any, prompt: str) -> WordTokens:
    """The words of a prompt and their places in the text embeddings; a word that does not fit has none.

    Punctuation marks are words of their own; a textual inversion is one word, whatever signs its name has, and all its vectors
    are that word's.
    """
    kept = len(_read(pipe, _cut(pipe, prompt)))
    prompt = _read(pipe, prompt)
    offsets, learned = _offsets(pipe, prompt), _learned(pipe, prompt)
    pairs = []
    for start, end in sorted([*learned, *_between(prompt, sorted(learned))]):
        places = tuple(1 + i for i, (a, b) in enumerate(offsets) if a < end and b > start and end <= kept)
        pairs.append((learned.get((start, end), prompt[start:end]), places))
    return pairs, pipe.tokenizer.model_max_length


def _learned(pipe: Any, text: str) -> dict[tuple[int, int], str]:
    """Where textual inversions begin and end in what is read, and their names; further vectors are name_1, name_2, ..."""
    known = set(pipe.tokenizer.get_added_vocab()) - set(pipe.tokenizer.all_special_tokens)
    read = pipe.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found: list[tuple[int, int, str]] = []
    following = ""
    for token, (a, b) in zip(pipe.tokenizer.convert_ids_to_tokens(read["input_ids"]), read["offset_mapping"], strict=True):
        if token == following:
            start, _, name = found.pop()
            found.append((start, b, name))
            following = f"{name}_{int(token.removeprefix(f'{name}_')) + 1}"
        elif token in known:
            found.append((a, b, token))
            following = f"{token}_1"
        else:
            following = ""
    return {(start, end): name for start, end, name in found}


def _between(text: str, taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where the words begin and end that lie between the places that are taken already."""
    starts, ends = [0, *(end for _, end in taken)], [*(start for start, _ in taken), len(text)]
    gaps = zip(starts, ends, strict=True)
    return [(start + a, start + b) for start, end in gaps for a, b in _word_spans(text[start:end])]


def _read(pipe: Any, prompt: str) -> str:
    """The prompt with every textual inversion of several vectors written out, as the pipeline does before it encodes."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return prompt if convert is None else convert(prompt, pipe.tokenizer)


def _offsets(pipe: Any, prompt: str) -> list[tuple[int, int]]:
    return pipe.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]


def _room(pipe: Any) -> int:
    return pipe.tokenizer.model_max_length - 2  # start and end


def _cut(pipe: Any, prompt: str) -> str:
    """The prompt, cut after the last whole word the text encoder has room for, where it has words."""
    room, read = _room(pipe), _read(pipe, prompt)
    offsets = _offsets(pipe, read)
    if len(offsets) <= room:
        return prompt
    if read != prompt:  # places in what is read are not places in the prompt
        shorter = re.sub(r"\s*\S+\s*$", "", prompt)
        return _cut(pipe, shorter)
    end = offsets[room][0]
    if end and not prompt[end - 1].isspace() and not prompt[end].isspace():
        end = len(re.sub(r"\s\S*$", "", prompt[:end]))  # scripts without spaces are cut in the middle, as CLIP does
    return prompt[:end].rstrip()


def _word_spans(text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends: letters, digits and their accents, with apostrophes and hyphens inside; any other sign
    that is no space is a word of its own."""
    letter = [unicodedata.category(c)[0] in "LNM" or c == "_" for c in text]
    inside = [
        letter[i] or (c in "'\u2019-" and 0 < i < len(text) - 1 and letter[i - 1] and letter[i + 1]) for i, c in enumerate(text)
    ]
    spans: list[tuple[int, int]] = []
    for i, c in enumerate(text):
        if inside[i] and i and inside[i - 1] and spans:
            spans[-1] = (spans[-1][0], i + 1)
        elif not c.isspace():
            spans.append((i, i + 1))
    return spans
