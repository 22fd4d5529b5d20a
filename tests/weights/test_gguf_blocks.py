"""Blocks of numbers against the `gguf` package, both ways."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.runtime.gguf_file import BY_NAME
from puna.weights.gguf_blocks import CHUNK_ELEMENTS, dequantize, quantize

gguf = pytest.importorskip("gguf")

# float16 scales of random bytes may be infinite or not a number; both sides have to agree on these too.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


def same(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    return np.array_equal(ours.float().numpy().ravel(), theirs.astype(np.float32).ravel(), equal_nan=True)


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(1, 40))
def test_any_bytes_mean_what_they_mean_to_gguf(name, seed, num_blocks):
    encoding = BY_NAME[name]
    blocks = np.random.default_rng(seed).integers(0, 256, (num_blocks, encoding.block_bytes), dtype=np.uint8)
    ours = dequantize(torch.from_numpy(blocks), encoding)
    assert ours.shape == (num_blocks, encoding.block_elements)
    assert same(ours, gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([0.0, 1e-6, 0.02, 1.0, 300.0]), rounded=st.booleans())
def test_the_same_bytes_as_gguf_writes(name, seed, scale, rounded):
    values = np.random.default_rng(seed).standard_normal((6, 256), dtype=np.float32) * scale
    if rounded:  # ties, and several elements equally far from zero
        values = np.round(values * 4) / 4
    ours = quantize(torch.from_numpy(values), BY_NAME[name])
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    assert ours.numpy().tobytes() == theirs.tobytes()


def test_q4_k_is_nearer_than_q4_0_and_than_plain_rounding():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 1024, generator=generator)

    def error(name):
        back = dequantize(quantize(values, BY_NAME[name]), BY_NAME[name]).view_as(values)
        return ((back - values).square().mean() / values.square().mean()).sqrt().item()

    lowest, highest = (getattr(values.view(-1, 32), f"a{end}")(1, keepdim=True) for end in ("min", "max"))
    step = (highest - lowest) / 15
    plain = (((values.view(-1, 32) - lowest) / step).round() * step + lowest).view_as(values)
    plain_error = ((plain - values).square().mean() / values.square().mean()).sqrt().item()
    assert error("Q8_0") < 0.006
    assert error("Q4_K") < 0.073 < plain_error
    assert error("Q4_K") < error("Q4_0") < 0.09


@pytest.mark.parametrize("values", [torch.zeros(256), torch.full((256,), 3.0), torch.full((256,), -3.0)])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K"])
def test_constant_blocks(name, values):
    back = dequantize(quantize(values, BY_NAME[name]), BY_NAME[name]).view(-1)
    torch.testing.assert_close(back, values, rtol=0.003, atol=0)


def test_the_extremes_survive_and_chunks_do_not_show():
    values = torch.randn(2 * CHUNK_ELEMENTS // 256 + 3, 256, generator=torch.Generator().manual_seed(1))
    for name in ("Q8_0", "Q4_0", "Q4_K"):
        whole = quantize(values, BY_NAME[name])
        last = quantize(values[-3:], BY_NAME[name])
        assert torch.equal(whole[-len(last) :], last)
        assert torch.equal(dequantize(whole, BY_NAME[name])[-len(last) :], dequantize(last, BY_NAME[name]))
