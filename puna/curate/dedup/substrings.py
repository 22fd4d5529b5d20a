"""Passages that occur more than once, anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from puna.batches.shingles import Positions, hash_shingles
from puna.batches.words import hash_words, split_words, text_buffers
from puna.curate.dedup.cut import cut_words
from puna.curate.dedup.database import keys_database, write_decisions
from puna.curate.dedup.outcomes import reasons_where, with_texts
from puna.curate.document import Outcome, split

KEYS = pa.schema({"document": pa.int64(), "word": pa.int32(), "hash": pa.uint64()})


@dataclass(frozen=True)
class SubstringDuplicates:
    """Remove passages that have occurred before, in any document or in the same one (Lee et al. 2022, section 4.1).

    Every run of min_words words (as `puna.batches.words` has them; what stands between them does not count) is compared
    with every other, by a 64-bit hash. So all repeated passages of at least so many words are found, with their exact
    ends. A word is removed if it is in a run that has occurred before and not in one that is the first of several: of
    every run of min_words words that was removed anywhere, the first copy stands whole in the result. For that, pieces
    of a passage may stay that overlaps itself or another first copy.

    It costs 20 bytes a word on disk before compression, and a sort of them by hash.
    """

    kind: Literal["substring_duplicates"] = "substring_duplicates"
    """This step's name."""
    min_words: int = 50
    """Shorter passages are left alone."""

    def __post_init__(self) -> None:
        if self.min_words < 1:
            raise ValueError(f"min_words must be at least 1, not {self.min_words}.")

    def keys(self, documents: pa.Table, first: int) -> pa.Table:
        """A hash for each run of min_words words, with the number of its first word in the document."""
        words = split_words(documents["text"])
        hashes, offsets = hash_shingles(hash_words(words, normalize=False), words.documents, self.min_words)
        counts = np.diff(offsets)
        numbers = np.repeat(np.arange(first, first + len(documents), dtype=np.int64), counts)
        starts = (np.arange(len(hashes)) - np.repeat(offsets[:-1], counts)).astype(np.int32)
        return pa.table({"document": numbers, "word": starts, "hash": hashes})

    def decide(self, keys: Sequence[Path], work: Path, memory_bytes: int) -> None:
        """Rows (document, start, stop, original): repeated runs, first or later ones, cover words [start, stop)."""
        with keys_database(keys, KEYS, work, memory_bytes) as connection:
            write_decisions(
                connection,
                f"""
                WITH repeated AS (SELECT hash FROM keys GROUP BY hash HAVING count(*) > 1),
                runs AS (
                    SELECT document, word,
                        row_number() OVER (PARTITION BY hash ORDER BY document, word) = 1 AS original
                    FROM keys SEMI JOIN repeated USING (hash)
                ),
                consecutive AS (
                    SELECT *, word - row_number() OVER (PARTITION BY document, original ORDER BY word) AS island
                    FROM runs
                )
                SELECT document, min(word) AS start, max(word) + {self.min_words} AS stop, original
                FROM consecutive GROUP BY document, original, island ORDER BY document, start, original
                """,
                work,
            )

    def apply(self, documents: pa.Table, first: int, decisions: pa.Table) -> Outcome:
        """Cut the passages out, and reject documents without a word left."""
        words = split_words(documents["text"])
        _, offsets = text_buffers(documents["text"])
        original = decisions["original"].to_numpy()
        begins = words.documents[decisions["document"].to_numpy() - first]
        starts, stops = begins + decisions["start"].to_numpy(), begins + decisions["stop"].to_numpy()
        removed = covered(len(words.starts), starts[~original], stops[~original])
        removed &= ~covered(len(words.starts), starts[original], stops[original])
        left = np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(~removed)])[words.documents])
        touched = np.zeros(len(documents), bool)
        touched[decisions["document"].to_numpy() - first] = True
        empty = touched & (left == 0)
        outcome = split(documents, reasons_where(empty, "empty after substring deduplication"))
        texts = cut_words(words, offsets, removed).filter(pa.array(~empty))
        counts = {"repeated words removed": int(removed.sum())}
        return Outcome(with_texts(outcome.kept, texts), outcome.rejected, counts)


@njit(cache=True, nogil=True)
def covered(count: int, starts: Positions, stops: Positions) -> NDArray[np.bool_]:
    """Which of `count` words are in any of the runs [start, stop)."""
    marks = np.zeros(count, np.bool_)
    for run in range(len(starts)):
        marks[starts[run] : stops[run]] = True
    return marks
