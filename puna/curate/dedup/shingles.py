"""Shingles: runs of consecutive words, hashed; and texts with runs of words cut out."""

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from puna.curate.words import Words, scramble

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
def _cut(
    data: NDArray[np.uint8],
    offsets: Positions,
    starts: Positions,
    documents: Positions,
    removed: NDArray[np.bool_],
) -> tuple[NDArray[np.uint8], Positions]:
    kept = np.empty(offsets[-1] - offsets[0], np.uint8)
    new_offsets = np.zeros(len(offsets), np.int64)
    size = 0
    for document in range(len(offsets) - 1):
        at = offsets[document]
        keeping = True
        for word in range(documents[document], documents[document + 1]):
            if removed[word] == keeping:
                if keeping:
                    kept[size : size + starts[word] - at] = data[at : starts[word]]
                    size += starts[word] - at
                at = starts[word]
                keeping = not keeping
        if keeping:
            kept[size : size + offsets[document + 1] - at] = data[at : offsets[document + 1]]
            size += offsets[document + 1] - at
        new_offsets[document + 1] = size
    return kept[:size], new_offsets


def cut_words(words: Words, offsets: Positions, removed: NDArray[np.bool_]) -> pa.Array:
    """Texts without some of their words, each removed with what separates it from the word after it.

    Args:
        words: of the texts.
        offsets: where each text begins in `words.data`, and the end.
        removed: one for each word.
    """
    data, new_offsets = _cut(words.data, offsets, words.starts, words.documents, removed)
    buffers = [None, pa.py_buffer(new_offsets.astype(np.int64)), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_string(), len(offsets) - 1, buffers).cast(pa.string())
