"""The blocks in which GGUF stores numbers: from bytes to float32 and back (ggml, ggml-common.h and ggml-quants.c).

A block holds 32 or 256 neighbours of a row as small integers, with one or more 16-bit scales. The five-bit and the `_K`
types keep parts of an integer in different places of the block; comments say where.

Shapes: N blocks, E elements of a block, S sub-blocks of 32 elements.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from puna.runtime.gguf_file import Encoding

CHUNK_ELEMENTS = 1 << 18
"""How many elements are taken at a time, so that intermediate results stay in the cache."""


def dequantize(blocks_NB: Tensor, encoding: Encoding) -> Tensor:
    """The float32 numbers that blocks stand for, shape [N, E]; F32, F16 and BF16 come in their own dtype.

    Args:
        blocks_NB: uint8 of shape [N, bytes of a block].
    """
    match encoding.name:
        case "F32":
            return _view(blocks_NB, torch.float32)
        case "F16":
            return _view(blocks_NB, torch.float16)
        case "BF16":
            return _view(blocks_NB, torch.bfloat16)
    chunk = CHUNK_ELEMENTS // encoding.block_elements
    values_NE = torch.empty(len(blocks_NB), encoding.block_elements)
    for start in range(0, len(blocks_NB), chunk):
        values_NE[start : start + chunk] = _DEQUANTIZE[encoding.name](blocks_NB[start : start + chunk])
    return values_NE


def quantize(values: Tensor, encoding: Encoding) -> Tensor:
    """The nearest blocks, uint8 of shape [N, bytes of a block].

    Args:
        values: of any shape whose last dimension is a multiple of a block's elements.
    """
    match encoding.name:
        case "F32":
            return values.float().contiguous().view(-1, 1).view(torch.uint8)
        case "F16":
            return values.to(torch.float16).contiguous().view(-1, 1).view(torch.uint8)
        case "BF16":
            return values.to(torch.bfloat16).contiguous().view(-1, 1).view(torch.uint8)
    values_NE = values.reshape(-1, encoding.block_elements)
    blocks_NB = torch.empty(len(values_NE), encoding.block_bytes, dtype=torch.uint8)
    chunk = CHUNK_ELEMENTS // encoding.block_elements
    for start in range(0, len(values_NE), chunk):
        blocks_NB[start : start + chunk] = _QUANTIZE[encoding.name](values_NE[start : start + chunk].float())
    return blocks_NB


def split_q4_0(blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of Q4_0 as integers, int32 [N, 4], packed as `puna.compress.integers.pack` does, and scales [N]."""
    packed_N4 = torch.empty(len(blocks_NB), 4, dtype=torch.int32)
    chunk = CHUNK_ELEMENTS // 32
    for start in range(0, len(blocks_NB), chunk):
        # Bytes hold elements j and 16 + j of a block; there elements 2j and 2j + 1.
        unsigned = _nibbles(blocks_NB[start : start + chunk, 2:]).view(torch.uint8)
        packed_N4[start : start + chunk] = (unsigned[:, 0::2] | unsigned[:, 1::2] << 4).view(torch.int32)
    return packed_N4, _halves(blocks_NB[:, :2]).squeeze(1)


def split_q8_0(blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks of Q8_0 as integers, int8 [N, 32], and scales [N]."""
    return _view(blocks_NB[:, 2:], torch.int8), _halves(blocks_NB[:, :2]).squeeze(1)


def _view(bytes_NB: Tensor, dtype: torch.dtype) -> Tensor:
    return bytes_NB.contiguous().view(dtype)


def _halves(bytes_NB: Tensor) -> Tensor:
    """float16 numbers, as float32."""
    return _view(bytes_NB, torch.float16).float()


def _nibbles(bytes_NB: Tensor) -> Tensor:
    """All low halves of the bytes, then all high halves; int8."""
    return torch.cat((bytes_NB & 15, bytes_NB >> 4), dim=-1).view(torch.int8)


def _fifth_bits(bits_N4: Tensor) -> Tensor:
    """Bit j of a little-endian 32-bit number for element j, at the place of the value 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (((bits_N4[..., None] >> shifts) & 1) << 4).flatten(-2).view(torch.int8)


def _q4_0(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, :2]) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, :2]) * _nibbles(blocks[:, 4:]) + _halves(blocks[:, 2:4])


def _q5_0(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, :2]) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _halves(blocks[:, :2]) * quants + _halves(blocks[:, 2:4])


def _q8_0(blocks: Tensor) -> Tensor:
    return _halves(blocks[:, :2]) * _view(blocks[:, 2:], torch.int8)


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each of the eight sub-blocks of Q4_K and Q5_K, [N, 8, 1] each.

    Sixteen 6-bit numbers in twelve bytes: the first four scales and minima in the low bits of bytes 0-3 and 4-7; of the
    last four, the low halves in the halves of bytes 8-11, and the upper two bits in the top of bytes 0-3 and 4-7.
    """
    scale_N1, minimum_N1 = _halves(blocks[:, :2]), _halves(blocks[:, 2:4])
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales_NS = torch.cat((a & 63, (c & 15) | (a >> 6 << 4)), dim=1)
    minima_NS = torch.cat((b & 63, (c >> 4) | (b >> 6 << 4)), dim=1)
    return (scale_N1 * scales_NS)[..., None], (minimum_N1 * minima_NS)[..., None]


def _k_nibbles(bytes_NB: Tensor) -> Tensor:
    """[N, 8, 32]: 32 bytes hold a sub-block in their low halves and the next one in their high halves."""
    return _nibbles(bytes_NB.reshape(-1, 4, 32)).reshape(-1, 8, 32)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _k_scales(blocks)
    return (scales * _k_nibbles(blocks[:, 16:]) - minima).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _k_scales(blocks)
    # Bit s of byte j is the fifth bit of element j of sub-block s.
    fifth = ((blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1) << 4
    return (scales * (_k_nibbles(blocks[:, 48:]) | fifth.view(torch.int8)) - minima).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    # Of each half block of 128: 64 bytes of low halves (as in _k_nibbles, with 64 in place of 32), and 32 bytes whose
    # bit pairs 0 to 3 are the upper bits of elements j, 32 + j, 64 + j, 96 + j. One scale for 16 elements.
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64))
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8)
    quants = (low | ((pairs & 3) << 4).flatten(2).view(torch.int8)) - 32
    scales = _halves(blocks[:, 208:]) * _view(blocks[:, 192:208], torch.int8)
    return (scales[..., None] * quants.reshape(-1, 16, 16)).flatten(1)


_DEQUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _pack_halves(values_NE: Tensor) -> Tensor:
    return values_NE.to(torch.float16).contiguous().view(torch.uint8)


def _to_q8_0(values_NE: Tensor) -> Tensor:
    scale_N1 = values_NE.abs().amax(1, keepdim=True) / 127
    scaled = values_NE * _inverse(scale_N1)
    quants = torch.copysign((scaled.abs() + 0.5).floor(), scaled)  # halves away from zero, as C's roundf
    return torch.cat((_pack_halves(scale_N1), quants.to(torch.int8).view(torch.uint8)), dim=1)


def _to_q4_0(values_NE: Tensor) -> Tensor:
    # The element farthest from zero becomes -8 exactly, which is why its sign is in the scale.
    farthest = values_NE.abs().argmax(1, keepdim=True)
    scale_N1 = values_NE.gather(1, farthest) / -8
    quants = (values_NE * _inverse(scale_N1) + 8.5).clamp(0, 15).to(torch.uint8)
    return torch.cat((_pack_halves(scale_N1), quants[:, :16] | quants[:, 16:] << 4), dim=1)


def _to_q4_k(values_NE: Tensor) -> Tensor:
    values_NSE = values_NE.reshape(-1, 8, 32)
    scales_NS, minima_NS = _best_scales(values_NSE)
    scale_N1 = (scales_NS.amax(1, keepdim=True) / 63).to(torch.float16)
    minimum_N1 = (minima_NS.amax(1, keepdim=True) / 63).to(torch.float16)
    scales = (scales_NS * _inverse(scale_N1.float())).round().clamp(0, 63)
    minima = (minima_NS * _inverse(minimum_N1.float())).round().clamp(0, 63)
    stored_scales, stored_minima = scales * scale_N1.float(), minima * minimum_N1.float()
    quants = ((values_NSE + stored_minima[..., None]) * _inverse(stored_scales)[..., None]).round().clamp(0, 15)
    nibbles = quants.to(torch.uint8).reshape(-1, 4, 2, 32)
    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    packed_scales = torch.cat(
        (
            s[:, :4] | s[:, 4:] >> 4 << 6,
            m[:, :4] | m[:, 4:] >> 4 << 6,
            (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ),
        dim=1,
    )
    packed = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).flatten(1)
    return torch.cat((_pack_halves(scale_N1), _pack_halves(minimum_N1), packed_scales, packed), dim=1)


def _best_scales(values_NSE: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and (negated) minimum of each sub-block, with the least squared error among a few tries.

    Each try rounds the elements on a slightly wider or narrower grid, and fits scale and minimum to what came out, by
    least squares weighted by size, as large weights matter more.
    """
    lowest = values_NSE.amin(2, keepdim=True).clamp(max=0)
    span = values_NSE.amax(2, keepdim=True) - lowest
    weight = values_NSE.square().mean(2, keepdim=True).sqrt() + values_NSE.abs()
    sum_w, sum_x = weight.sum(2, keepdim=True), (weight * values_NSE).sum(2, keepdim=True)
    best_scale, best_lowest = span / 15, lowest
    best_error = torch.full_like(lowest, torch.inf)
    for width in torch.linspace(14, 16, 11).tolist():
        quants = ((values_NSE - lowest) * _inverse(span / width)).round().clamp(0, 15)
        sum_q = (weight * quants).sum(2, keepdim=True)
        sum_qq, sum_xq = ((weight * quants * part).sum(2, keepdim=True) for part in (quants, values_NSE))
        determinant = sum_w * sum_qq - sum_q.square()
        scale = (sum_w * sum_xq - sum_x * sum_q) * _inverse(determinant)
        minimum = (sum_qq * sum_x - sum_q * sum_xq) * _inverse(determinant)
        through_zero = minimum > 0
        scale = torch.where(through_zero, sum_xq * _inverse(sum_qq), scale).clamp(min=0)
        minimum = torch.where(through_zero, 0.0, minimum)
        error = (weight * (scale * quants + minimum - values_NSE).square()).sum(2, keepdim=True)
        better = (error < best_error) & (determinant > 0)  # not where all elements are equal
        best_scale = torch.where(better, scale, best_scale)
        best_lowest = torch.where(better, minimum, best_lowest)
        best_error = torch.where(better, error, best_error)
    return best_scale.squeeze(2), -best_lowest.squeeze(2)


_QUANTIZE: dict[str, Callable[[Tensor], Tensor]] = {"Q8_0": _to_q8_0, "Q4_0": _to_q4_0, "Q4_K": _to_q4_k}
