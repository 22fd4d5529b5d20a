"""Integers and their layout, against plain loops and the `compressed-tensors` package."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.compress.integers import dequantize, pack, to_int4, to_int8, unpack

SHAPES = st.tuples(st.integers(1, 19), st.integers(1, 4), st.sampled_from([32, 64, 128]), st.integers(0, 2**32))


def weights(outputs, inputs, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(outputs, inputs, generator=generator) + 0.3
    values[0] = 0
    return values.to(dtype)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_int4_is_as_good_as_plain_rounding(shape, dtype, symmetric):
    outputs, groups, size, seed = shape
    weight = weights(outputs, groups * size, seed, dtype)
    quants, scales, zeros = to_int4(weight, size, symmetric)
    assert (quants.dtype, scales.dtype, scales.shape) == (torch.int8, dtype, (outputs, groups))
    assert quants.min() >= -8
    assert quants.max() <= 7
    assert (zeros is None) == symmetric
    back = dequantize(quants, scales, zeros, torch.float32)
    for row in range(outputs):
        for group in range(groups):
            values = weight[row, group * size : (group + 1) * size].float()
            ours = back[row, group * size : (group + 1) * size]
            if symmetric:
                scale = (values.abs().max() / 7.5).to(dtype).float()
                naive = (values / scale).round().clamp(-8, 7) * scale if scale > 0 else values
            else:
                low, high = min(values.min().item(), 0), max(values.max().item(), 0)
                scale = torch.tensor((high - low) / 15).to(dtype).float()
                zero = (-8 - low / scale).round().clamp(-8, 7)
                naive = (((values / scale).round() + zero).clamp(-8, 7) - zero) * scale if scale > 0 else values
            assert (ours - values).square().sum() <= (naive - values).square().sum() * 1.0001 + 1e-9


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_int8_is_within_half_a_step(shape, dtype, by_channel):
    outputs, groups, size, seed = shape
    weight = weights(outputs, groups * size, seed, dtype)
    quants, scales = to_int8(weight, groups * size if by_channel else size)
    assert (quants.dtype, scales.dtype, scales.shape) == (torch.int8, dtype, (outputs, 1 if by_channel else groups))
    back = dequantize(quants, scales, None, torch.float32)
    # The farthest of a group may lie up to 127 times half a unit of bfloat16 off, as the scale is rounded too.
    slack = 1 / 256 * weight.float().abs() if dtype is torch.bfloat16 else 1e-6
    steps = scales.float().repeat_interleave(quants.shape[1] // scales.shape[1], dim=1)
    assert ((back - weight.float()).abs() <= steps * 0.501 + slack).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(0, 2**32))
def test_packing_is_that_of_compressed_tensors(rows, columns, seed):
    quants = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack(quants)
    assert torch.equal(unpack(packed, columns), quants)
    nibbles = packed.view(torch.uint8)
    for row in range(rows):
        for column in range(columns):
            byte = int(nibbles[row, column // 2])
            assert (byte >> 4 if column % 2 else byte & 15) - 8 == quants[row, column]
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    missing = -columns % 8
    theirs = helpers.pack_to_int32(torch.nn.functional.pad(quants, (0, missing), value=-8), 4)
    assert torch.equal(theirs, packed)
