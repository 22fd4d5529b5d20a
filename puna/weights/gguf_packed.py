"""Matrices of a GGUF file in Q4_0 as the integers that they are, for inference: neither they nor their scales change.

Puna's kernels multiply 4-bit integers in groups of 32, as Q4_0 has them, with activations rounded to 8 bits token by
token; llama.cpp rounds activations in groups of 32. The other types have no such kernel and are read as floats.

Shapes: N outputs, K inputs, G groups of 32 inputs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.kernels.forward import INPUTS_UNIT
from puna.kernels.loader import native_library
from puna.runtime.gguf_file import GgufFile, read_gguf
from puna.weights.gguf import EMBEDDING, OUTPUT, row_order
from puna.weights.gguf_blocks import split_q4_0
from puna.weights.names import to_gguf
from puna.weights.stored import StoredTensors

GROUP_SIZE = 32

QUANTIZATION: Mapping[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP_SIZE,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
"""How such matrices are stored, as the `quantization_config` of a config.json would say it."""


def multiplies_integers(device: torch.device | str) -> bool:
    """Whether the kernels are there."""
    return torch.device(device).type == "cpu" and native_library() is not None


def packed_tensors(path: Path, stored: StoredTensors, maps: Iterable[str]) -> StoredTensors:
    """The tensors of a GGUF file, with integers and scales in place of matrices in Q4_0 that Puna's kernels multiply.

    Args:
        stored: the file's tensors as floats (`puna.weights.gguf.gguf_tensors`).
        maps: names of the model's linear maps. An output projection that the file shares with the embedding gets
            integers of its own, as rows of the embedding are looked up as floats.
    """
    file = read_gguf(path)
    shapes, dtypes, sources = dict(stored.shapes), dict(stored.dtypes), dict[str, str]()
    for name in maps:
        own = to_gguf(f"{name}.weight")
        source = EMBEDDING if own == OUTPUT and own not in file.tensors else own
        tensor = file.tensors[source]
        outputs, inputs = tensor.shape
        if tensor.encoding.name != "Q4_0" or inputs % INPUTS_UNIT:
            continue
        shapes.pop(own, None)
        dtypes.pop(own, None)
        for part, shape, dtype in (
            ("packed", (outputs, inputs // 8), torch.int32),
            ("scale", (outputs, inputs // GROUP_SIZE), torch.float32),
            ("shape", (2,), torch.int64),
        ):
            whole = f"{own}_{part}"
            shapes[whole], dtypes[whole], sources[whole] = shape, dtype, source

    def read(name: str) -> Tensor:
        return _part(file, sources[name], name.rpartition("_")[2]) if name in sources else stored.read(name)

    return replace(stored, shapes=shapes, dtypes=dtypes, read=read)


def _part(file: GgufFile, name: str, part: str) -> Tensor:
    shape = file.tensors[name].shape
    if part == "shape":
        return torch.tensor(shape)
    packed, scales = split_q4_0(torch.from_numpy(file.blocks(name)))
    return row_order(file, name, (packed if part == "packed" else scales).view(shape[0], -1))
