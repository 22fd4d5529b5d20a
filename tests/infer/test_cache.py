"""The cache against a forward that sees everything at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.infer.cache import CachedAttend, KVCache
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError

CPU = torch.device("cpu")


def tiny(num_kv_heads: int) -> Transformer:
    config = LlamaConfig(
        vocab_size=50, dim=16, num_layers=2, num_heads=4, num_kv_heads=num_kv_heads, head_dim=4, hidden_dim=24
    )
    model = Transformer(config)
    initialize(model, seed=0)
    return model


MODELS = {groups: tiny(groups) for groups in (1, 2, 4)}


@torch.inference_mode()
@settings(max_examples=60, deadline=None)
@given(
    num_kv_heads=st.sampled_from((1, 2, 4)),
    prefills=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    chunks=st.lists(st.integers(1, 4), max_size=4),
    first_row=st.integers(0, 1),
    seed=st.integers(0, 2**31),
)
def test_any_chunks_equal_one_forward(
    num_kv_heads: int, prefills: list[int], chunks: list[int], first_row: int, seed: int
) -> None:
    """Right-padded prefill of unequal lengths, then chunks at each row's own position, over leftovers."""
    model = MODELS[num_kv_heads]
    random = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(50, (len(prefills), max(prefills) + sum(chunks)), generator=random)
    expected_BTV = model(ids_BT)
    cache = KVCache(model.config, rows=5, slots=32, device=CPU, dtype=torch.float32)
    for leftovers in (*cache.keys, *cache.values):
        leftovers.normal_(std=100, generator=random)

    attend = CachedAttend(cache, first_row, [0] * len(prefills), max(prefills))
    got_BTV = model(ids_BT[:, : max(prefills)], attend.positions_BT, attend)
    for row, length in enumerate(prefills):
        torch.testing.assert_close(got_BTV[row, :length], expected_BTV[row, :length], rtol=1e-5, atol=1e-5)

    lengths = list(prefills)
    for num_tokens in chunks:
        attend = CachedAttend(cache, first_row, lengths, num_tokens)
        got_BTV = model(ids_BT.gather(1, attend.positions_BT), attend.positions_BT, attend)
        for row, length in enumerate(lengths):
            want_TV = expected_BTV[row, length : length + num_tokens]
            torch.testing.assert_close(got_BTV[row], want_TV, rtol=1e-5, atol=1e-5)
            lengths[row] += num_tokens


def test_moved_row_holds_the_same_tokens() -> None:
    cache = KVCache(MODELS[2].config, rows=3, slots=4, device=CPU, dtype=torch.float32)
    for cached in (*cache.keys, *cache.values):
        cached.normal_()
    cache.move(2, 0, 3)
    for cached in (*cache.keys, *cache.values):
        assert cached[0, :3].equal(cached[2, :3])
        assert not cached[0, 3].equal(cached[2, 3])


def test_too_little_memory_is_the_users_to_mend() -> None:
    with pytest.raises(InputError, match=r"cache for 8 sequences of 1000000000000 tokens takes .* GB, more than cpu"):
        KVCache(MODELS[4].config, rows=8, slots=10**12, device=CPU, dtype=torch.float32)
