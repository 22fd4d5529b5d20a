"""Texts with runs of words cut out."""

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from puna.batches.words import Words

Positions = NDArray[np.int64]


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
