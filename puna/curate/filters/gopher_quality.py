"""Gopher's quality rules: does this read like prose?"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from puna.batches.words import (
    DIGIT,
    LETTER,
    MARK,
    SYMBOL,
    Bytes,
    Positions,
    character_classes,
    decode,
    hash_bytes,
    text_buffers,
)
from puna.curate.document import Outcome, split
from puna.curate.filters.lines import count_characters, ends_in_ellipsis, next_line, strip_left, strip_right
from puna.curate.filters.reasons import first_reason, ratio, require_not_negative, require_shares
from puna.curate.filters.tokens import mark_kinds, next_token

_MAX_STOP_WORDS = 64
_COLUMNS = 10
_TOKENS, _WORDS, _CHARACTERS, _ALPHABETIC, _STOP_WORDS = range(5)
_HASHES, _ELLIPSES, _LINES, _BULLETS, _CUT_LINES = range(5, _COLUMNS)


@dataclass(frozen=True)
class GopherQuality:
    """Reject texts that do not read like prose (Rae et al. 2021, appendix A.1.1).

    Decisions are those of datatrove's GopherQualityFilter but for where words begin and end. As there, punctuation
    marks count as words where shares of words are asked, not in the number of words and their mean length.
    """

    kind: Literal["gopher_quality"] = "gopher_quality"
    """This step's name."""
    min_words: int = 50
    """Fewest words of a document."""
    max_words: int = 100_000
    """Most words of a document."""
    min_mean_word_length: float = 3.0
    """Characters of a word, on average, at least."""
    max_mean_word_length: float = 10.0
    """Characters of a word, on average, at most."""
    max_symbols_per_word: float = 0.1
    """Most "#", and most ellipses ("..." or "…"), for each word or mark."""
    max_bullet_lines: float = 0.9
    """Largest share of lines that begin with "•" or "-"."""
    max_ellipsis_lines: float = 0.3
    """Largest share of lines that end in an ellipsis."""
    min_alphabetic_words: float = 0.8
    """Smallest share of words and marks in which there is a letter."""
    min_stop_words: int = 2
    """How many different stop words have to occur."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """Frequent words of the language, as they are written inside a sentence; 64 at most."""

    def __post_init__(self) -> None:
        require_not_negative(self, "min_words", "max_words", "min_mean_word_length", "max_mean_word_length")
        require_not_negative(self, "max_symbols_per_word", "min_stop_words")
        require_shares(self, "max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words")
        if self.min_words > self.max_words:
            raise ValueError(f"min_words ({self.min_words}) is larger than max_words ({self.max_words}).")
        if len(self.stop_words) > _MAX_STOP_WORDS:
            raise ValueError(f"stop_words holds {len(self.stop_words)} words; {_MAX_STOP_WORDS} are the most.")
        if self.min_stop_words > len(set(self.stop_words)):
            raise ValueError(f"min_stop_words is {self.min_stop_words}, but stop_words holds fewer different words.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject documents that break one of the rules, with the first of them as reason."""
        counts = count_words_and_lines(documents["text"], self.stop_words)
        tokens, words, lines = counts[:, _TOKENS], counts[:, _WORDS], counts[:, _LINES]
        length = ratio(counts[:, _CHARACTERS], words)
        tests = [
            (words < self.min_words, f"fewer than {self.min_words} words"),
            (words > self.max_words, f"more than {self.max_words} words"),
            (length < self.min_mean_word_length, f"mean word length under {self.min_mean_word_length:g}"),
            (length > self.max_mean_word_length, f"mean word length over {self.max_mean_word_length:g}"),
            (ratio(counts[:, _HASHES], tokens) > self.max_symbols_per_word, "too many hash signs"),
            (ratio(counts[:, _ELLIPSES], tokens) > self.max_symbols_per_word, "too many ellipses"),
            (ratio(counts[:, _BULLETS], lines) > self.max_bullet_lines, "too many bullet lines"),
            (ratio(counts[:, _CUT_LINES], lines) > self.max_ellipsis_lines, "too many lines ending in an ellipsis"),
            (ratio(counts[:, _ALPHABETIC], tokens) < self.min_alphabetic_words, "too few words with a letter"),
            (counts[:, _STOP_WORDS] < self.min_stop_words, f"fewer than {self.min_stop_words} stop words"),
        ]
        return split(documents, first_reason(len(documents), tests))


def count_words_and_lines(texts: pa.Array | pa.ChunkedArray, stop_words: tuple[str, ...]) -> NDArray[np.int64]:
    """For each text: words and marks; words; their characters; words with a letter; different stop words; "#"s;
    ellipses; lines; lines that begin with a bullet; lines that end in an ellipsis.
    """
    data, offsets = text_buffers(texts)
    hashes, bits = _hashed(stop_words)
    counts: NDArray[np.int64] = _count(data, offsets, character_classes(), mark_kinds(), hashes, bits)
    return counts


@cache
def _hashed(stop_words: tuple[str, ...]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Hash table of 256 places, probed one by one; and a bit for each word."""
    hashes, bits = np.zeros(256, np.uint64), np.zeros(256, np.uint64)
    for number, word in enumerate(dict.fromkeys(stop_words)):
        value = int(hash_bytes(np.frombuffer(word.encode(), np.uint8), 0, len(word.encode())))
        place = value % 256
        while bits[place]:
            place = (place + 1) % 256
        hashes[place], bits[place] = value, 1 << number
    return hashes, bits


@njit(cache=True, nogil=True)
def _count(
    data: Bytes, offsets: Positions, classes: Bytes, marks: Bytes, hashes: NDArray[np.uint64], bits: NDArray[np.uint64]
) -> NDArray[np.int64]:
    counts = np.zeros((len(offsets) - 1, _COLUMNS), np.int64)
    for document in range(len(offsets) - 1):
        found = counts[document]
        _count_words(data, offsets[document], offsets[document + 1], classes, marks, hashes, bits, found)
        _count_lines(data, offsets[document], offsets[document + 1], found)
    return counts


@njit(cache=True, nogil=True)
def _count_words(
    data: Bytes,
    first: int,
    end: int,
    classes: Bytes,
    marks: Bytes,
    hashes: NDArray[np.uint64],
    bits: NDArray[np.uint64],
    found: NDArray[np.int64],
) -> None:
    seen = np.uint64(0)
    at = first
    while True:
        start, at = next_token(data, first, at, end, classes, marks)
        if start == end:
            break
        found[_TOKENS] += 1
        inner, best = start, SYMBOL
        while inner < at and best != LETTER:
            code, size = decode(data, inner)
            kind = classes[code] & 15
            if kind > MARK:
                best = LETTER if kind != DIGIT else DIGIT
            inner += size
        if best == SYMBOL:
            continue
        found[_WORDS] += 1
        found[_CHARACTERS] += count_characters(data, start, at)
        found[_ALPHABETIC] += best == LETTER
        value = hash_bytes(data, start, at)
        place = value % np.uint64(256)
        while bits[place]:
            if hashes[place] == value:
                seen |= bits[place]
                break
            place = (place + np.uint64(1)) % np.uint64(256)
    while seen:
        seen &= seen - np.uint64(1)
        found[_STOP_WORDS] += 1


@njit(cache=True, nogil=True)
def _count_lines(data: Bytes, start: int, end: int, found: NDArray[np.int64]) -> None:
    at = start
    while at < end:
        stop, following = next_line(data, at, end)
        first = strip_left(data, at, stop)
        if first < stop:
            bullet = data[first] == 0x2D or (
                stop - first >= 3 and data[first] == 0xE2 and data[first + 1] == 0x80 and data[first + 2] == 0xA2
            )
            found[_BULLETS] += bullet
            found[_CUT_LINES] += ends_in_ellipsis(data, first, strip_right(data, first, stop))
        found[_LINES] += 1
        at = following
    at = start
    while at < end:
        byte = data[at]
        if byte == 0x23:
            found[_HASHES] += 1
        elif (byte == 0x2E or byte == 0xE2) and at + 3 <= end and ends_in_ellipsis(data, at, at + 3):
            found[_ELLIPSES] += 1
            at += 2
        at += 1
