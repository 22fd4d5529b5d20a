"""The layers by native kernels against the model's own forward over the same kind of cache."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.compress.apply import quantize
from puna.compress.quantization import Quantization
from puna.infer.cache import KVPool, PagedAttend
from puna.infer.native import NativeForward
from puna.kernels import forward, loader
from puna.model.config import LlamaConfig, RopeScaling
from puna.model.initialize import initialize
from puna.model.transformer import Transformer

pytestmark = pytest.mark.skipif(loader.native_library() is None, reason="installed without a C++ compiler")

CPU = torch.device("cpu")
FORMS = {
    "float": None,
    "int8": Quantization("int8", activations="int8"),
    "int4": Quantization("int4", group_size=32, activations="int8"),
}


def build(form, *, seed=0, **shape):
    config = LlamaConfig(
        vocab_size=64,
        dim=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        hidden_dim=256,
        context_length=128,
        **shape,
    )
    model = Transformer(config)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases: not all ones and zeros
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    if FORMS[form] is not None:
        quantize(model, FORMS[form])
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", range(loader.level() + 1 if loader.native_library() else 0))
@given(
    before=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    new=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    qwen=st.booleans(),
    padding=st.integers(0, 2),
)
@settings(max_examples=8, deadline=None)
@torch.inference_mode()
def test_hidden_states_are_the_models(form, level, before, new, qwen, padding):
    scaling = None if qwen else RopeScaling("llama3", 4.0, original_context_length=32)
    model = build(form, qkv_bias=qwen, qk_norm=qwen, rope_scaling=scaling)
    pools = [KVPool(model.config, num_blocks=60, block_size=4, device=CPU, dtype=torch.float32) for _ in range(2)]
    native = NativeForward.of(model, pools[1], 64)
    assert native is not None
    tables = np.random.default_rng(0).permutation(60)[: 13 * len(before)].reshape(len(before), 13)
    ids = torch.arange(1, 200) % 63

    def both(starts, counts):
        chosen = ids[: sum(counts) + padding].tolist()
        attend = PagedAttend(pools[0], rows, starts, counts, num_padding=padding)
        expected = model(torch.tensor([chosen]), attend.positions_1N, attend, lambda h_1ND, output: h_1ND)
        computed = native(chosen, rows, starts, counts)
        error = (computed - expected)[:, : sum(counts)].abs()
        # Float32 sums in another order. Where activations are rounded to integers, some fall to the other side then.
        assert error.max() < (1e-4 if form == "float" else 0.2)
        assert error.mean() < (1e-5 if form == "float" else 0.01)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "level", lambda: level)
        rows = tables[[i for i, count in enumerate(before) if count]]
        if len(rows):
            both([0] * len(rows), [count for count in before if count])
        rows = tables
        both(before, new[: len(before)])


@torch.inference_mode()
def test_a_change_of_weights_in_place_is_seen():
    model = build("float")
    pool = KVPool(model.config, num_blocks=4, block_size=4, device=CPU, dtype=torch.float32)
    native = NativeForward.of(model, pool, 16)
    assert native is not None
    table = np.array([[0, 1, 2, 3]])
    before = native([1, 2, 3], table, [0], [3]).clone()
    model.load_state_dict(build("float", seed=1).state_dict())
    after = native([1, 2, 3], table, [0], [3]).clone()
    assert not torch.equal(before, after)
    fresh = NativeForward.of(model, pool, 16)
    assert fresh is not None
    torch.testing.assert_close(after, fresh([1, 2, 3], table, [0], [3]), rtol=0, atol=0)


def test_where_it_does_not_apply():
    pool = KVPool(build("float").config, num_blocks=4, block_size=4, device=CPU, dtype=torch.float32)
    model = build("float")
    model.layers[1].feed_forward.up = torch.nn.Linear(128, 256, bias=False)  # of another class, as an adapter's
    assert NativeForward.of(model, pool, 16) is None
    half = KVPool(model.config, num_blocks=4, block_size=4, device=CPU, dtype=torch.float16)
    assert NativeForward.of(build("float"), half, 16) is None
