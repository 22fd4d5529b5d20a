"""Near-duplicates by MinHash signatures and locality-sensitive hashing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numba import njit

from puna.batches.shingles import Hashes, Positions, hash_shingles
from puna.batches.words import hash_words, scramble, split_words
from puna.curate.dedup.clusters import connected_components
from puna.curate.dedup.database import keys_database, write_decisions
from puna.curate.dedup.outcomes import document_numbers, keep_one
from puna.curate.document import Outcome

_SIGNATURE_ROWS = 2**14
"""Candidate pairs whose signatures are compared at a time."""


@dataclass(frozen=True)
class NearDuplicates:
    """Keep the first of each cluster of similar documents (Broder 1997; Lee et al. 2022, appendix A).

    Documents are sets of shingles, runs of consecutive words without case, and with all digits alike. Two documents of
    Jaccard similarity s agree in one min-hash with probability s, in one band of hashes with s ** band_hashes, and in
    any of the bands, which makes them a candidate pair, with 1 - (1 - s ** band_hashes) ** bands. Clusters are the
    connected components of the candidate pairs. Documents shorter than a shingle are kept: see exact_duplicates.
    """

    kind: Literal["near_duplicates"] = "near_duplicates"
    """This step's name."""
    shingle_words: int = 5
    """Words in a shingle."""
    bands: int = 14
    """Bands of a signature: more find less similar documents."""
    band_hashes: int = 8
    """Min-hashes in a band: more find only more similar documents."""
    min_similarity: float = 0.0
    """Drop candidate pairs whose Jaccard similarity, as estimated from their signatures, is lower; 0 drops none.

    The pairs that are compared are those of each document with the first one of its band.
    """
    seed: int = 1
    """Draws the hash functions."""

    def __post_init__(self) -> None:
        for name in ("shingle_words", "bands", "band_hashes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.min_similarity <= 1:
            raise ValueError(f"min_similarity must be between 0 and 1, not {self.min_similarity}.")

    def keys(self, documents: pa.Table, first: int) -> pa.Table:
        """A hash of each band, and if candidates are to be verified, 32 bits of each min-hash."""
        words = split_words(documents["text"])
        shingles, offsets = hash_shingles(hash_words(words), words.documents, self.shingle_words)
        signatures = sign(shingles, offsets, *hash_functions(self.bands * self.band_hashes, self.seed))
        hashes = hash_bands(signatures, self.band_hashes)
        columns = {"document": document_numbers(documents, first)}
        columns |= {f"band_{band}": pa.array(hashes[:, band]) for band in range(self.bands)}
        if self.min_similarity:
            low = np.ascontiguousarray(signatures.astype(np.uint32))
            kind = self._schema().field("signature").type
            columns["signature"] = pa.Array.from_buffers(kind, len(low), [None, pa.py_buffer(low)])
        return pa.table(columns).filter(pa.array(np.diff(offsets) > 0))

    def decide(self, keys: Sequence[Path], work: Path, memory_bytes: int) -> None:
        """Every document of a cluster; the cluster's number is its first document's.

        Memory beyond the limit: about 40 bytes for each document that is similar to another.
        """
        with keys_database(keys, self._schema(), work, memory_bytes) as connection:
            connection.execute("CREATE TABLE candidates (document BIGINT, earlier BIGINT)")
            for band in range(self.bands):
                connection.execute(f"""
                    INSERT INTO candidates
                    WITH repeated AS (
                        SELECT band_{band}, min(document) AS earlier FROM keys
                        GROUP BY band_{band} HAVING count(*) > 1
                    )
                    SELECT document, earlier FROM keys JOIN repeated USING (band_{band}) WHERE document <> earlier
                """)
            connection.execute("CREATE TABLE pairs AS SELECT DISTINCT document, earlier FROM candidates")
            if self.min_similarity:
                connection.execute("CREATE TABLE verified (document BIGINT, earlier BIGINT)")
                signed = connection.cursor().sql("""
                    SELECT pairs.document, pairs.earlier, a.signature AS a, b.signature AS b FROM pairs
                    JOIN keys a ON a.document = pairs.document JOIN keys b ON b.document = pairs.earlier
                """)
                for batch in signed.to_arrow_reader(_SIGNATURE_ROWS):
                    a, b = (np.frombuffer(b"".join(batch[side].to_pylist()), np.uint32) for side in "ab")
                    agreement = (a == b).reshape(len(batch), -1).mean(axis=1)
                    found = batch.select(["document", "earlier"]).filter(pa.array(agreement >= self.min_similarity))
                    connection.register("found", pa.table(found))
                    connection.execute("INSERT INTO verified SELECT * FROM found")
            clusters = connected_components(connection, "verified" if self.min_similarity else "pairs")
            connection.register("clusters", clusters)
            query = "SELECT document, cluster, document = cluster AS keep FROM clusters ORDER BY document"
            write_decisions(connection, query, work)

    def apply(self, documents: pa.Table, first: int, decisions: pa.Table) -> Outcome:
        """Reject all but the first of each cluster."""
        return keep_one(documents, first, decisions, self.kind, "near-duplicate of an earlier document")

    def _schema(self) -> pa.Schema:
        fields = [("document", pa.int64()), *((f"band_{band}", pa.uint64()) for band in range(self.bands))]
        if self.min_similarity:
            fields.append(("signature", pa.binary(4 * self.bands * self.band_hashes)))
        return pa.schema(fields)


@cache
def hash_functions(count: int, seed: int) -> tuple[Hashes, Hashes]:
    """Odd multipliers and summands of `count` permutations x -> multiplier * x + summand of the 64-bit numbers."""
    drawn = np.random.default_rng(seed).integers(0, 2**64, size=(2, count), dtype=np.uint64)
    return drawn[0] | np.uint64(1), drawn[1]


@njit(cache=True, nogil=True)
def sign(shingles: Hashes, offsets: Positions, multipliers: Hashes, summands: Hashes) -> Hashes:
    """Signatures [document, hash]: the least value of each permutation over a document's shingles."""
    signatures = np.full((len(offsets) - 1, len(multipliers)), np.uint64(2**64 - 1))
    for document in range(len(offsets) - 1):
        least = signatures[document]
        for at in range(offsets[document], offsets[document + 1]):
            shingle = shingles[at]
            for number in range(len(multipliers)):
                least[number] = min(least[number], shingle * multipliers[number] + summands[number])
    return signatures


@njit(cache=True, nogil=True)
def hash_bands(signatures: Hashes, band_hashes: int) -> Hashes:
    """One hash [document, band] for each `band_hashes` consecutive hashes of a signature."""
    bands = signatures.shape[1] // band_hashes
    hashes = np.zeros((len(signatures), bands), np.uint64)
    for document in range(len(signatures)):
        for number in range(bands * band_hashes):
            band = number // band_hashes
            hashes[document, band] = scramble(hashes[document, band] ^ signatures[document, number])
    return hashes
