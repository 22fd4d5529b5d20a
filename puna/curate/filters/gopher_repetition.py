"""Gopher's repetition rules: does this say the same thing again and again?"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from puna.batches.words import Bytes, Positions, character_classes, hash_bytes, text_buffers
from puna.curate.document import Outcome, split
from puna.curate.filters.lines import count_characters, strip_left, strip_right
from puna.curate.filters.reasons import first_reason, ratio, require_shares
from puna.curate.filters.tokens import mark_kinds, next_token

_FIRST_TOP, _FIRST_DUPLICATE = 2, 5
_CHARACTERS, _PARAGRAPHS, _LINES, _N_GRAMS = 0, 1, 4, 7
_COUNTED_FROM = 1 << 16
"""Bytes of a text; of shorter ones it is taken that every byte could be a word."""
_EMPTY = np.uint64(0)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class GopherRepetition:
    """Reject texts that repeat themselves (Rae et al. 2021, appendix A.1.1, table A1).

    Every share is one of documents' lines, paragraphs or characters. Decisions are those of datatrove's
    GopherRepetitionFilter but for where words begin and end; as there, punctuation marks count as words.
    """

    kind: Literal["gopher_repetition"] = "gopher_repetition"
    """This step's name."""
    max_duplicate_paragraphs: float = 0.3
    """Largest share of paragraphs that occurred before; blank lines part them."""
    max_duplicate_paragraph_characters: float = 0.2
    """Largest share of characters in such paragraphs."""
    max_duplicate_lines: float = 0.3
    """Largest share of lines that occurred before."""
    max_duplicate_line_characters: float = 0.2
    """Largest share of characters in such lines."""
    max_top_n_gram_characters: tuple[float, ...] = (0.20, 0.18, 0.16)
    """Largest share of characters in the most frequent word 2-gram, 3-gram, and so on."""
    max_duplicate_n_gram_characters: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Largest share of characters in word 5-grams, 6-grams, and so on, that occurred before."""

    def __post_init__(self) -> None:
        require_shares(self, "max_duplicate_paragraphs", "max_duplicate_paragraph_characters")
        require_shares(self, "max_duplicate_lines", "max_duplicate_line_characters")
        for share in (*self.max_top_n_gram_characters, *self.max_duplicate_n_gram_characters):
            if not 0 <= share <= 1:
                raise ValueError(f"the largest share of characters in n-grams must be between 0 and 1, not {share}.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject documents that break one of the rules, with the first of them as reason."""
        tops, duplicates = self.max_top_n_gram_characters, self.max_duplicate_n_gram_characters
        counts = count_repetitions(documents["text"], len(tops), len(duplicates))
        characters = counts[:, _CHARACTERS]
        tests = [(characters == 0, "empty")]
        for column, name, most, most_characters in (
            (_PARAGRAPHS, "paragraphs", self.max_duplicate_paragraphs, self.max_duplicate_paragraph_characters),
            (_LINES, "lines", self.max_duplicate_lines, self.max_duplicate_line_characters),
        ):
            everything, repeated, repeated_characters = counts[:, column : column + 3].T
            tests.append((ratio(repeated, everything) > most, f"too many duplicate {name}"))
            share = ratio(repeated_characters, characters)
            tests.append((share > most_characters, f"too many characters in duplicate {name}"))
        column = _N_GRAMS
        for n, most in enumerate(tops, _FIRST_TOP):
            share = ratio(counts[:, column], characters)
            tests.append((share > most, f"too many characters in the most frequent {n}-gram"))
            column += 1
        for n, most in enumerate(duplicates, _FIRST_DUPLICATE):
            tests.append((ratio(counts[:, column], characters) > most, f"too many characters in duplicate {n}-grams"))
            column += 1
        return split(documents, first_reason(len(documents), tests))


def count_repetitions(
    texts: pa.Array | pa.ChunkedArray, num_tops: int = 3, num_duplicates: int = 6
) -> NDArray[np.int64]:
    """What is repeated in each text, a row each.

    Columns: characters; paragraphs, those that occurred before, characters in these; the same three of lines;
    characters in the most frequent 2-gram, 3-gram, ... (with a space between words); characters in 5-grams, 6-grams,
    ... that occurred before (not overlapping, without spaces).
    """
    data, offsets = text_buffers(texts)
    counts: NDArray[np.int64] = _count(data, offsets, character_classes(), mark_kinds(), num_tops, num_duplicates)
    return counts


@njit(cache=True, nogil=True)
def _count(
    data: Bytes, offsets: Positions, classes: Bytes, marks: Bytes, num_tops: int, num_duplicates: int
) -> NDArray[np.int64]:
    counts = np.zeros((len(offsets) - 1, _N_GRAMS + num_tops + num_duplicates), np.int64)
    room = 0
    for document in range(len(offsets) - 1):
        start, end = offsets[document], offsets[document + 1]
        needed = int(end - start)
        if needed > _COUNTED_FROM:
            needed = _count_items(data, start, end, classes, marks)
        if needed >= room:
            # The hash tables have a power of two places, at least twice as many as items.
            room = max(room, 1024)
            while room < needed + 2:
                room *= 2
            powers, lengths = np.empty(room, np.uint64), np.empty(room, np.int64)
            occurrences = np.empty(room, np.int32)
            keys, firsts = np.empty(2 * room, np.uint64), np.empty(2 * room, np.int32)
        found = counts[document]
        found[_CHARACTERS] = count_characters(data, start, end)
        first = strip_left(data, start, end)
        _count_pieces(data, first, strip_right(data, first, end), 2, keys, found[_PARAGRAPHS:])
        _count_pieces(data, start, end, 1, keys, found[_LINES:])
        num_words = _hash_words(data, start, end, classes, marks, powers, lengths)
        repeated = True
        for n in range(_FIRST_TOP, _FIRST_TOP + num_tops):
            if num_words >= n:
                characters, repeated = _most_frequent(n, num_words, powers, lengths, keys, firsts, occurrences)
                found[_N_GRAMS + n - _FIRST_TOP] = characters
        for n in range(_FIRST_DUPLICATE, _FIRST_DUPLICATE + num_duplicates):
            # If nothing of n words is repeated, then nothing longer is.
            if not repeated or num_words < n:
                break
            characters = _duplicates(n, num_words, powers, lengths, keys)
            found[_N_GRAMS + num_tops + n - _FIRST_DUPLICATE] = characters
            repeated = characters > 0
    return counts


@njit(cache=True, nogil=True)
def _count_items(data: Bytes, first: int, end: int, classes: Bytes, marks: Bytes) -> int:
    """At least as many as there are words, and as there are lines."""
    words = newlines = 0
    at = first
    for byte in range(first, end):
        newlines += data[byte] == 0x0A
    while at < end:
        start, at = next_token(data, first, at, end, classes, marks)
        words += start < end
    return max(words, newlines + 1)


@njit(cache=True, nogil=True)
def _clear(keys: NDArray[np.uint64], num_items: int) -> np.uint64:
    """Empty as much of the hash table as so many items need; return how far to shift a hash to get its place."""
    shift = np.uint64(63)
    while 1 << (np.uint64(64) - shift) < 2 * num_items:
        shift -= np.uint64(1)
    keys[: 1 << (np.uint64(64) - shift)] = _EMPTY
    return shift


@njit(cache=True, nogil=True, inline="always")
def _place(keys: NDArray[np.uint64], shift: np.uint64, key: np.uint64) -> np.uint64:
    """Where in the hash table `key` is, or would be."""
    mask = (np.uint64(1) << (np.uint64(64) - shift)) - np.uint64(1)
    place = key * _MULTIPLIER >> shift
    while keys[place] != _EMPTY and keys[place] != key:
        place = (place + np.uint64(1)) & mask
    return place


@njit(cache=True, nogil=True)
def _count_pieces(
    data: Bytes, start: int, end: int, min_newlines: int, keys: NDArray[np.uint64], found: NDArray[np.int64]
) -> None:
    """Pieces between runs of newlines; those that occurred before; characters in these."""
    pieces = 1
    for at in range(start, end):
        pieces += data[at] == 0x0A
    shift = _clear(keys, pieces)
    at = start
    while True:
        stop = at
        newlines = 0
        while stop < end:
            if data[stop] == 0x0A:
                newlines = 1
                while stop + newlines < end and data[stop + newlines] == 0x0A:
                    newlines += 1
                if newlines >= min_newlines:
                    break
                stop += newlines
                newlines = 0
            else:
                stop += 1
        found[0] += 1
        key = max(hash_bytes(data, at, stop), np.uint64(1))
        place = _place(keys, shift, key)
        if keys[place] == key:
            found[1] += 1
            found[2] += count_characters(data, at, stop)
        keys[place] = key
        if newlines == 0:
            break
        at = stop + newlines


@njit(cache=True, nogil=True)
def _hash_words(
    data: Bytes,
    first: int,
    end: int,
    classes: Bytes,
    marks: Bytes,
    powers: NDArray[np.uint64],
    lengths: NDArray[np.int64],
) -> int:
    """Running polynomial of the words' hashes, and running sum of their characters; both begin with 0."""
    powers[0], lengths[0] = 0, 0
    words = 0
    at = first
    while True:
        start, at = next_token(data, first, at, end, classes, marks)
        if start == end:
            return words
        powers[words + 1] = powers[words] * _MULTIPLIER + hash_bytes(data, start, at)
        lengths[words + 1] = lengths[words] + count_characters(data, start, at)
        words += 1


@njit(cache=True, nogil=True, inline="always")
def _power(n: int) -> np.uint64:
    value = np.uint64(1)
    for _ in range(n):
        value *= _MULTIPLIER
    return value


@njit(cache=True, nogil=True)
def _most_frequent(
    n: int,
    num_words: int,
    powers: NDArray[np.uint64],
    lengths: NDArray[np.int64],
    keys: NDArray[np.uint64],
    firsts: NDArray[np.int32],
    occurrences: NDArray[np.int32],
) -> tuple[int, bool]:
    """Characters in all copies of the most frequent n-gram (of equals the first), and whether there are several."""
    grams = num_words - n + 1
    shift = _clear(keys, grams)
    power = _power(n)
    most = 1
    for word in range(grams):
        key = max(powers[word + n] - powers[word] * power, np.uint64(1))
        place = _place(keys, shift, key)
        occurrences[word] = 0
        if keys[place] == _EMPTY:
            keys[place], firsts[place] = key, word
        occurrences[firsts[place]] += 1
        most = max(most, occurrences[firsts[place]])
    first = 0
    while occurrences[first] != most:
        first += 1
    return (lengths[first + n] - lengths[first] + n - 1) * most, most > 1


@njit(cache=True, nogil=True)
def _duplicates(
    n: int, num_words: int, powers: NDArray[np.uint64], lengths: NDArray[np.int64], keys: NDArray[np.uint64]
) -> int:
    """Characters in n-grams that occurred before; after one, the next begins behind it."""
    shift = _clear(keys, num_words - n + 1)
    power = _power(n)
    characters = word = 0
    while word <= num_words - n:
        key = max(powers[word + n] - powers[word] * power, np.uint64(1))
        place = _place(keys, shift, key)
        if keys[place] == key:
            characters += lengths[word + n] - lengths[word]
            word += n
        else:
            keys[place] = key
            word += 1
    return characters
