"""Models larger than memory: layers are read from the disk while others compute.

Files are memory-mapped, so that what the operating system has room for is read once only.

Shapes: B batch, T tokens, D model dimension.
"""

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from puna.compress.linear import QuantizedLinear
from puna.model.attend import Attend
from puna.model.rope import Rotation
from puna.model.transformer import Layer, Transformer
from puna.runtime.errors import InputError
from puna.weights.huggingface import CONFIG_FILE
from puna.weights.load import Fit, empty_model, resolve
from puna.weights.stored import StoredTensors, check_weights, named_tensors


def stream_model(
    path: Path | str, *, device: torch.device, dtype: torch.dtype | None = None, fit: Fit | None = None
) -> Transformer:
    """`puna.weights.load.load_model` for inference with little memory: it computes the same, to the last bit.

    Two layers, the last norm and the projection to the vocabulary are in memory, the embedding only if it is tied to
    the latter. Every forward reads all layers once, so give it many tokens.

    Raises:
        InputError: as for `load_model`; or the checkpoint is not a Hugging Face directory.
    """
    path = resolve(path)
    if not (path / CONFIG_FILE).exists():
        raise InputError(
            f'{path} is not a Hugging Face directory, and weights = "disk" reads only those. Convert it first: puna '
            "convert."
        )
    model, stored = empty_model(path, device=device, dtype=dtype, fit=fit)
    check_weights(model, stored)
    config, kept_dtype = model.config, model.norm.weight.dtype
    shapes = cast(list[Layer], list(model.layers))
    model.layers = nn.ModuleList()
    if config.tie_embeddings:
        model.embedding.to_empty(device=device)
        model.output.weight = model.embedding.weight
        _fill(model.embedding, "embedding", stored)
    else:
        rows_VD = stored.read(stored.file_name("embedding.weight"))
        model.add_module("embedding", EmbeddingOnDisk(rows_VD, device, kept_dtype))
        model.output.to_empty(device=device)
        _fill(model.output, "output", stored)
    model.norm.to_empty(device=device)
    _fill(model.norm, "norm", stored)
    model.layers.append(StreamedLayers(shapes, stored, device))
    return model.requires_grad_(False).eval()


class EmbeddingOnDisk(nn.Module):
    """Looks rows up in a memory-mapped table, of which only those are read.

    Args:
        rows_VD: the table.
        device: where the rows are needed, in `dtype`.
    """

    def __init__(self, rows_VD: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self._rows_VD = rows_VD
        self._device, self._dtype = device, dtype

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self._rows_VD[ids_BT.to(self._rows_VD.device)].to(self._device, self._dtype)


class StreamedLayers(nn.Module):
    """Stands for all layers of a model: computes one while a thread reads the next.

    Args:
        shapes: the layers on the meta device.
        stored: their weights.
        device: where they compute.
    """

    def __init__(self, shapes: list[Layer], stored: StoredTensors, device: torch.device) -> None:
        super().__init__()
        self._shapes = tuple(shapes)  # not as modules: they have no weights
        self._stored = stored
        self._device = device
        self._unused: dict[object, list[Layer]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="puna-layers")
        self._next: tuple[int, Future[Layer]] | None = None

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        for number in range(len(self._shapes)):
            layer = self._take(number)
            x_BTD = layer(x_BTD, rotation, attend)
            self._unused.setdefault(_kind(layer), []).append(layer)
        return x_BTD

    def _take(self, number: int) -> Layer:
        """A layer with its weights; the reading of the one after it begins."""
        if self._next is None or self._next[0] != number:  # the first forward, or one has been broken off
            self._next = (number, self._reader.submit(self._read, number))
        reading, self._next = self._next[1], None
        layer = reading.result()
        following = (number + 1) % len(self._shapes)
        self._next = (following, self._reader.submit(self._read, following))
        return layer

    def _read(self, number: int) -> Layer:
        shape = self._shapes[number]
        unused = self._unused.get(_kind(shape))
        layer = unused.pop() if unused else copy.deepcopy(shape).to_empty(device=self._device)
        layer.attention.layer = number
        _fill(layer, f"layers.{number}", self._stored)
        return layer


def _kind(layer: Layer) -> object:
    """Layers of equal kind can take each other's weights; quantisation may leave some of them as they were."""
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in named_tensors(layer))


@torch.no_grad()
def _fill(module: nn.Module, name: str, stored: StoredTensors) -> None:
    for own_name, tensor in named_tensors(module):
        tensor.copy_(stored.read(stored.file_name(f"{name}.{own_name}")))
    for part in module.modules():
        if isinstance(part, QuantizedLinear):
            part.repacked.clear()
