"""The n-gram model against a dictionary-based twin, and what a compressor gives."""

import gzip
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluate.baselines import KneserNey, gzip_bits_per_byte

DOCUMENTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=5)


class NaiveKneserNey:
    """The readable twin: one dictionary an order, as in Chen and Goodman."""

    def __init__(self, documents: list[list[int]], order: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.counts: list[Counter[tuple[int, ...]]] = []
        for n in range(1, order + 1):
            counts: Counter[tuple[int, ...]] = Counter()
            before: dict[tuple[int, ...], set[int]] = defaultdict(set)
            for ids in documents:
                for end in range(n, len(ids) + 1):
                    gram = tuple(ids[end - n : end])
                    if n == order or end == n:
                        counts[gram] += 1
                    else:
                        before[gram].add(ids[end - n - 1])
            for gram, tokens in before.items():
                counts[gram] += len(tokens)
            self.counts.append(counts)

    def probability(self, context: list[int], token: int) -> float:
        result = 1 / self.vocab_size
        for n, counts in enumerate(self.counts, start=1):
            if n - 1 > len(context):
                break
            history = tuple(context[len(context) - n + 1 :])
            following = {gram: count for gram, count in counts.items() if gram[:-1] == history}
            if not following:
                continue
            once = sum(count == 1 for count in counts.values())
            twice = sum(count == 2 for count in counts.values())
            discount = once / (once + 2 * twice) if once else 0.5
            kept = max(counts[(*history, token)] - discount, 0)
            result = (kept + discount * len(following) * result) / sum(following.values())
        return result


@settings(max_examples=60, deadline=None)
@given(train=DOCUMENTS, test=DOCUMENTS, order=st.integers(1, 4))
def test_equals_the_naive_twin(train: list[list[int]], test: list[list[int]], order: int) -> None:
    twin = NaiveKneserNey(train, order, vocab_size=4)
    expected = -sum(math.log(twin.probability(ids[:t], ids[t])) for ids in test for t in range(1, len(ids)))
    ours = KneserNey([np.array(ids) for ids in train], order, vocab_size=4)
    assert ours.total_nats([np.array(ids) for ids in test]) == pytest.approx(expected, rel=1e-9)


def test_probabilities_sum_to_one() -> None:
    generator = np.random.default_rng(0)
    model = KneserNey([generator.integers(0, 6, 80)], 3, vocab_size=6)
    for context in ([0], [5, 1], [2, 2, 2, 2]):
        before = model.total_nats([np.array(context)])
        total = sum(math.exp(before - model.total_nats([np.array([*context, token])])) for token in range(6))
        assert total == pytest.approx(1)


def test_gzip_counts_bytes() -> None:
    text = "llama " * 100
    assert gzip_bits_per_byte([text]) == 8 * len(gzip.compress(text.encode(), 9, mtime=0)) / 600
