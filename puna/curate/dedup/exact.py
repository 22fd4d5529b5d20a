"""Documents with the same text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from puna.curate.dedup.database import keys_database, write_decisions
from puna.curate.dedup.fingerprints import Difference, hash_texts, normalize_texts
from puna.curate.dedup.outcomes import document_numbers, keep_one
from puna.curate.document import Outcome

KEYS = pa.schema({"document": pa.int64(), "low": pa.uint64(), "high": pa.uint64()})


@dataclass(frozen=True)
class ExactDuplicates:
    """Keep the first of all documents that have the same text."""

    kind: Literal["exact_duplicates"] = "exact_duplicates"
    """This step's name."""
    ignore: tuple[Difference, ...] = ()
    """Differences that do not count, any of: case, digits, accents, punctuation, whitespace."""

    def keys(self, documents: pa.Table, first: int) -> pa.Table:
        """A 128-bit hash of each text."""
        hashes = hash_texts(normalize_texts(documents["text"], self.ignore))
        return hashes.add_column(0, "document", document_numbers(documents, first))

    def decide(self, keys: Sequence[Path], work: Path, memory_bytes: int) -> None:
        """Every document whose hash occurs more than once, with the first that has it."""
        with keys_database(keys, KEYS, work, memory_bytes) as connection:
            write_decisions(
                connection,
                """
                WITH repeated AS (
                    SELECT low, high, min(document) AS cluster FROM keys GROUP BY low, high HAVING count(*) > 1
                )
                SELECT document, cluster, document = cluster AS keep
                FROM keys JOIN repeated USING (low, high) ORDER BY document
                """,
                work,
            )

    def apply(self, documents: pa.Table, first: int, decisions: pa.Table) -> Outcome:
        """Reject all but the first."""
        return keep_one(documents, first, decisions, self.kind, "same text as an earlier document")
