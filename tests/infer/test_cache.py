"""Paged attention against a twin that goes token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.infer.cache import KVPool, PagedAttend
from puna.model.config import LlamaConfig
from puna.runtime.errors import InputError

CPU = torch.device("cpu")
HEADS, DIM, SIZE, BLOCKS = 4, 16, 4, 24


def shape(num_kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50, dim=64, num_layers=2, num_heads=HEADS, num_kv_heads=num_kv_heads, head_dim=DIM, hidden_dim=24
    )


def naive(q_THK: Tensor, keys_SGK: Tensor, values_SGK: Tensor) -> Tensor:
    """The last T of S tokens look at themselves and at what is before them, head by head."""
    num_tokens, num_slots, repeat = len(q_THK), len(keys_SGK), HEADS // keys_SGK.shape[1]
    o_THK = torch.empty_like(q_THK)
    for t in range(num_tokens):
        seen = num_slots - num_tokens + t + 1
        for head in range(HEADS):
            keys_SK, values_SK = keys_SGK[:seen, head // repeat], values_SGK[:seen, head // repeat]
            weights_S = (keys_SK @ q_THK[t, head] / DIM**0.5).softmax(0)
            o_THK[t, head] = weights_S @ values_SK
    return o_THK


pieces = st.lists(
    st.tuples(st.sampled_from((0, 0, 1, 3, 4, 9)), st.sampled_from((1, 1, 2, 5, 8))), min_size=1, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(
    pieces=pieces,
    num_kv_heads=st.sampled_from((1, 2, 4)),
    scattered=st.booleans(),
    num_padding=st.integers(0, 3),
    alone=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_naive_twin(
    pieces: list[tuple[int, int]], num_kv_heads: int, scattered: bool, num_padding: int, alone: bool, seed: int
) -> None:
    """Whatever the mix of decoding, beginnings and later pieces, and wherever the blocks lie."""
    chance = np.random.default_rng(seed)
    random = torch.Generator().manual_seed(seed)
    pieces.sort(key=lambda piece: (piece[1] > 1, piece[1] > 1 and piece[0] > 0, piece[0]))
    pool = KVPool(shape(num_kv_heads), num_blocks=BLOCKS, block_size=SIZE, device=CPU, dtype=torch.float32)
    for leftovers in (*pool.keys, *pool.values):
        leftovers.normal_(std=100, generator=random)
    free = list(chance.permutation(BLOCKS) if scattered else range(BLOCKS))
    tables = np.zeros((len(pieces), 6), dtype=np.int64)
    starts, counts = [start for start, _ in pieces], [count for _, count in pieces]
    texts = []
    for row, (start, count) in enumerate(pieces):
        blocks = [free.pop(0) for _ in range(-(-(start + count) // SIZE))]
        tables[row, : len(blocks)] = blocks
        text = torch.randn(2, start + count, num_kv_heads, DIM, generator=random)
        for position in range(start):
            place = blocks[position // SIZE], position % SIZE
            pool.keys[1][place], pool.values[1][place] = text[:, position]
        texts.append(text)
    num_tokens = sum(counts) + num_padding
    q_1NHK = torch.randn(1, num_tokens, HEADS, DIM, generator=random)
    filler = torch.randn(2, num_padding, num_kv_heads, DIM, generator=random)
    new = torch.cat([*(text[:, start:] for text, start in zip(texts, starts, strict=True)), filler], dim=1)

    attend = PagedAttend(pool, tables, starts, counts, num_padding=num_padding, alone=alone)
    with torch.inference_mode():
        o_NHK = attend(1, q_1NHK, new[:1], new[1:])[0]
    assert attend.positions_1N[0, : sum(counts)].tolist() == [s + n for s, c in pieces for n in range(c)]
    first = 0
    for text, count in zip(texts, counts, strict=True):
        expected_THK = naive(q_1NHK[0, first : first + count], *text)
        torch.testing.assert_close(o_NHK[first : first + count], expected_THK, rtol=1e-5, atol=1e-5)
        first += count


def test_too_little_memory_is_the_users_to_mend() -> None:
    with pytest.raises(InputError, match=r"cache for 1,600,000,000,000 tokens takes .* GB, more than cpu"):
        KVPool(shape(4), num_blocks=10**11, block_size=16, device=CPU, dtype=torch.float32)
