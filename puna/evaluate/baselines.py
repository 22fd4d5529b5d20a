"""What a language model has to beat: a compressor, and counting n-grams."""

import gzip
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte of `gzip -9`, each text compressed by itself."""
    original = compressed = 0
    for text in texts:
        content = text.encode()
        original += len(content)
        compressed += len(gzip.compress(content, compresslevel=9, mtime=0))
    return 8 * compressed / original


class KneserNey:
    """Interpolated Kneser-Ney n-gram model over token ids (Chen and Goodman 1999, section 4.1.6).

    The strongest of the simple counting models. The highest order counts how often an n-gram was seen; a lower one
    counts after how many different tokens it was seen, or, at the start of documents, how often.

    Args:
        documents: token ids of each training document.
        order: n; a token is predicted from the n - 1 before it, within its document.
        vocab_size: ids are below it; the lowest order is mixed with the uniform distribution over it.
    """

    def __init__(self, documents: Sequence[NDArray[np.integer]], order: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        stream, depths = _join(documents)
        self._orders = [_Order(stream, depths, n, highest=n == order) for n in range(1, order + 1)]

    def total_nats(self, documents: Sequence[NDArray[np.integer]]) -> float:
        """Negative log-likelihood of all tokens but the first of each document."""
        stream, depths = _join(documents)
        probability = np.full(len(stream), 1 / self.vocab_size)
        for order in self._orders:
            probability = order.mix(stream, depths, probability)
        return float(-np.log(probability[depths > 0]).sum())


class _Order:
    """Counts of the n-grams of one length; an n-gram is known by its 64-bit hash."""

    def __init__(self, stream: NDArray[np.uint64], depths: NDArray[np.int64], n: int, *, highest: bool) -> None:
        self.n = n
        where = np.flatnonzero(depths >= n - 1)
        grams, contexts = _hashes(stream, n)[where], _context_hashes(stream, n)[where]
        if highest:
            counted = np.arange(len(where))
        else:
            # Once for each different token before it; where no token is before it, for each occurrence.
            has_before = depths[where] >= n
            before = np.where(has_before, _hashes(stream, n + 1)[where], _scramble(where.astype(np.uint64)))
            _, counted = np.unique(before, return_index=True)
        self.grams, first, counts = np.unique(grams[counted], return_index=True, return_counts=True)
        self.counts = counts.astype(np.float64)
        self.contexts, of_context = np.unique(contexts[counted][first], return_inverse=True)
        self.totals = np.bincount(of_context, weights=self.counts)
        self.kinds = np.bincount(of_context)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        self.discount = once / (once + 2 * twice) if once else 0.5

    def mix(
        self, stream: NDArray[np.uint64], depths: NDArray[np.int64], lower: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Probability of each token given the n - 1 before it, where `lower` is the next lower order's."""
        where = np.flatnonzero(depths >= self.n - 1)
        context, known = _look_up(self.contexts, _context_hashes(stream, self.n)[where])
        where, context = where[known], context[known]
        gram, seen = _look_up(self.grams, _hashes(stream, self.n)[where])
        kept = np.zeros(len(where))
        kept[seen] = np.maximum(self.counts[gram[seen]] - self.discount, 0)
        freed = self.discount * self.kinds[context]
        mixed = lower.copy()
        mixed[where] = (kept + freed * lower[where]) / self.totals[context]
        return mixed


def _join(documents: Sequence[NDArray[np.integer]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """All tokens in one array, and the position of each in its document."""
    stream = np.concatenate([np.asarray(ids, dtype=np.uint64) for ids in documents])
    return stream, np.concatenate([np.arange(len(ids)) for ids in documents])


def _hashes(stream: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hash of the n tokens that end at each position."""
    return _scramble(_context_hashes(stream, n) * np.uint64(0x9E3779B97F4A7C15) + stream + np.uint64(1))


def _context_hashes(stream: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Hash of the n - 1 tokens before each position."""
    before = np.zeros_like(stream)
    if n > 1:
        before[1:] = _hashes(stream, n - 1)[:-1]
    return before


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _look_up(table: NDArray[np.uint64], keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Index of each key in the sorted `table`, and whether it is there."""
    index = np.searchsorted(table, keys)
    found = index < len(table)
    index[~found] = 0
    found[found] = table[index[found]] == keys[found]
    return index, found
