"""Lines that are repeated across documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from puna.curate.dedup.database import keys_database, write_decisions
from puna.curate.dedup.fingerprints import Difference, hash_texts, normalize_texts
from puna.curate.dedup.outcomes import reasons_where, with_texts
from puna.curate.document import Outcome, split

KEYS = pa.schema({"document": pa.int64(), "line": pa.int32(), "hash": pa.uint64()})


@dataclass(frozen=True)
class LineDuplicates:
    """Remove lines that occur too often, and documents of which nothing is left.

    CCNet (Wenzek et al. 2020, section 3.1) keeps the first copy of each line of a group of shards, comparing without
    case, digits, accents and punctuation. Llama 3 (section 3.1.1) removes all copies of lines that occur more than six
    times in a bucket of thirty million documents. The defaults are CCNet's over all documents.
    """

    kind: Literal["line_duplicates"] = "line_duplicates"
    """This step's name."""
    max_copies: int = 1
    """Lines that occur more often are repeated ones."""
    keep: Literal["first", "none"] = "first"
    """Which copies of a repeated line stay: the first max_copies, or none."""
    bucket_documents: int = 0
    """Copies are counted within so many consecutive documents; 0 is all of them."""
    ignore: tuple[Difference, ...] = ("case", "digits", "accents", "punctuation", "whitespace")
    """Differences that do not count, any of: case, digits, accents, punctuation, whitespace."""
    min_characters: int = 1
    """Shorter lines are left alone; counted after removing what is ignored."""

    def __post_init__(self) -> None:
        if self.max_copies < 1:
            raise ValueError(f"max_copies must be at least 1, not {self.max_copies}.")
        if self.bucket_documents < 0:
            raise ValueError(f"bucket_documents must be 0 (all) or more, not {self.bucket_documents}.")
        if self.min_characters < 1:
            raise ValueError(f"min_characters must be at least 1, not {self.min_characters}.")

    def keys(self, documents: pa.Table, first: int) -> pa.Table:
        """A 64-bit hash of each line that is long enough."""
        offsets, lines = _split_lines(documents["text"])
        lines = normalize_texts(lines, self.ignore)
        counts = np.diff(offsets)
        keys = pa.table(
            {
                "document": np.repeat(np.arange(first, first + len(documents), dtype=np.int64), counts),
                "line": (np.arange(len(lines)) - np.repeat(offsets[:-1], counts)).astype(np.int32),
                "hash": hash_texts(lines)["low"],
            }
        )
        return keys.filter(pc.greater_equal(pc.utf8_length(lines), self.min_characters))

    def decide(self, keys: Sequence[Path], work: Path, memory_bytes: int) -> None:
        """One row (document, line) for each line to remove."""
        bucket = f"document // {self.bucket_documents}" if self.bucket_documents else "0"
        spared = self.max_copies if self.keep == "first" else 0
        with keys_database(keys, KEYS, work, memory_bytes) as connection:
            write_decisions(
                connection,
                f"""
                WITH counted AS (SELECT document, line, hash, {bucket} AS bucket FROM keys),
                repeated AS (
                    SELECT bucket, hash FROM counted GROUP BY bucket, hash HAVING count(*) > {self.max_copies}
                )
                SELECT document, line FROM counted SEMI JOIN repeated USING (bucket, hash)
                QUALIFY row_number() OVER (PARTITION BY bucket, hash ORDER BY document, line) > {spared}
                ORDER BY document, line
                """,
                work,
            )

    def apply(self, documents: pa.Table, first: int, decisions: pa.Table) -> Outcome:
        """Join what is left of each document's lines."""
        offsets, lines = _split_lines(documents["text"])
        kept = np.ones(len(lines), bool)
        rows = decisions["document"].to_numpy() - first
        kept[offsets[rows] + decisions["line"].to_numpy()] = False
        counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])[offsets]
        left = pa.ListArray.from_arrays(counts.astype(np.int32), lines.filter(pa.array(kept)).combine_chunks())
        texts = pc.binary_join(left, "\n")
        touched = np.zeros(len(documents), bool)
        touched[rows] = True
        empty = touched & pc.equal(pc.utf8_trim_whitespace(texts), "").to_numpy(zero_copy_only=False)
        outcome = split(documents, reasons_where(empty, "empty after line deduplication"))
        kept_documents = with_texts(outcome.kept, texts.filter(pa.array(~empty)))
        return Outcome(kept_documents, outcome.rejected, {"repeated lines removed": len(rows)})


def _split_lines(texts: pa.ChunkedArray) -> tuple[NDArray[np.int64], pa.ChunkedArray]:
    """Where each document's lines begin among all lines (one more number than documents), and the lines."""
    lists = pc.split_pattern(texts, "\n").combine_chunks()
    return lists.offsets.to_numpy(), pa.chunked_array([lists.flatten()])
