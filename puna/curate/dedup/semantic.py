"""Documents that say the same (Abbas et al. 2023, SemDeDup, arXiv:2303.09540)."""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from puna.curate.dedup.database import DECISIONS
from puna.curate.dedup.kmeans import Positions, Vectors, find_centroids, find_repeated, nearest_centroids
from puna.curate.dedup.latent import count_words, latent_vectors
from puna.curate.dedup.outcomes import document_numbers, keep_one
from puna.curate.document import Outcome
from puna.runtime.files import atomic_path

_ROWS = 4096
"""Documents read at a time."""
_CLUSTER_ROWS = 1000
"""Documents a cluster should have, where the number of clusters is not given."""


@dataclass(frozen=True)
class SemanticDuplicates:
    """Keep one of each group of documents whose vectors point in nearly the same direction.

    As in section 3 of the paper: k-means clusters, inside each cluster all pairs, and of documents that are too similar
    the one that is farthest from the centroid. Vectors come from a language model, or else from a latent semantic
    analysis of the documents themselves (`puna.curate.dedup.latent`). Similar documents in different clusters are not
    found. Memory: about 40 bytes a document beyond the limit; the vectors are in a file.
    """

    kind: Literal["semantic_duplicates"] = "semantic_duplicates"
    """This step's name."""
    max_similarity: float = 0.95
    """Cosine above which documents say the same: 1 - epsilon in the paper."""
    model: Path | None = None
    """Model directory whose mean last hidden states are the vectors; absent, latent semantic analysis."""
    max_tokens: int = 512
    """Tokens of each document that the model reads."""
    latent_dim: int = 128
    """Dimension of the vectors of latent semantic analysis."""
    clusters: int = 0
    """Clusters; 0 is one for a thousand documents."""
    keep: Literal["far", "near", "first"] = "far"
    """Which of similar documents stays: the farthest from its cluster's centroid, the nearest, or the first."""
    seed: int = 1
    """Draws the first centroids, and the first directions of latent semantic analysis."""

    def __post_init__(self) -> None:
        if not 0 < self.max_similarity < 1:
            raise ValueError(f"max_similarity must be between 0 and 1, not {self.max_similarity}.")
        if self.clusters < 0:
            raise ValueError(f"clusters must be 0 (by the number of documents) or more, not {self.clusters}.")
        for name in ("max_tokens", "latent_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def keys(self, documents: pa.Table, first: int) -> pa.Table:
        """The vector of each document that has words, or for latent semantic analysis its words."""
        numbers = document_numbers(documents, first)
        if self.model is None:
            keys = count_words(documents["text"]).add_column(0, "document", numbers)
            return keys.filter(pc.greater(pc.list_value_length(keys["features"]), 0))
        from puna.curate.dedup.embed import embed_texts

        vectors = embed_texts(self.model, documents["text"].to_pylist(), self.max_tokens)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return pa.table({"document": numbers, "vector": column}).filter(pa.array(vectors.any(axis=1)))

    def decide(self, keys: Sequence[Path], work: Path, memory_bytes: int) -> None:
        """Every document that is similar to another of its cluster; the cluster's number is that of the one kept."""
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=work, prefix="spill-") as folder:
            numbers, vectors = self._vectors(keys, Path(folder) / "vectors")
            sources = self._sources(numbers, vectors, memory_bytes)
        kept = np.zeros(len(numbers), bool)
        repeated = sources != np.arange(len(numbers))
        kept[sources[repeated]] = True
        chosen = kept | repeated
        columns = {"document": numbers[chosen], "cluster": numbers[sources[chosen]], "keep": ~repeated[chosen]}
        with atomic_path(work / DECISIONS) as path:
            pq.write_table(pa.table(columns), path)

    def apply(self, documents: pa.Table, first: int, decisions: pa.Table) -> Outcome:
        """Reject all but one of each group."""
        return keep_one(documents, first, decisions, self.kind, "says the same as another document")

    def _vectors(self, keys: Sequence[Path], file: Path) -> tuple[NDArray[np.int64], Vectors]:
        """The documents' numbers, and their vectors in a file."""
        numbers = [pq.read_table(path, columns=["document"])["document"].to_numpy() for path in keys]
        dim = 0
        with file.open("wb") as out:
            if self.model is None:
                found = latent_vectors(lambda: _tables(keys), self.latent_dim, self.seed)
            else:
                found = (_matrix(table["vector"]) for table in _tables(keys))
            for block in found:
                dim = block.shape[1]
                out.write(block.astype(np.float32).tobytes())
        if not dim:
            return np.zeros(0, np.int64), np.zeros((0, 1), np.float32)
        return np.concatenate(numbers), np.memmap(file, np.float32, "r").reshape(-1, dim)

    def _sources(self, numbers: NDArray[np.int64], vectors: Vectors, memory_bytes: int) -> Positions:
        """For each document the row of the one that is kept in its place, its own if it is kept."""
        sources = np.arange(len(numbers))
        if not len(numbers):
            return sources
        count = min(self.clusters or -(-len(numbers) // _CLUSTER_ROWS), len(numbers))
        room = max(memory_bytes // (8 * vectors.shape[1]), count)
        sample = vectors[np.linspace(0, len(numbers) - 1, min(room, len(numbers))).astype(np.int64)]
        labels, similarities = nearest_centroids(vectors, find_centroids(sample, count, self.seed))
        preference = {"far": similarities, "near": -similarities, "first": np.zeros_like(similarities)}[self.keep]
        order = np.lexsort((numbers, preference, labels))
        bounds = np.searchsorted(labels[order], np.arange(count + 1))
        for start, stop in itertools.pairwise(bounds):
            rows = order[start:stop]
            places = find_repeated(vectors, rows, self.max_similarity)
            for place, source in enumerate(places):
                sources[rows[place]] = sources[rows[source]]  # Sources come first, so theirs are final.
        return sources


def _tables(keys: Sequence[Path]) -> Iterator[pa.Table]:
    """The rows of all files in tables of `_ROWS`, however they are spread over the files."""
    held: list[pa.RecordBatch] = []
    for path in keys:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS):
                held.append(batch)
                table = pa.Table.from_batches(held)
                while len(table) >= _ROWS:
                    yield table.slice(0, _ROWS)
                    table = table.slice(_ROWS)
                held = table.to_batches()
    if held:
        yield pa.Table.from_batches(held)


def _matrix(column: pa.ChunkedArray) -> Vectors:
    lists = column.combine_chunks()
    matrix: Vectors = lists.flatten().to_numpy().reshape(len(lists), -1)
    return matrix
