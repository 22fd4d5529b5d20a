"""Products with weights of any precision, and whole forwards of a decoder, by the native kernels.

Shapes: M tokens, N outputs, K inputs of a map, G groups of inputs with a scale each; D model dimension, B sequences, P
rotated pairs of a head.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.kernels.loader import level, loaded_library, native_library

INPUTS_UNIT = 128
"""Inputs of a map that the kernels take come in multiples of this."""

HEAD_UNIT = 32
"""Head dimensions do in multiples of this."""

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int32: 3}


class _Map(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_long),
        ("outputs", ctypes.c_long),
        ("inputs", ctypes.c_long),
        ("group", ctypes.c_long),
        ("wide_scales", ctypes.c_long),
        ("y_row", ctypes.c_long),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


_NORMS = ("attention_norm", "feed_forward_norm", "query_norm", "key_norm")
_MAPS = ("query", "key", "value", "output", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in _NORMS), *((name, _Map) for name in _MAPS))


class _Forward(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_long),
        ("dim", ctypes.c_long),
        ("heads", ctypes.c_long),
        ("groups", ctypes.c_long),
        ("head_size", ctypes.c_long),
        ("eps", ctypes.c_float),
        ("layer", ctypes.POINTER(_Layer)),
        ("norm", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("keys", ctypes.POINTER(ctypes.c_void_p)),
        ("values", ctypes.POINTER(ctypes.c_void_p)),
        ("block_size", ctypes.c_long),
        ("wide_cache", ctypes.c_long),
        ("rows", ctypes.c_long),
        ("sequences", ctypes.c_long),
        ("x", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_row", ctypes.c_long),
        ("starts", ctypes.c_void_p),
        ("firsts", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class NativeMap:
    """A linear map's weights, as they lie in memory.

    Attributes:
        weights: float32 or bfloat16 [N, K]; int8 [N, K]; or int32 [N, K / 8] of integers of 4 bits, packed as
            `puna.compress.integers.pack` does. With integers, activations are rounded to 8 bits, token by token.
        scales: with integers, [N, G], float32 or bfloat16; G is 1 or K / 32 with 8 bits, and K / 32, K / 64 or K / 128
            with 4.
        bias: [N].
    """

    weights: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None

    @property
    def inputs(self) -> int:
        """K."""
        return self.weights.shape[1] * (8 if self.weights.dtype is torch.int32 else 1)

    def takes_many_tokens(self) -> bool:
        """Whether the kernels are made for any number of tokens, or only for a few."""
        return self.scales is not None

    @cached_property
    def alone(self) -> tuple[_Map, list[Tensor]]:
        """As the kernels read it to multiply with nothing else, and what has to stay alive."""
        kept: list[Tensor] = []
        return self.describe(len(self.weights), kept), kept

    def describe(self, y_row: int, kept: list[Tensor]) -> _Map:
        """As the kernels read it; `kept` gets what has to stay alive."""
        bias = None if self.bias is None else self.bias.float().contiguous()
        kept += [tensor for tensor in (self.weights, self.scales, bias) if tensor is not None]
        return _Map(
            _KINDS[self.weights.dtype],
            len(self.weights),
            self.inputs,
            self.inputs if self.scales is None else self.inputs // self.scales.shape[1],
            self.scales is not None and self.scales.dtype is torch.float32,
            y_row,
            self.weights.data_ptr(),
            None if self.scales is None else self.scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )


def applicable(weights: Tensor, scales: Tensor | None = None) -> bool:
    """Whether the kernels are there and read these weights where they lie."""
    inputs = weights.shape[1] * (8 if weights.dtype is torch.int32 else 1)
    return (
        weights.device.type == "cpu"
        and native_library() is not None
        and type(weights) in (Tensor, torch.nn.Parameter)
        and weights.dtype in _KINDS
        and weights.is_contiguous()
        and inputs % INPUTS_UNIT == 0
        and (scales is None or _readable(scales, inputs, weights.dtype))
    )


def _readable(scales: Tensor, inputs: int, dtype: torch.dtype) -> bool:
    groups = (inputs, 32) if dtype is torch.int8 else (32, 64, 128)
    known = any(scales.shape[1] * group == inputs for group in groups)
    return known and scales.is_contiguous() and scales.dtype in (torch.float32, torch.bfloat16)


def multiply(x_MK: Tensor, weights: NativeMap) -> Tensor:
    """y_MN = x W^T + bias in float32."""
    x_MK = x_MK.float().contiguous()
    y_MN = torch.empty(len(x_MK), len(weights.weights))
    described, _ = weights.alone
    if len(x_MK):
        loaded_library().puna_multiply(
            ctypes.c_int(level()),
            ctypes.byref(described),
            ctypes.c_void_p(x_MK.data_ptr()),
            ctypes.c_long(len(x_MK)),
            ctypes.c_void_p(y_MN.data_ptr()),
        )
    return y_MN


@dataclass(frozen=True)
class NativeLayer:
    """The weights of a `puna.model.transformer.Layer`; the norms of queries and keys where it has any."""

    attention_norm: Tensor
    feed_forward_norm: Tensor
    query: NativeMap
    key: NativeMap
    value: NativeMap
    output: NativeMap
    gate: NativeMap
    up: NativeMap
    down: NativeMap
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None


class NativeDecoder:
    """The layers of a model, over a cache in blocks.

    Args:
        layers: their weights; read where they lie, so that changes in place are seen (of norms and biases only where
            they are float32).
        norm: weight of the last norm, [D].
        norm_eps: added to mean squares.
        num_heads: query heads.
        cosines, sines: of each position, float32 [positions, P].
        keys, values: of each layer [blocks, slots, groups, head dimension], float32 or bfloat16.
    """

    def __init__(
        self,
        layers: Sequence[NativeLayer],
        norm: Tensor,
        *,
        norm_eps: float,
        num_heads: int,
        cosines: Tensor,
        sines: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> None:
        self._kept: list[Tensor] = [cosines, sines, *keys, *values]
        _, block_size, num_groups, head_dim = keys[0].shape
        joint = (num_heads + 2 * num_groups) * head_dim
        self._dim = len(norm)
        described = (_Layer * len(layers))(*(self._layer(layer, joint) for layer in layers))
        self._forward = _Forward(
            layers=len(layers),
            dim=self._dim,
            heads=num_heads,
            groups=num_groups,
            head_size=head_dim,
            eps=norm_eps,
            layer=described,
            norm=self._address(norm),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            keys=(ctypes.c_void_p * len(keys))(*(part.data_ptr() for part in keys)),
            values=(ctypes.c_void_p * len(values))(*(part.data_ptr() for part in values)),
            block_size=block_size,
            wide_cache=keys[0].dtype is torch.float32,
        )

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor.float().contiguous())
        return self._kept[-1].data_ptr()

    def _layer(self, layer: NativeLayer, joint: int) -> _Layer:
        hidden = len(layer.gate.weights)
        rows = dict.fromkeys(_MAPS, self._dim) | dict.fromkeys(("query", "key", "value"), joint)
        rows |= dict.fromkeys(("gate", "up"), hidden)
        norms = {name: self._address(getattr(layer, name)) for name in _NORMS}
        maps = {name: getattr(layer, name).describe(rows[name], self._kept) for name in _MAPS}
        return _Layer(**norms, **maps)

    def __call__(
        self, x_MD: Tensor, tables: NDArray[np.int64], starts: NDArray[np.int64], firsts: NDArray[np.int64]
    ) -> Tensor:
        """Normalised hidden states of new tokens, whose keys and values go to the cache.

        Args:
            x_MD: embeddings, float32; overwritten.
            tables: of each sequence its blocks, [B, blocks].
            starts: position of the first new token of each, [B].
            firsts: row of it, and one more for the end, [B + 1]; rows after that belong to no sequence.
        """
        forward = self._forward
        forward.rows, forward.sequences = len(x_MD), len(starts)
        forward.x, forward.tables, forward.table_row = x_MD.data_ptr(), tables.ctypes.data, tables.shape[1]
        forward.starts, forward.firsts = starts.ctypes.data, firsts.ctypes.data
        loaded_library().puna_forward(ctypes.c_int(level()), ctypes.byref(forward))
        return x_MD
