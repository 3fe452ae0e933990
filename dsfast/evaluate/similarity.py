"""How near a continuation comes to the expected answer.

`similarity` gives the specification's four metrics, each a fraction in 0..1. They describe; they do not decide: "Paris"
is a substring of "comparison". Success is `exact_match` alone: the answer, in whole words, is what the continuation
starts with.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

SUBSTRING_WEIGHT, SEQUENCE_WEIGHT, WORD_WEIGHT = 0.5, 0.3, 0.2

_ARTICLES = {"the", "a", "an"}
# One word: a number with its sign and its separators ("-40", "299,792.458"), or letters with inner hyphens and
# apostrophes, so that "Austria" is not found in "Austria-Hungary" nor "300" in "300,000".
_WORD = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*(?:[-‐–\w]*\w)?|\w+(?:[-‐–'’]\w+)*")


@dataclass(frozen=True)
class Similarity:
    """Fractions in 0..1, without regard to case."""

    sequence: float
    """difflib.SequenceMatcher ratio of the two strings' characters."""
    word_overlap: float
    """The share of the expected answer's different words that the continuation contains."""
    substring: float
    """1 where the expected answer stands anywhere in the continuation, letter for letter, else 0."""
    combined: float
    """0.5 substring + 0.3 sequence + 0.2 word_overlap."""


def similarity(generated: str, expected: str) -> Similarity:
    """The specification's metrics of one answer ("Similarity Scoring")."""
    got, wanted = _fold(generated).strip(), _fold(expected).strip()
    wanted_words = set(_WORD.findall(wanted))
    sequence = SequenceMatcher(None, wanted, got, autojunk=False).ratio()
    overlap = len(wanted_words & set(_WORD.findall(got))) / len(wanted_words) if wanted_words else 0.0
    substring = float(bool(wanted) and wanted in got)
    combined = SUBSTRING_WEIGHT * substring + SEQUENCE_WEIGHT * sequence + WORD_WEIGHT * overlap
    return Similarity(sequence, overlap, substring, combined)


def exact_match(generated: str, answer: str, aliases: Iterable[str] = ()) -> bool:
    """Whether the continuation's first words are the answer, or one of its aliases.

    Whole words only, without regard to case, punctuation or leading articles on either side. What follows the answer
    does not matter; what stands before it does.
    """
    got = _WORD.findall(_fold(generated))
    starts = [got, _without_article(got)]
    for candidate in (answer, *aliases):
        words = _WORD.findall(_fold(candidate))
        wanted = _without_article(words)
        if wanted and any(start[: len(wanted)] == wanted for start in starts):
            return True
    return False


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _without_article(words: list[str]) -> list[str]:
    return words[1:] if len(words) > 1 and words[0] in _ARTICLES else words
