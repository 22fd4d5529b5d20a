"""The native products against plain ones in float64, at every instruction set of this machine."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.compress.integers import dequantize, pack, to_int4, to_int8
from puna.compress.multiply import round_activations
from puna.kernels import forward, loader
from puna.kernels.forward import NativeMap, applicable, multiply

pytestmark = pytest.mark.skipif(loader.native_library() is None, reason="installed without a C++ compiler")

LEVELS = range(loader.level() + 1 if loader.native_library() else 0)


def native_and_twin(weight_NK, x_MK, bits, group, scales_dtype, bias):
    """A map of the kernels, and what it should give, in float64."""
    if bits == 32:
        stored = NativeMap(weight_NK.to(scales_dtype), None, bias)
        return stored, x_MK.double() @ stored.weights.double().T + bias.double()
    quants_MK, scale_M1 = round_activations(x_MK)
    if bits == 8:
        quants_NK, scales = to_int8(weight_NK.to(scales_dtype), group)
        stored, weight = NativeMap(quants_NK, scales, bias), dequantize(quants_NK, scales, None, torch.float64)
    else:
        quants_NK, scales, _ = to_int4(weight_NK.to(scales_dtype), group, symmetric=True)
        stored, weight = NativeMap(pack(quants_NK), scales, bias), dequantize(quants_NK, scales, None, torch.float64)
    return stored, (quants_MK.double() * scale_M1.double()) @ weight.T + bias.double()


@pytest.mark.parametrize("level", LEVELS)
@given(
    rows=st.integers(1, 21),
    outputs=st.integers(1, 110),
    units=st.sampled_from([1, 2, 3, 5, 8, 17]),
    form=st.sampled_from([(32, None), (8, None), (8, 32), (4, 32), (4, 64), (4, 128)]),
    scales_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_products_of_any_size(level, rows, outputs, units, form, scales_dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = 128 * units
    weight_NK = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    x_MK = torch.randn(rows, inputs, generator=generator) * torch.rand(rows, 1, generator=generator) * 10
    bias = torch.randn(outputs, generator=generator)
    bits, group = form
    stored, expected = native_and_twin(weight_NK, x_MK, bits, group or inputs, scales_dtype, bias)
    assert applicable(stored.weights, stored.scales)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "level", lambda: level)
        y_MN = multiply(x_MK, stored)
    # Integers are exact; the rest is sums of some hundred products of order one in float32.
    torch.testing.assert_close(y_MN.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_extremes_of_integers_do_not_overflow(level, monkeypatch):
    monkeypatch.setattr(forward, "level", lambda: level)
    inputs = 16384
    weights = torch.full((5, inputs), -127, dtype=torch.int8)
    weights[1] = 127
    x_MK = torch.ones(6, inputs)
    x_MK[1] = -1
    x_MK[2] = 0
    y_MN = multiply(x_MK, NativeMap(weights, torch.ones(5, 1)))
    torch.testing.assert_close(y_MN[:, 0], torch.tensor([-1.0, 1, 0, -1, -1, -1]) * 127 * inputs)
    torch.testing.assert_close(y_MN[:, 1], -y_MN[:, 0])


def test_what_the_kernels_do_not_read():
    assert not applicable(torch.zeros(4, 130))
    assert not applicable(torch.zeros(4, 128, dtype=torch.float16))
    assert not applicable(torch.zeros(128, 4).T)
    assert not applicable(torch.zeros(4, 128, dtype=torch.int8), torch.ones(4, 1, dtype=torch.float16))
    assert not applicable(torch.zeros(4, 128, dtype=torch.int8), torch.ones(4, 2))
    assert not applicable(torch.zeros(4, 32, dtype=torch.int32), torch.ones(4, 1))
    assert multiply(torch.zeros(0, 128), NativeMap(torch.zeros(3, 128))).shape == (0, 3)
