"""Spherical k-means, and duplicates inside its clusters."""

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Positions = NDArray[np.int64]

_ITERATIONS = 20
_BLOCK = 2048
"""Vectors compared at a time, with as many others."""


def find_centroids(vectors: Vectors, count: int, seed: int) -> Vectors:
    """Unit vectors around which the given unit vectors gather (Dhillon and Modha 2001).

    Starts from different vectors drawn at random. A cluster that loses all its members keeps its centroid.
    """
    drawn = np.random.default_rng(seed).choice(len(vectors), count, replace=False)
    centroids: Vectors = np.array(vectors[np.sort(drawn)])
    for _ in range(_ITERATIONS):
        labels, _ = nearest_centroids(vectors, centroids)
        sums = np.zeros_like(centroids)
        np.add.at(sums, labels, vectors)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        moved = np.where(lengths > 0, sums / np.maximum(lengths, np.float32(1e-12)), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def nearest_centroids(vectors: Vectors, centroids: Vectors) -> tuple[Positions, Vectors]:
    """The most similar centroid of each vector, and the cosine between them."""
    labels = np.empty(len(vectors), np.int64)
    similarities = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), _BLOCK):
        block = slice(start, start + _BLOCK)
        products = vectors[block] @ centroids.T
        labels[block], similarities[block] = products.argmax(axis=1), products.max(axis=1)
    return labels, similarities


def find_repeated(vectors: Vectors, rows: Positions, max_similarity: float) -> Positions:
    """For each row, the place in `rows` of the most similar row before it, if that is too similar, else its own.

    Args:
        vectors: unit vectors, maybe in a file.
        rows: those to compare, in the order in which they are preferred.
        max_similarity: cosine above which a vector repeats an earlier one.
    """
    sources = np.arange(len(rows))
    for start in range(0, len(rows), _BLOCK):
        later = vectors[rows[start : start + _BLOCK]]
        best = np.full(len(later), max_similarity, np.float32)
        for begin in range(0, start + 1, _BLOCK):
            products = later @ vectors[rows[begin : begin + _BLOCK]].T
            if begin == start:
                products[np.triu_indices(len(later))] = -1
            closest = products.argmax(axis=1)
            found = products.max(axis=1)
            better = found > best
            best[better] = found[better]
            sources[start : start + _BLOCK][better] = begin + closest[better]
    return sources
