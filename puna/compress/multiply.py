"""Activations times quantised weights: the seam where kernels are plugged in.

Each way of multiplying says which inputs it takes; the first that takes them does it. `dequantized` takes all, and says
what is right.

Shapes: M tokens, N outputs, K inputs, G groups of inputs.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.kernels.forward import NativeMap, applicable
from puna.kernels.forward import multiply as native_product

if TYPE_CHECKING:
    from puna.compress.linear import QuantizedLinear

_PACK_KERNEL_ROWS = 16
"""torch's kernels for packed weights are made for few tokens; above this dequantising once is faster."""


class Way(NamedTuple):
    """One way to multiply."""

    takes: Callable[[Tensor, "QuantizedLinear"], bool]
    """Whether it takes these inputs; called at every multiplication."""
    multiply: Callable[[Tensor, "QuantizedLinear"], Tensor]
    """x_MK to y_MN, without the bias. It may keep the weights in an order of its own in `layer.repacked`."""


def multiply(x: Tensor, layer: "QuantizedLinear") -> Tensor:
    """x W^T by the fastest way there is, for `x` of any shape [..., K]."""
    x_MK = x.reshape(-1, layer.in_features)
    way = next(way for way in WAYS if way.takes(x_MK, layer))
    return way.multiply(x_MK, layer).view(*x.shape[:-1], layer.out_features)


def dequantized(x_MK: Tensor, layer: "QuantizedLinear") -> Tensor:
    """The readable twin of all: the weights as floats, and the activations rounded if the scheme says so."""
    if layer.quantization.activations == "int8":
        quants_MK, scale_M1 = round_activations(x_MK)
        return F.linear(quants_MK.double() * scale_M1, layer.dequantize(torch.float64)).to(x_MK.dtype)
    return F.linear(x_MK, layer.dequantize(x_MK.dtype))


def round_activations(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of shape [M, K], and a float32 scale for each token, [M, 1]."""
    wide_MK = x_MK.float()
    scale_M1 = wide_MK.abs().amax(1, keepdim=True) / 127
    safe_M1 = torch.where(scale_M1 == 0, torch.ones_like(scale_M1), scale_M1)
    return (wide_MK / safe_M1).round().to(torch.int8), scale_M1


def native_map(layer: "QuantizedLinear") -> NativeMap | None:
    """The layer as the native kernels read it, without its bias; None where they do not."""
    if "native" not in layer.repacked:
        quantization = layer.quantization
        weights = layer.weight_int8 if quantization.kind == "int8" else layer.weight_packed
        rounds = quantization.activations == "int8" and quantization.symmetric
        readable = rounds and applicable(weights, layer.weight_scale)
        layer.repacked["native"] = NativeMap(weights, layer.weight_scale) if readable else None
    found: NativeMap | None = layer.repacked["native"]
    return found


def _native_product(x_MK: Tensor, layer: "QuantizedLinear") -> Tensor:
    weights = native_map(layer)
    assert weights is not None
    return native_product(x_MK, weights).to(x_MK.dtype)


def _int8_product(x_MK: Tensor, layer: "QuantizedLinear") -> Tensor:
    quants_MK, scale_M1 = round_activations(x_MK)
    exact_MN = torch._int_mm(quants_MK, layer.integers().T)
    return (exact_MN * scale_M1 * layer.weight_scale.T).to(x_MK.dtype)


def _int8_packed(x_MK: Tensor, layer: "QuantizedLinear") -> Tensor:
    scale_N = layer.weight_scale.flatten().to(x_MK.dtype)
    product: Tensor = torch._weight_int8pack_mm(x_MK, layer.integers(), scale_N)
    return product


def _int4_packed(x_MK: Tensor, layer: "QuantizedLinear") -> Tensor:
    if "torch_int4" not in layer.repacked:
        unsigned = layer.integers().int() + 8
        # torch's kernel means (q + 8 - 8) * scale + offset.
        scales_GN = layer.weight_scale.T.float()
        zeros = layer.zero_points()
        offsets_GN = torch.zeros_like(scales_GN) if zeros is None else -zeros.T * scales_GN
        pairs_GN2 = torch.stack((scales_GN, offsets_GN), dim=-1).to(torch.bfloat16).contiguous()
        layer.repacked["torch_int4"] = (torch._convert_weight_to_int4pack_for_cpu(unsigned, 1), pairs_GN2)
    weight, pairs_GN2 = layer.repacked["torch_int4"]
    group_size = layer.in_features // layer.weight_scale.shape[1]
    product: Tensor = torch._weight_int4pack_mm_for_cpu(x_MK, weight, group_size, pairs_GN2)
    return product


def _on_cpu(x_MK: Tensor, layer: "QuantizedLinear", kind: str, activations: str) -> bool:
    quantization = layer.quantization
    return x_MK.device.type == "cpu" and (quantization.kind, quantization.activations) == (kind, activations)


def _few_bfloat16(x_MK: Tensor) -> bool:
    # In float32 these kernels are plain loops, slower than dequantising.
    return x_MK.dtype is torch.bfloat16 and len(x_MK) <= _PACK_KERNEL_ROWS


def _by_channel(layer: "QuantizedLinear") -> bool:
    return layer.quantization.inputs_per_scale is None


def _whole_tiles(layer: "QuantizedLinear") -> bool:
    return layer.out_features % 16 == 0


WAYS = (
    Way(lambda x, layer: native_map(layer) is not None, _native_product),
    Way(lambda x, layer: _on_cpu(x, layer, "int8", "int8") and _by_channel(layer), _int8_product),
    Way(lambda x, layer: _few_bfloat16(x) and _on_cpu(x, layer, "int8", "float") and _by_channel(layer), _int8_packed),
    Way(lambda x, layer: _few_bfloat16(x) and _on_cpu(x, layer, "int4", "float") and _whole_tiles(layer), _int4_packed),
    Way(lambda x, layer: True, dequantized),
)
