"""Matrices of a GGUF file in Q4_0 or Q8_0 as the integers that they are, for inference: neither they nor their scales
change.

Puna's kernels multiply integers of 4 and 8 bits in groups of 32, as these types have them, with activations rounded to
8 bits token by token; llama.cpp rounds activations in groups of 32. The other types have no such kernel and are read as
floats.

Shapes: N outputs, K inputs, G groups of 32 inputs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.kernels.forward import INPUTS_UNIT
from puna.kernels.loader import native_library
from puna.runtime.gguf_file import GgufFile, read_gguf
from puna.weights.gguf import EMBEDDING, OUTPUT, row_order
from puna.weights.gguf_blocks import split_q4_0, split_q8_0
from puna.weights.names import to_gguf
from puna.weights.stored import StoredTensors

GROUP_SIZE = 32


@dataclass(frozen=True)
class _Integers:
    """How the integers of a type are held."""

    quantization: Mapping[str, Any]
    """As the `quantization_config` of a config.json would say it."""
    suffix: str
    """Of the integers' name; that of the scales is "_scale"."""
    dtype: torch.dtype
    per_element: int
    """Weights in one of `dtype`."""
    has_shape: bool
    """Whether their shape is stored beside them."""
    split: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Blocks to integers and scales."""


def _quantization(bits: int, form: str) -> Mapping[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"weights": weights, "input_activations": activations}},
    }


_INTEGERS = {
    "Q4_0": _Integers(_quantization(4, "pack-quantized"), "_packed", torch.int32, 8, True, split_q4_0),
    "Q8_0": _Integers(_quantization(8, "int-quantized"), "", torch.int8, 1, False, split_q8_0),
}


def multiplies_integers(device: torch.device | str) -> bool:
    """Whether the kernels are there."""
    return torch.device(device).type == "cpu" and native_library() is not None


def packed_tensors(
    path: Path, stored: StoredTensors, maps: Iterable[str]
) -> tuple[StoredTensors, list[tuple[Mapping[str, Any], list[str]]]]:
    """The tensors of a GGUF file, with integers and scales in place of matrices that Puna's kernels multiply as such.

    Args:
        stored: the file's tensors as floats (`puna.weights.gguf.gguf_tensors`).
        maps: names of the model's linear maps. An output projection that the file shares with the embedding gets
            integers of its own, as rows of the embedding are looked up as floats.

    Returns:
        The tensors, and the `quantization_config` of each type that the file has, with the names of its maps.
    """
    file = read_gguf(path)
    shapes, dtypes = dict(stored.shapes), dict(stored.dtypes)
    readers: dict[str, Callable[[], Tensor]] = {}
    found: dict[str, list[str]] = {}

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], Tensor]) -> None:
        shapes[name], dtypes[name], readers[name] = shape, dtype, read

    for name in maps:
        own = to_gguf(f"{name}.weight")
        source = EMBEDDING if own == OUTPUT and own not in file.tensors else own
        tensor = file.tensors[source]
        outputs, inputs = tensor.shape
        held = _INTEGERS.get(tensor.encoding.name)
        if held is None or inputs % INPUTS_UNIT:
            continue
        found.setdefault(tensor.encoding.name, []).append(name)
        shapes.pop(own, None)
        dtypes.pop(own, None)
        integers, scales = (partial(_part, file, source, held, part) for part in (0, 1))
        add(f"{own}{held.suffix}", (outputs, inputs // held.per_element), held.dtype, integers)
        add(f"{own}_scale", (outputs, inputs // GROUP_SIZE), torch.float32, scales)
        if held.has_shape:
            add(f"{own}_shape", (2,), torch.int64, partial(torch.tensor, tensor.shape))

    def read(name: str) -> Tensor:
        return readers[name]() if name in readers else stored.read(name)

    packed = replace(stored, shapes=shapes, dtypes=dtypes, read=read)
    return packed, [(_INTEGERS[type].quantization, names) for type, names in found.items()]


def _part(file: GgufFile, name: str, held: _Integers, part: int) -> Tensor:
    values = held.split(torch.from_numpy(file.blocks(name)))[part]
    return row_order(file, name, values.view(file.tensors[name].shape[0], -1))
