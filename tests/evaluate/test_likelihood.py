"""Bits per byte: every token counted once, long documents in windows."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluate.answers import word_f1
from puna.evaluate.likelihood import bits_per_byte, total_nats
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer

MODEL = Transformer(
    LlamaConfig(vocab_size=17, dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, hidden_dim=24)
)
initialize(MODEL, 0)


def naive(ids: list[int], mask: list[int] | None, window: int) -> tuple[float, int]:
    """One token at a time: each is predicted in the first window of half-overlapping ones that reaches it."""
    half, nats, count = window // 2, 0.0, 0
    for t in range(1, len(ids)):
        if mask is not None and not mask[t]:
            continue
        start = 0 if t <= window else ((t - 1 - half) // half) * half
        with torch.no_grad():
            logits = MODEL(torch.tensor([ids[start:t]]))[0, -1]
        nats -= torch.log_softmax(logits, -1)[ids[t]].item()
        count += 1
    return nats, count


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=4),
    window=st.sampled_from([4, 8, 10, 64]),
    masked=st.booleans(),
)
def test_every_token_is_predicted_once(lengths: list[int], window: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    documents = [torch.randint(17, (length,), generator=generator).tolist() for length in lengths]
    masks = [[t % 3 == 0 for t in range(length)] if masked else None for length in lengths]
    pairs = list(zip(documents, masks, strict=True))
    nats, count = total_nats(MODEL, pairs, window=window, batch_rows=3)
    expected = [naive(ids, mask, window) for ids, mask in pairs]
    assert count == sum(number for _, number in expected)
    assert nats == pytest.approx(sum(part for part, _ in expected), rel=1e-5)


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_eight() -> None:
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)


def test_word_f1() -> None:
    assert word_f1("Return the SIZE.", "return the size") == 1
    assert word_f1("", "return") == 0
    assert word_f1("a b", "b c") == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(word_f1(text, "a b c d") for text in ("a b c d", "a b c", "a b", "a", "x")))
