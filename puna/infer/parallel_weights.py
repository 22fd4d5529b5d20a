"""The part of a model that one of several processes computes: some of its layers, of each the part of some heads.

Attention is cut by heads and the feed-forward by hidden channels, so that a process needs the others once per half of a
layer, to add up (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from puna.compress.linear import QuantizedLinear
from puna.model.config import LlamaConfig
from puna.model.transformer import Layer, Linear, Transformer
from puna.runtime.errors import InputError
from puna.weights.load import Fit, empty_model
from puna.weights.stored import StoredTensors, check_weights, copy_weights, named_tensors

_BY_OUTPUTS = ("attention.query", "attention.key", "attention.value", "feed_forward.gate", "feed_forward.up")
BY_INPUTS = ("attention.output", "feed_forward.down")
"""The maps of a layer whose inputs are spread over processes, so that their results have to be added up."""


@dataclass(frozen=True)
class Place:
    """Where a process stands: `stage` of `num_stages` along the layers, `part` of `num_parts` across each of them."""

    part: int
    num_parts: int
    stage: int
    num_stages: int

    @classmethod
    def of(cls, rank: int, num_parts: int, num_stages: int) -> "Place":
        """Processes of one stage are neighbours."""
        return cls(rank % num_parts, num_parts, rank // num_parts, num_stages)

    def layers(self, num_layers: int) -> range:
        """Numbers of its layers."""
        return range(num_layers * self.stage // self.num_stages, num_layers * (self.stage + 1) // self.num_stages)

    def config(self, whole: LlamaConfig) -> LlamaConfig:
        """The shape of what it computes.

        Raises:
            InputError: the model cannot be cut like this.
        """
        if whole.num_layers < self.num_stages:
            raise InputError(f"A model of {whole.num_layers} layers cannot be cut into {self.num_stages} stages.")
        for name in ("num_kv_heads", "hidden_dim"):
            if getattr(whole, name) % self.num_parts:
                raise InputError(
                    f"tensor_parallel is {self.num_parts}, but the model's {name} is {getattr(whole, name)}, which "
                    f"is not a multiple of that. Choose another number, or use pipeline_parallel."
                )
        return replace(
            whole,
            num_layers=len(self.layers(whole.num_layers)),
            num_heads=whole.num_heads // self.num_parts,
            num_kv_heads=whole.num_kv_heads // self.num_parts,
            hidden_dim=whole.hidden_dim // self.num_parts,
        )


def load_part(
    path: Path, place: Place, *, device: torch.device, dtype: torch.dtype | None = None, fit: Fit | None = None
) -> Transformer:
    """A process's part of a checkpoint. Only the first has the embedding, the last norm and the output projection.

    Its `config` is that of the part.

    Raises:
        InputError: as for `puna.weights.load.load_model`; or the model cannot be cut like this.
    """
    model, stored = empty_model(path, device=device, dtype=dtype, fit=fit)
    check_weights(model, stored)
    numbers = place.layers(model.config.num_layers)
    model.config = place.config(model.config)
    model.layers = nn.ModuleList(model.layers[number] for number in numbers)
    for own_number, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        layer.attention.layer = own_number
        for name in (*_BY_OUTPUTS, *BY_INPUTS):
            _put(layer, name, _cut(layer.get_submodule(name), name, place.num_parts, str(path)))
    first = place.part == place.stage == 0
    if not first:
        for name in ("embedding", "norm", "output"):
            model.add_module(name, nn.Identity())
    model = model.to_empty(device=device)
    if first and model.config.tie_embeddings:
        model.output.weight = model.embedding.weight
    copy_weights(model, _own(model, stored, numbers, place))
    return model.requires_grad_(False).eval()


def _cut(whole: nn.Module, name: str, num_parts: int, where: str) -> Linear | QuantizedLinear:
    """The map of one process, without weights."""
    assert isinstance(whole, Linear | QuantizedLinear)
    inputs, outputs = whole.in_features, whole.out_features
    if name in BY_INPUTS:
        inputs //= num_parts
    else:
        outputs //= num_parts
    bias = whole.bias is not None
    with torch.device("meta"):
        if isinstance(whole, Linear):
            return Linear(inputs, outputs, bias=bias, dtype=whole.weight.dtype)
        unit = max(whole.quantization.inputs_per_scale or 1, 8)
        if inputs % unit or outputs % 8:
            raise InputError(
                f"{where}: {name} cannot be cut into {num_parts} parts, because its quantised weights come in groups "
                f"of {unit}. Choose a smaller tensor_parallel, or use pipeline_parallel."
            )
        return QuantizedLinear(inputs, outputs, whole.quantization, dtype=whole.weight_scale.dtype, bias=bias)


def _own(model: Transformer, stored: StoredTensors, numbers: range, place: Place) -> StoredTensors:
    """What a checkpoint holds for one process."""

    def file_name(name: str) -> str:
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            name = f"layers.{numbers[int(number)]}.{rest}"
        return stored.file_name(name)

    own = {file_name(name): tensor for name, tensor in named_tensors(model)}
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}

    def read(name: str) -> Tensor:
        tensor = stored.read(name)
        # What is cut differs in size from the whole, and only along that axis.
        for dim, (size, whole_size) in enumerate(zip(shapes[name], tensor.shape, strict=True)):
            if size != whole_size:
                tensor = tensor.narrow(dim, place.part * size, size)
        return tensor

    return StoredTensors(stored.where, shapes, {name: stored.dtypes[name] for name in own}, read, file_name)


def _put(layer: Layer, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, module)
