"""Other weights into a model that is in use, in place."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from puna.compress.apply import fit
from puna.compress.linear import QuantizedLinear
from puna.model.config import LlamaConfig
from puna.model.transformer import Layer, Transformer
from puna.runtime.errors import InputError
from puna.weights.load import load_model
from puna.weights.stored import StoredTensors, copy_weights


def replace_weights(model: Transformer, source: Mapping[str, Tensor] | Path) -> None:
    """Copy weights into `model`, whose dtype and device stay.

    Args:
        source: tensors by the model's own names (`state_dict`), or a model directory, which is read into memory first.

    Raises:
        InputError: a tensor is missing, unexpected or of another shape, or the directory cannot be read or holds
            another model; or the model is not in this process's memory. Nothing has changed then.
    """
    if not all(isinstance(layer, Layer) for layer in model.layers):
        raise InputError(
            "Weights that are read from the disk at every step, or are spread over several processes, cannot be "
            "replaced. Open another engine."
        )
    where = "the given state"
    if isinstance(source, Path):
        where, other = str(source), load_model(source, fit=fit)
        if differences := _differences(model.config, other.config):
            raise InputError(f"{source} holds another model than the one in use: it has {', '.join(differences)}.")
        source = other.state_dict()
    shapes = {name: tensor.shape for name, tensor in source.items()}
    dtypes = {name: tensor.dtype for name, tensor in source.items()}
    copy_weights(model, StoredTensors(where, shapes, dtypes, source.__getitem__, str))
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.repacked.clear()


def _differences(ours: LlamaConfig, theirs: LlamaConfig) -> list[str]:
    """What the weights do not show and would be wrong; the context length is the engine's affair."""
    names = [field.name for field in fields(ours) if field.name != "context_length"]
    return [
        f"{name} = {getattr(theirs, name)!r} in place of {getattr(ours, name)!r}"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]
