"""Latent semantic analysis in bounded memory: documents as vectors, learnt from those documents alone.

Counts of hashed words, weighted with log(1 + count) and inverse document frequency, are projected to the directions in
which they vary most (Deerwester et al. 1990), found by subspace iteration (Halko et al. 2011, section 4.5). Texts come
close that use the same words and words of the same company, in whatever order.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from puna.batches.words import hash_words, split_words

NUM_FEATURES = 2**16
"""Words share so many counters, by their hash."""
_ITERATIONS = 4
_OVERSAMPLE = 32
"""Directions to iterate beyond those asked for: they make the others converge."""

Vectors = NDArray[np.float32]
Features = NDArray[np.uint16]
Positions = NDArray[np.int64]


def count_words(texts: pa.ChunkedArray) -> pa.Table:
    """Lists of the words that occur in each text, as numbers below `NUM_FEATURES`, and how often they do."""
    words = split_words(texts)
    features, counts, offsets = _count(hash_words(words), words.documents)
    places = pa.array(offsets.astype(np.int32))
    lists = [pa.ListArray.from_arrays(places, pa.array(values)) for values in (features, counts)]
    return pa.table(lists, names=["features", "counts"])


@njit(cache=True, nogil=True)
def _count(hashes: NDArray[np.uint64], documents: Positions) -> tuple[Features, Vectors, Positions]:
    totals = np.zeros(NUM_FEATURES, np.float32)
    features = np.empty(len(hashes), np.uint16)
    counts = np.empty(len(hashes), np.float32)
    offsets = np.zeros(len(documents), np.int64)
    size = 0
    for document in range(len(documents) - 1):
        for word in range(documents[document], documents[document + 1]):
            feature = hashes[word] & np.uint64(NUM_FEATURES - 1)
            if totals[feature] == 0:
                features[size] = feature
                size += 1
            totals[feature] += 1
        for at in range(offsets[document], size):
            counts[at] = totals[features[at]]
            totals[features[at]] = 0
        offsets[document + 1] = size
    return features[:size], counts[:size], offsets


def latent_vectors(read: Callable[[], Iterable[pa.Table]], dim: int, seed: int) -> Iterable[Vectors]:
    """A unit vector of `dim` numbers for each document, table by table.

    Args:
        read: yields tables with the columns of `count_words`, the same ones whenever it is called.
        dim: of the vectors.
        seed: where the iteration starts; another one turns all vectors and hardly moves them to each other.
    """
    occurrences = np.zeros(NUM_FEATURES)
    total = 0
    for table in read():
        features, _, offsets = _arrays(table)
        occurrences += np.bincount(features, minlength=NUM_FEATURES)
        total += len(offsets) - 1
    present = occurrences > 0
    rarity = (np.log((1 + total) / (1 + occurrences[present])) + 1).astype(np.float32)
    places = (np.cumsum(present) - 1).astype(np.uint16)

    def weighted() -> Iterator[tuple[Features, Vectors, Positions]]:
        for table in read():
            features, counts, offsets = _arrays(table)
            features = places[features]
            yield features, _weigh(features, counts, offsets, rarity), offsets

    basis = np.random.default_rng(seed).standard_normal((len(rarity), dim + _OVERSAMPLE), np.float32)
    for _ in range(_ITERATIONS):
        spread = np.zeros_like(basis)
        for features, weights, offsets in weighted():
            _spread(features, weights, offsets, _project(features, weights, offsets, basis), spread)
        basis = _orthonormal(spread)
    basis = np.ascontiguousarray(basis[:, :dim])
    for features, weights, offsets in weighted():
        vectors = _project(features, weights, offsets, basis)
        yield vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))


def _orthonormal(columns: Vectors) -> Vectors:
    """An orthonormal basis of the columns' span, the longest directions first; zeros where they do not span enough."""
    wide = columns.astype(np.float64)
    squares, turn = np.linalg.eigh(wide.T @ wide)
    squares, turn = squares[::-1], turn[:, ::-1]
    real = squares > squares[0] * 1e-10
    scale = np.zeros_like(squares)
    scale[real] = squares[real] ** -0.5
    basis: Vectors = (wide @ (turn * scale)).astype(np.float32)
    return basis


def _arrays(table: pa.Table) -> tuple[Features, Vectors, Positions]:
    features, counts = (table[name].combine_chunks() for name in ("features", "counts"))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(features.value_lengths().to_numpy())])
    return features.flatten().to_numpy(), counts.flatten().to_numpy(), offsets


@njit(cache=True, nogil=True)
def _weigh(features: Features, counts: Vectors, offsets: Positions, rarity: Vectors) -> Vectors:
    """log(1 + count) * rarity, of length one in each document."""
    weights = np.empty_like(counts)
    for document in range(len(offsets) - 1):
        square = 0.0
        for at in range(offsets[document], offsets[document + 1]):
            weights[at] = np.log1p(counts[at]) * rarity[features[at]]
            square += weights[at] * weights[at]
        for at in range(offsets[document], offsets[document + 1]):
            weights[at] /= np.sqrt(square)
    return weights


@njit(cache=True, nogil=True)
def _project(features: Features, weights: Vectors, offsets: Positions, basis: Vectors) -> Vectors:
    """The documents' weights times the basis."""
    vectors = np.zeros((len(offsets) - 1, basis.shape[1]), np.float32)
    for document in range(len(offsets) - 1):
        for at in range(offsets[document], offsets[document + 1]):
            for dim in range(basis.shape[1]):
                vectors[document, dim] += weights[at] * basis[features[at], dim]
    return vectors


@njit(cache=True, nogil=True)
def _spread(features: Features, weights: Vectors, offsets: Positions, vectors: Vectors, spread: Vectors) -> None:
    """Add the transposed weights times the vectors."""
    for document in range(len(offsets) - 1):
        for at in range(offsets[document], offsets[document + 1]):
            for dim in range(vectors.shape[1]):
                spread[features[at], dim] += weights[at] * vectors[document, dim]
