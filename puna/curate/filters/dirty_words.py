"""Count words that decent pages do without."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from puna.batches.words import hash_words, split_words
from puna.curate.document import Outcome, split
from puna.curate.filters.lists import read_list
from puna.curate.filters.reasons import first_reason, ratio, require_not_negative, require_shares
from puna.curate.filters.texts import with_column

ADULT_WORDS = (
    *("porn", "porno", "pornography", "xxx", "hentai", "milf", "blowjob", "cumshot", "creampie", "gangbang", "bukkake"),
    *("deepthroat", "handjob", "camgirl", "upskirt", "anal sex", "hardcore sex", "free sex", "sex cam", "nude girls"),
)
"""A small English list of words for adult pages, unlikely in another sense."""

_FILTER_BITS = 1 << 16
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class DirtyWords:
    """Count words of a list, and reject documents with too many.

    C4 (Raffel et al. 2020, section 2.2) rejects a page for one bad word, by a long list; Llama 3 (section 3.1.1) counts
    dirty words to find adult pages that no domain list knows. The default is the latter, with a small English list.
    """

    kind: Literal["dirty_words"] = "dirty_words"
    """This step's name."""
    words: Path = Path()
    """Text file with a word or phrase a line, in any language; the default is a small English list of adult words."""
    max_count: int = 2
    """Documents with more of them are rejected, if their share is too large as well."""
    max_share: float = 0.002
    """Largest share of dirty words and phrases in all words."""
    column: str = ""
    """Column for the count; none if empty."""

    def __post_init__(self) -> None:
        require_not_negative(self, "max_count")
        require_shares(self, "max_share")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Count; reject documents with too many.

        Raises:
            InputError: the list is not there, or broken.
        """
        words = split_words(documents["text"])
        hashes = hash_words(words)
        positions = np.zeros(len(hashes) + 1, np.int64)
        for length, phrases in _phrases(self.words).items():
            positions[np.flatnonzero(_among(_runs(hashes, length, words.documents), phrases))] += 1
        sums = np.concatenate([[0], np.cumsum(positions)])
        counts = sums[words.documents[1:]] - sums[words.documents[:-1]]
        too_many = (counts > self.max_count) & (ratio(counts, np.diff(words.documents)) > self.max_share)
        if self.column:
            documents = with_column(documents, self.column, pa.array(counts))
        return split(documents, first_reason(len(documents), [(too_many, "too many dirty words")]))


@cache
def _phrases(path: Path) -> dict[int, NDArray[np.uint64]]:
    """Number of words -> sorted hashes of the phrases with so many."""
    entries = ADULT_WORDS if path == Path() else read_list(path)
    words = split_words(pa.array(entries))
    hashes = hash_words(words)
    lengths = np.diff(words.documents)
    return {
        int(length): np.unique(_runs(hashes, int(length), words.documents)[words.documents[:-1][lengths == length]])
        for length in np.unique(lengths[lengths > 0])
    }


def _runs(hashes: NDArray[np.uint64], length: int, documents: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash of the run of `length` words from each word on; 0 where the document ends before."""
    runs = hashes.copy()
    for offset in range(1, length):
        runs[:-offset] = runs[:-offset] * _MULTIPLIER + hashes[offset:]
    for offset in range(1, length):
        last = documents[1:] - offset
        runs[last[last >= documents[:-1]]] = 0
    return runs


def _among(runs: NDArray[np.uint64], phrases: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each run is one of the sorted phrases; nearly all are ruled out by their last bits."""
    possible = np.zeros(_FILTER_BITS, bool)
    possible[phrases % np.uint64(_FILTER_BITS)] = True
    found: NDArray[np.bool_] = possible[runs % np.uint64(_FILTER_BITS)]
    found[found] = np.isin(runs[found], phrases)
    return found
