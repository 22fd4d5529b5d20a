"""Shingles: runs of consecutive words, hashed; and sets of them, to look others up in."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from puna.batches.words import scramble

Hashes = NDArray[np.uint64]
Positions = NDArray[np.int64]

_BASE = 0x5851F42D4C957F2D  # 5 modulo 8: of maximal order among the powers modulo 2**64


@njit(cache=True, nogil=True)
def hash_shingles(hashes: Hashes, documents: Positions, length: int) -> tuple[Hashes, Positions]:
    """Hashes of all runs of `length` words inside each document, as a rolling polynomial modulo 2**64, scrambled.

    Args:
        hashes: one for each word.
        documents: document d has words [documents[d], documents[d+1]).
        length: words a shingle.

    Returns:
        hashes of the shingles in order of their first word, and where each document's begin; a document of fewer
        words has none.
    """
    base = np.uint64(_BASE)
    leading = np.uint64(1)
    for _ in range(length - 1):
        leading *= base
    offsets = np.zeros(len(documents), np.int64)
    for document in range(len(documents) - 1):
        words = documents[document + 1] - documents[document]
        offsets[document + 1] = offsets[document] + max(words - length + 1, 0)
    shingles = np.empty(offsets[-1], np.uint64)
    for document in range(len(documents) - 1):
        if offsets[document] == offsets[document + 1]:
            continue
        at = documents[document]
        value = np.uint64(0)
        for word in range(at, at + length - 1):
            value = value * base + hashes[word]
        for shingle in range(offsets[document], offsets[document + 1]):
            value = value * base + hashes[at + length - 1]
            shingles[shingle] = scramble(value)
            value -= leading * hashes[at]
            at += 1
    return shingles, offsets


@njit(cache=True, nogil=True)
def build_set(values: Hashes) -> Hashes:
    """Open-addressing hash table of different values, at most half full; 0 marks a free slot."""
    size = 2
    while size < 2 * len(values) + 2:
        size *= 2
    table = np.zeros(size, np.uint64)
    for value in values:
        slot = value & np.uint64(size - 1)
        while table[slot] != 0:
            slot = (slot + np.uint64(1)) & np.uint64(size - 1)
        table[slot] = value
    return table


@njit(cache=True, nogil=True)
def contained(values: Hashes, table: Hashes) -> NDArray[np.bool_]:
    """Which of the values are in the table."""
    found = np.zeros(len(values), np.bool_)
    mask = np.uint64(len(table) - 1)
    for at in range(len(values)):
        slot = values[at] & mask
        while table[slot] != 0 and table[slot] != values[at]:
            slot = (slot + np.uint64(1)) & mask
        found[at] = table[slot] == values[at] and values[at] != 0
    return found
