"""A linear map whose weights are integers.

Its buffers are named and laid out as `compressed-tensors` stores them, so that a model directory is read and written
without knowing more than their names.

Shapes: N outputs, K inputs, G groups of inputs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from puna.compress.integers import dequantize, pack, to_int4, to_int8, unpack
from puna.compress.multiply import multiply
from puna.compress.quantization import Quantization


class QuantizedLinear(nn.Module):
    """Takes the place of a `Linear`.

    Buffers come uninitialised: use `from_linear`, or load them.

    Attributes:
        weight_int8: int8 [N, K]; with int8 only.
        weight_packed: int32 [N, K / 8], see `puna.compress.integers.pack`; with int4 only.
        weight_scale: [N, G], in the dtype of the model; G is 1 with int8 by channel.
        weight_zero_point: int32 [ceil(N / 8), G], packed along the outputs; with int4 and zero points only.
        weight_shape: N and K; with int4 only.
        repacked: the weights in the order that a kernel wants, made when it first multiplies; never stored.
    """

    in_features: int
    out_features: int
    weight_int8: Tensor
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    weight_shape: Tensor

    def __init__(
        self, in_features: int, out_features: int, quantization: Quantization, *, dtype: torch.dtype, bias: bool
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.quantization = in_features, out_features, quantization
        self.repacked: dict[str, Any] = {}
        groups = in_features // (quantization.inputs_per_scale or in_features)
        if quantization.kind == "int8":
            self.register_buffer("weight_int8", torch.empty(out_features, in_features, dtype=torch.int8))
        else:
            self.register_buffer("weight_packed", torch.empty(out_features, in_features // 8, dtype=torch.int32))
            self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64))
            if not quantization.symmetric:
                zeros = torch.empty(-(-out_features // 8), groups, dtype=torch.int32)
                self.register_buffer("weight_zero_point", zeros)
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, quantization: Quantization) -> "QuantizedLinear":
        """The nearest quantised map."""
        weight = linear.weight.detach()
        with weight.device:
            layer = cls(
                linear.in_features,
                linear.out_features,
                quantization,
                dtype=weight.dtype,
                bias=linear.bias is not None,
            )
        if linear.bias is not None and layer.bias is not None:
            layer.bias.copy_(linear.bias)
        if quantization.kind == "int8":
            layer.weight_int8, layer.weight_scale = to_int8(weight, quantization.inputs_per_scale or linear.in_features)
            return layer
        assert quantization.inputs_per_scale is not None
        quants_NK, layer.weight_scale, zeros_NG = to_int4(weight, quantization.inputs_per_scale, quantization.symmetric)
        layer.weight_packed = pack(quants_NK)
        layer.weight_shape = torch.tensor(weight.shape, device=weight.device)
        if zeros_NG is not None:
            layer.weight_zero_point = pack(zeros_NG.T).T.contiguous()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y = multiply(x, self)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def integers(self) -> Tensor:
        """The weights as int8, [N, K]."""
        return self.weight_int8 if self.quantization.kind == "int8" else unpack(self.weight_packed, self.in_features)

    def zero_points(self) -> Tensor | None:
        """int8 [N, G], or None where there are none."""
        if self.quantization.symmetric:
            return None
        return unpack(self.weight_zero_point.T, self.out_features).T

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights as floats, [N, K]."""
        return dequantize(self.integers(), self.weight_scale, self.zero_points(), dtype)

    @property
    def weight(self) -> Tensor:
        """The weights as floats in the dtype of the model, made anew at every access."""
        return self.dequantize(self.weight_scale.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quantization.kind}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        self.repacked.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"repacked": {}}
