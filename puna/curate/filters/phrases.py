"""Fixed phrases in UTF-8 bytes, many at once, without regard to the case of ASCII letters."""

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from puna.batches.words import Bytes


class Phrases(NamedTuple):
    """Phrase p is bytes [starts[p], starts[p+1]) of `data`; phrases are in order of their first byte."""

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    groups: NDArray[np.uint64]
    """Phrase p is of the group whose bit this is."""
    first: NDArray[np.int64]
    """Phrases that begin with byte b are those from first[b] to first[b+1]."""


@cache
def compile_phrases(groups: tuple[tuple[str, ...], ...]) -> Phrases:
    """Make groups of phrases (64 groups at most) ready for `find_phrases`."""
    pairs = sorted((phrase.lower().encode(), number) for number, group in enumerate(groups) for phrase in group)
    lengths = [len(phrase) for phrase, _ in pairs]
    return Phrases(
        np.frombuffer(b"".join(phrase for phrase, _ in pairs), np.uint8),
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        np.array([1 << number for _, number in pairs], np.uint64),
        np.searchsorted([phrase[0] for phrase, _ in pairs], np.arange(257)).astype(np.int64),
    )


@njit(cache=True, nogil=True)
def find_phrases(data: Bytes, start: int, end: int, phrases: Phrases) -> np.uint64:
    """Bits of the groups of which a phrase occurs in bytes [start, end)."""
    found = np.uint64(0)
    for at in range(start, end):
        byte = _lower(data[at])
        for phrase in range(phrases.first[byte], phrases.first[byte + 1]):
            if found & phrases.groups[phrase]:
                continue
            first = phrases.starts[phrase]
            length = phrases.starts[phrase + 1] - first
            if at + length > end:
                continue
            same = 1
            while same < length and _lower(data[at + same]) == phrases.data[first + same]:
                same += 1
            if same == length:
                found |= phrases.groups[phrase]
    return found


@njit(cache=True, nogil=True, inline="always")
def _lower(byte: int) -> int:
    return byte + 0x20 if 0x41 <= byte <= 0x5A else byte
