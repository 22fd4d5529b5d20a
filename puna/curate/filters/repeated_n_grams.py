"""Lines that say the same words over and over: logs, error messages, keyword stuffing."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from puna.batches.words import (
    Bytes,
    Positions,
    character_classes,
    folded_characters,
    hash_folded,
    next_word,
    text_buffers,
)
from puna.curate.document import Outcome
from puna.curate.filters.lines import next_line
from puna.curate.filters.reasons import first_reason, require_shares
from puna.curate.filters.texts import split_with_texts, texts_of

_KEPT, _NO_LINES = range(2)


@dataclass(frozen=True)
class RepeatedNGrams:
    """Remove lines that mostly consist of word n-grams which they repeat (Llama 3, section 3.1.1).

    Such lines can be long and unlike any other line, so that line deduplication does not find them. Case and digits do
    not count. Documents of which nothing is left are rejected.
    """

    kind: Literal["repeated_n_grams"] = "repeated_n_grams"
    """This step's name."""
    n: int = 3
    """Words of an n-gram."""
    max_coverage: float = 0.5
    """Largest share of a line's words that may lie in n-grams which occur in it more than once."""
    min_words: int = 20
    """Shorter lines are left alone."""

    def __post_init__(self) -> None:
        require_shares(self, "max_coverage")
        if self.n < 1:
            raise ValueError(f"n must be at least 1, not {self.n}.")
        if self.min_words < self.n:
            raise ValueError(f"min_words ({self.min_words}) must be at least n ({self.n}).")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Remove lines; reject documents of which nothing is left."""
        data, offsets = text_buffers(documents["text"])
        tables = (character_classes(), folded_characters())
        cleaned, ends, verdicts, removed = _clean(data, offsets, *tables, self.n, self.max_coverage, self.min_words)
        reasons = first_reason(len(documents), [(verdicts == _NO_LINES, "no lines left")])
        counts = {"lines of repeated n-grams": int(removed)} if removed else {}
        return split_with_texts(documents, texts_of(cleaned, ends), reasons, counts)


@njit(cache=True, nogil=True)
def _clean(
    data: Bytes,
    offsets: Positions,
    classes: Bytes,
    folded: NDArray[np.uint32],
    n: int,
    max_coverage: float,
    min_words: int,
) -> tuple[NDArray[np.uint8], Positions, NDArray[np.int64], int]:
    """Texts that are left, their ends (0 first), a verdict for each, and how many lines were removed."""
    documents = len(offsets) - 1
    cleaned = np.empty(offsets[documents] - offsets[0], np.uint8)
    ends, verdicts = np.zeros(documents + 1, np.int64), np.zeros(documents, np.int64)
    removed = 0
    hashes = np.empty(1024, np.uint64)
    for document in range(documents):
        at, end = offsets[document], offsets[document + 1]
        written = begin = ends[document]
        removed_here = 0
        while at < end:
            stop, following = next_line(data, at, end)
            words, hashes = _hash_words(data, at, stop, classes, folded, hashes)
            if words >= min_words and _coverage(hashes[:words], n) > max_coverage:
                removed_here += 1
            else:
                cleaned[written : written + following - at] = data[at:following]
                written += following - at
            at = following
        if removed_here and written == begin:
            verdicts[document] = _NO_LINES
        ends[document + 1] = written
        removed += removed_here
    return cleaned, ends, verdicts, removed


@njit(cache=True, nogil=True)
def _hash_words(
    data: Bytes, at: int, end: int, classes: Bytes, folded: NDArray[np.uint32], hashes: NDArray[np.uint64]
) -> tuple[int, NDArray[np.uint64]]:
    words = 0
    while True:
        start, at = next_word(data, at, end, classes)
        if start == end:
            return words, hashes
        if words == len(hashes):
            hashes = np.concatenate((hashes, np.empty(words, np.uint64)))
        hashes[words] = hash_folded(data, start, at, folded)
        words += 1


@njit(cache=True, nogil=True)
def _coverage(hashes: NDArray[np.uint64], n: int) -> float:
    """Share of words that lie in an n-gram which occurs more than once."""
    grams = len(hashes) - n + 1
    keys = np.zeros(grams, np.uint64)
    for word in range(grams):
        for offset in range(n):
            keys[word] = keys[word] * np.uint64(0x9E3779B97F4A7C15) + hashes[word + offset]
    order = np.argsort(keys)
    repeated = np.zeros(len(hashes) + 1, np.int64)
    for rank in range(grams):
        key = keys[order[rank]]
        if (rank > 0 and keys[order[rank - 1]] == key) or (rank + 1 < grams and keys[order[rank + 1]] == key):
            repeated[order[rank]] += 1
            repeated[order[rank] + n] -= 1
    covered = depth = 0
    for word in range(len(hashes)):
        depth += repeated[word]
        covered += depth > 0
    return covered / len(hashes)
