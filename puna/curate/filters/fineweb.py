"""FineWeb's own rules: do the lines look like those of a text rather than of a list?"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from puna.batches.words import TERMINAL, Bytes, Positions, character_classes, decode, hash_bytes, text_buffers
from puna.curate.document import Outcome, split
from puna.curate.filters.lines import count_characters, last_character, strip_left
from puna.curate.filters.reasons import first_reason, ratio, require_not_negative, require_shares
from puna.curate.filters.tokens import mark_kinds, next_token

_COLUMNS = 7
_SMALLEST = 1e-9
_LINES, _TERMINATED, _SHORT, _DUPLICATE_CHARACTERS, _CHARACTERS, _NEWLINES, _WORDS = range(_COLUMNS)


@dataclass(frozen=True)
class FineWeb:
    """Reject texts whose lines look like those of a list or a menu (Penedo et al. 2024, section 3.6).

    Decisions are those of datatrove's FineWebQualityFilter but for where words begin and end; as there, punctuation
    marks count as words.
    """

    kind: Literal["fineweb"] = "fineweb"
    """This step's name."""
    min_terminated_lines: float = 0.12
    """Smallest share of lines that end in a mark that may end a sentence, in any script."""
    allow_unterminated: bool = False
    """Whether a text is kept in which no line at all ends so."""
    max_short_lines: float = 0.67
    """Largest share of short lines."""
    short_line_characters: int = 30
    """A line of up to so many characters is short."""
    max_duplicate_characters: float = 0.01
    """Largest share of characters in lines that occurred before."""
    max_newlines_per_word: float = 0.3
    """Most newlines for each word or mark."""

    def __post_init__(self) -> None:
        require_shares(self, "min_terminated_lines", "max_short_lines", "max_duplicate_characters")
        require_not_negative(self, "short_line_characters", "max_newlines_per_word")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject documents that break one of the rules, with the first of them as reason."""
        counts = count_lines(documents["text"], self.short_line_characters, self.max_newlines_per_word)
        lines = counts[:, _LINES]
        terminated = ratio(counts[:, _TERMINATED], lines)
        unterminated = terminated < self.min_terminated_lines
        if self.allow_unterminated:
            unterminated &= terminated > 0
        duplicate = ratio(counts[:, _DUPLICATE_CHARACTERS], counts[:, _CHARACTERS])
        tests = [
            (lines == 0, "empty"),
            (unterminated, "too few lines with terminal punctuation"),
            (ratio(counts[:, _SHORT], lines) > self.max_short_lines, "too many short lines"),
            (duplicate > self.max_duplicate_characters, "too many characters in duplicate lines"),
            (ratio(counts[:, _NEWLINES], counts[:, _WORDS]) > self.max_newlines_per_word, "too many newlines"),
        ]
        return split(documents, first_reason(len(documents), tests))


def count_lines(
    texts: pa.Array | pa.ChunkedArray, short_line_characters: int, max_newlines_per_word: float
) -> NDArray[np.int64]:
    """For each text: lines that are not blank; those with terminal punctuation; short ones; characters in those that
    occurred before; characters that are no newlines; newlines; words and marks, of which texts with no more than
    `max_newlines_per_word` may show too few, but never so few as to have more.
    """
    data, offsets = text_buffers(texts)
    limits = (short_line_characters, max(max_newlines_per_word, _SMALLEST))
    counts: NDArray[np.int64] = _count(data, offsets, character_classes(), mark_kinds(), *limits)
    return counts


@njit(cache=True, nogil=True)
def _count(
    data: Bytes, offsets: Positions, classes: Bytes, marks: Bytes, short: int, max_newlines: float
) -> NDArray[np.int64]:
    counts = np.zeros((len(offsets) - 1, _COLUMNS), np.int64)
    for document in range(len(offsets) - 1):
        start, end = offsets[document], offsets[document + 1]
        found = counts[document]
        seen = {np.uint64(0)}
        at = start
        while at <= end:
            stop = at
            while stop < end and data[stop] != 0x0A:
                stop += 1
            characters = count_characters(data, at, stop)
            found[_CHARACTERS] += characters
            if strip_left(data, at, stop) < stop:
                found[_LINES] += 1
                found[_TERMINATED] += classes[decode(data, last_character(data, stop))[0]] & TERMINAL != 0
                found[_SHORT] += characters <= short
                key = hash_bytes(data, at, stop)
                if key in seen:
                    found[_DUPLICATE_CHARACTERS] += characters
                seen.add(key)
            found[_NEWLINES] += stop < end
            at = stop + 1
        found[_WORDS] = _count_words(data, start, end, classes, marks, found[_NEWLINES] / max_newlines)
    return counts


@njit(cache=True, nogil=True)
def _count_words(data: Bytes, first: int, end: int, classes: Bytes, marks: Bytes, enough: float) -> int:
    """Words and marks; or fewer, but at least `enough`: most texts need no more than a count of what spaces part."""
    words = 0
    at_start = True
    for at in range(first, end):
        byte = data[at]
        words += at_start and 0x21 <= byte <= 0x7E
        at_start = byte == 0x20 or byte == 0x0A
    if words >= enough + 1:
        return words
    words, at = 0, first
    while at < end:
        start, at = next_token(data, first, at, end, classes, marks)
        words += start < end
    return words
