"""The words of a prompt and where their tokens stand, so that users name words and never count tokens.

Who knows the tokenizer makes these; here they are only looked up. Case and punctuation do not matter.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from attention_control.errors import ControlError


@dataclass(frozen=True)
class Words:
    """One prompt. words: as they stand, in order; tokens: per word the positions of its tokens in the text encoder's output,
    empty for a word that was cut off; length: tokens in all, padding included."""

    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    length: int

    @property
    def keys(self) -> tuple[str, ...]:
        """The words as they are compared."""
        return tuple(normal(word) for word in self.words)

    @property
    def end(self) -> int:
        """The position after the last word's last token: where the end mark and the padding begin."""
        return 1 + max((position for word in self.tokens for position in word), default=0)

    def places(self, phrase: str) -> list[int]:
        """Indices of the words of `phrase`, at its first occurrence. Raises ControlError, listing the prompt's words."""
        wanted = _letters(phrase)
        for start in range(len(self.words)):
            read = ""
            for end in range(start, len(self.words)):
                read += _letters(self.words[end])
                if read == wanted and (wanted or normal(phrase) == normal(self.words[end])):
                    return list(range(start, end + 1))
                if not wanted.startswith(read) or not _letters(self.words[start]):
                    break
        known = ", ".join(repr(word) for word in self.words) or "none, the prompt is empty"
        raise ControlError(f"the word {phrase!r} is not in its prompt; its words are {known}")

    def find(self, phrase: str) -> list[int]:
        """Token positions of `phrase`. Raises ControlError where it is missing, or was cut off at the encoder's limit."""
        places = self.places(phrase)
        if any(not self.tokens[i] for i in places):
            raise ControlError(f"the word {phrase!r} was cut off: the text encoder reads only {self.length} tokens; shorten")
        return [position for i in places for position in self.tokens[i]]


def normal(word: str) -> str:
    """A word without case and surrounding punctuation; a mark or a picture is itself."""
    folded = _folded(word)
    return folded.strip("".join({c for c in folded if not c.isalnum()})) or folded


def is_mark(word: str) -> bool:
    """Whether a word is punctuation alone."""
    return all(unicodedata.category(c).startswith("P") for c in word)


def _letters(text: str) -> str:
    """Letters and digits alone, without case."""
    return "".join(c for c in _folded(text) if c.isalnum())


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()
