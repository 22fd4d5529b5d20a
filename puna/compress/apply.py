"""Quantised maps into a model, by name: from its weights, or empty for weights to be loaded."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from puna.compress.linear import QuantizedLinear
from puna.compress.quantization import Quantization
from puna.model.transformer import Linear, Transformer
from puna.runtime.errors import InputError


def linear_names(model: Transformer) -> list[str]:
    """Names of all linear maps of a model, in its order."""
    return [name for name, module in model.named_modules() if isinstance(module, Linear)]


def choose(model: Transformer, quantization: Quantization) -> tuple[list[str], list[str]]:
    """Names of the linear maps to quantise, and of those that would be but have no whole number of groups of inputs.

    Raises:
        InputError: a pattern in `keep` fits nothing, or nothing is left to quantise.
    """
    names = linear_names(model)
    if useless := [p for p in quantization.keep if not any(fnmatchcase(name, p) for name in names)]:
        raise InputError(
            f"keep has {', '.join(map(repr, useless))}, which fits no linear map of this model. They are called "
            f"{', '.join(names[:7])}, ..., {names[-1]}."
        )
    wanted = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in quantization.keep)]
    group = quantization.inputs_per_scale or 1
    chosen = [name for name in wanted if model.get_submodule(name).get_parameter("weight").shape[1] % group == 0]
    if not chosen:
        raise InputError(
            "There is nothing to quantise: keep fits every linear map, or none has a number of inputs that is a "
            f"multiple of group_size ({group})."
        )
    return chosen, [name for name in wanted if name not in chosen]


def quantize(
    model: Transformer, quantization: Quantization, advance: Callable[[int], object] = lambda amount: None
) -> list[str]:
    """Replace linear maps by quantised ones, in place; returns the names of those that were replaced.

    A projection to the vocabulary that shares its weight with the embedding is separated from it.

    Args:
        advance: called with the number of weights done after each.

    Raises:
        InputError: see `choose`.
    """
    chosen, _ = choose(model, quantization)
    for name in chosen:
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        _replace(model, name, QuantizedLinear.from_linear(linear, quantization))
        advance(linear.weight.numel())
    return chosen


def fit(model: Transformer, values: Mapping[str, Any], names: Collection[str], where: str) -> None:
    """Replace linear maps by empty quantised ones, in place, so that stored integers can be loaded.

    Args:
        model: may be on the meta device.
        values: the `quantization_config` of its config.json.
        names: the maps whose weights are stored as integers.
        where: the checkpoint's path, for errors.

    Raises:
        InputError: the weights are stored as Puna does not read them.
    """
    quantization = Quantization.from_config(values, where)
    group = quantization.inputs_per_scale or 1
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        if linear.in_features % max(group, 8 if quantization.kind == "int4" else 1):
            raise InputError(f"{where}: {name} has {linear.in_features} inputs, not a multiple of {group}.")
        with linear.weight.device:
            empty = QuantizedLinear(
                linear.in_features,
                linear.out_features,
                quantization,
                dtype=linear.weight.dtype,
                bias=linear.bias is not None,
            )
        _replace(model, name, empty)


def _replace(model: Transformer, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    if name == "output":
        model.config = replace(model.config, tie_embeddings=False)
