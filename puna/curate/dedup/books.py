"""Books that hold most of another one."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from puna.batches.shingles import hash_shingles
from puna.batches.words import hash_words, split_words
from puna.curate.dedup.database import keys_database, write_decisions
from puna.curate.dedup.outcomes import document_numbers, keep_one
from puna.curate.document import Outcome

KEYS = pa.schema(
    {"document": pa.int64(), "shingles": pa.list_(pa.uint64()), "sampled": pa.list_(pa.uint64())},
)
_CANDIDATE = 0.5
"""Pairs whose overlap in sampled shingles is above this share of max_overlap are compared exactly."""
_LARGEST = 32
"""A shingle makes pairs with the so many largest books that hold it."""


@dataclass(frozen=True)
class BookDuplicates:
    """Remove books that overlap too much with a larger one that is kept (Llama 1, section 2.1: over 90 %).

    The overlap of two books is the share of the smaller one's distinct shingles that the larger one holds, so an
    edition with a new preface and a volume of collected works count too. Sampled shingles (all whose hash is small
    enough, the same in every book) find pairs to look at, and all shingles decide. Not found: pairs without enough
    common sampled shingles, which for books of ten thousand words is out of the question, and pairs of which each
    common sampled shingle is also in more than 32 larger books.
    """

    kind: Literal["book_duplicates"] = "book_duplicates"
    """This step's name."""
    max_overlap: float = 0.9
    """Books that overlap more are removed, as a share of their distinct shingles."""
    shingle_words: int = 5
    """Words in a shingle."""
    sample: int = 64
    """One shingle in so many is sampled."""

    def __post_init__(self) -> None:
        if not 0 < self.max_overlap < 1:
            raise ValueError(f"max_overlap must be between 0 and 1, not {self.max_overlap}.")
        for name in ("shingle_words", "sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def keys(self, documents: pa.Table, first: int) -> pa.Table:
        """All distinct shingles and the sampled ones, eight bytes each."""
        words = split_words(documents["text"])
        hashes, offsets = hash_shingles(hash_words(words), words.documents, self.shingle_words)
        books = [np.unique(hashes[start:stop]) for start, stop in itertools.pairwise(offsets)]
        limit = np.uint64(2**64 // self.sample - 1)
        sampled = [book[book <= limit] for book in books]
        columns = [document_numbers(documents, first), _lists(books), _lists(sampled)]
        return pa.table(columns, schema=KEYS)

    def decide(self, keys: Sequence[Path], work: Path, memory_bytes: int) -> None:
        """From the largest book to the smallest, remove each that overlaps too much with a larger one not removed."""
        with keys_database(keys, KEYS, work, memory_bytes) as connection:
            connection.execute(
                "CREATE TABLE sizes AS SELECT document, len(shingles) AS size, len(sampled) AS samples FROM keys"
            )
            connection.execute(f"""
                CREATE TABLE pairs AS
                WITH postings AS (SELECT document, unnest(sampled) AS hash FROM keys),
                ranked AS (
                    SELECT document, hash, samples,
                        row_number() OVER (PARTITION BY hash ORDER BY size DESC, document) AS rank
                    FROM postings JOIN sizes USING (document)
                )
                SELECT a.document AS smaller, b.document AS larger
                FROM ranked a JOIN ranked b ON a.hash = b.hash AND b.rank < a.rank AND b.rank <= {_LARGEST}
                GROUP BY ALL HAVING count(*) >= {_CANDIDATE * self.max_overlap} * any_value(a.samples)
            """)
            connection.execute("""
                CREATE TABLE shingles AS SELECT document, unnest(shingles) AS hash FROM keys
                SEMI JOIN (SELECT smaller AS document FROM pairs UNION SELECT larger FROM pairs) USING (document)
            """)
            overlapping = connection.execute(
                """
                SELECT smaller, larger FROM pairs
                JOIN shingles a ON a.document = smaller
                JOIN shingles b ON b.document = larger AND b.hash = a.hash
                JOIN sizes ON sizes.document = smaller
                GROUP BY smaller, larger, size HAVING count(*) > ? * size ORDER BY size DESC, smaller, larger
                """,
                [self.max_overlap],
            ).fetchall()
            clusters: dict[int, int] = {}
            for smaller, larger in overlapping:
                if larger not in clusters:
                    clusters.setdefault(smaller, larger)
            kept = sorted(set(clusters.values()))
            numbers = [*clusters, *kept]
            found = pa.table(
                {
                    "document": pa.array(numbers, pa.int64()),
                    "cluster": pa.array([*clusters.values(), *kept], pa.int64()),
                    "keep": pa.array([number not in clusters for number in numbers], pa.bool_()),
                }
            )
            connection.register("found", found)
            write_decisions(connection, "SELECT * FROM found ORDER BY document", work)

    def apply(self, documents: pa.Table, first: int, decisions: pa.Table) -> Outcome:
        """Reject the smaller books."""
        return keep_one(
            documents, first, decisions, self.kind, f"more than {self.max_overlap:.0%} of it in a larger book"
        )


def _lists(values: list[NDArray[np.uint64]]) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum([len(value) for value in values])]).astype(np.int32)
    flat = np.concatenate([np.zeros(0, np.uint64), *values])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
