"""Weights to integers and back.

Four-bit integers q in [-8, 7] are stored as q + 8, two in a byte, the first in its low half; this is the layout of
`compressed-tensors`, which counts the bytes in fours.

Shapes: N outputs, K inputs, G groups of inputs, S inputs of a group.
"""

import torch
from torch import Tensor

_ROWS = 1024
"""Outputs taken at a time, to bound the memory of intermediate results."""

_WIDTHS = torch.linspace(1.0, 0.7, 13).tolist()
"""Parts of the range of a group that are tried for its scale: cutting off the farthest may suit the others better."""


def to_int8(weight_NK: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 of shape [N, K], and scales [N, G] in the weight's dtype; the farthest of a group becomes 127."""
    values_NGS = weight_NK.view(len(weight_NK), -1, group_size)
    scale_NG1 = _not_zero((values_NGS.abs().amax(2, keepdim=True).float() / 127).to(weight_NK.dtype))
    quants_NGS = (values_NGS.float() / scale_NG1.float()).round().clamp(-127, 127).to(torch.int8)
    return quants_NGS.view(weight_NK.shape), scale_NG1.squeeze(2)


def to_int4(weight_NK: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 of shape [N, K] in [-8, 7], scales [N, G] in the weight's dtype, and zero points [N, G] (None if symmetric).

    Of several scales, the one with the least squared error is taken for each group.
    """
    parts = [_to_int4(rows, group_size, symmetric) for rows in torch.split(weight_NK, _ROWS)]
    quants, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    return quants, scales, None if symmetric else zeros


def _to_int4(weight_NK: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    values_NGS = weight_NK.float().view(len(weight_NK), -1, group_size)
    lowest = values_NGS.amin(2, keepdim=True).clamp(max=0)
    highest = values_NGS.amax(2, keepdim=True).clamp(min=0)
    full = torch.maximum(highest, -lowest) / 7.5 if symmetric else (highest - lowest) / 15
    best_error = torch.full_like(full, torch.inf)
    best_scale, best_zero = torch.ones_like(full), torch.zeros_like(full)
    best_quants = torch.zeros_like(values_NGS)
    for width in _WIDTHS:
        scale = _not_zero((full * width).to(weight_NK.dtype)).float()
        zero = torch.zeros_like(full) if symmetric else (-8 - width * lowest / scale).round().clamp(-8, 7)
        quants = ((values_NGS / scale).round() + zero).clamp(-8, 7)
        error = ((quants - zero) * scale - values_NGS).square().sum(2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best_quants = torch.where(better, quants, best_quants)
    scales_NG, zeros_NG = best_scale.squeeze(2).to(weight_NK.dtype), best_zero.squeeze(2).to(torch.int8)
    return best_quants.view(weight_NK.shape).to(torch.int8), scales_NG, zeros_NG


def _not_zero(scale: Tensor) -> Tensor:
    """A scale for a group of zeros: any will do."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def dequantize(quants_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weights that integers stand for, [N, K]."""
    values_NGS = quants_NK.to(dtype).view(*scales_NG.shape, -1)
    if zeros_NG is not None:
        values_NGS = values_NGS - zeros_NG.to(dtype)[..., None]
    return (values_NGS * scales_NG.to(dtype)[..., None]).view(quants_NK.shape)


def pack(quants_NK: Tensor) -> Tensor:
    """Integers in [-8, 7] as int32 of shape [N, ceil(K / 8)]; the rest of the last one stands for -8."""
    missing = -quants_NK.shape[1] % 8
    unsigned = torch.nn.functional.pad((quants_NK + 8).to(torch.uint8), (0, missing))
    nibbles = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return nibbles.flatten().view(torch.int32).view(len(quants_NK), -1)


def unpack(packed: Tensor, num_inputs: int) -> Tensor:
    """The inverse of `pack`: int8 of shape [N, K]."""
    halves = packed.flatten().view(torch.uint8).view(len(packed), -1)
    unsigned = torch.stack((halves & 15, halves >> 4), dim=-1).flatten(-2)[:, :num_inputs]
    return unsigned.view(torch.int8) - 8
