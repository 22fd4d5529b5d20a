"""Adapters onto a model and off it again, by the names of its linear maps."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from puna.compress.linear import QuantizedLinear
from puna.model.transformer import Linear, Transformer
from puna.peft.method import AdaptedLinear, Method
from puna.runtime.errors import InputError


def adaptable_names(model: Transformer) -> list[str]:
    """Names of all linear maps of a model, plain, quantised or adapted, in its order."""
    maps = (Linear, QuantizedLinear, AdaptedLinear)
    # An adapted map has the map below it as `base`.
    return [name for name, part in model.named_modules() if isinstance(part, maps) and not name.endswith(".base")]


def attach(model: Transformer, method: Method, *, seed: int = 0) -> list[str]:
    """Freeze the model and put adapters around the maps that the method targets, in place; returns their names.

    The model computes the same until the adapters are trained.

    Args:
        seed: of the adapters' initial values.

    Raises:
        InputError: the model has adapters already, or a target fits no linear map.
    """
    refuse_adapters(model)
    names = adaptable_names(model)
    if useless := [p for p in method.targets if not any(fnmatchcase(name, p) for name in names)]:
        raise InputError(
            f"targets has {', '.join(map(repr, useless))}, which fits no linear map of this model. They are called "
            f"{', '.join(names[:7])}, ..., {names[-1]}."
        )
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in method.targets)]
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name in chosen:
        base = model.get_submodule(name)
        assert isinstance(base, Linear | QuantizedLinear)
        _put(model, name, method.wrap(base, generator).train(base.training))
    return chosen


def refuse_adapters(model: Transformer) -> None:
    """Adapters are not stacked.

    Raises:
        InputError: the model has some.
    """
    if adapted_maps(model):
        raise InputError("This model has adapters already; merge or detach them first.")


def adapted_maps(model: Transformer) -> dict[str, AdaptedLinear]:
    """The adapted maps by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def detach(model: Transformer) -> None:
    """Take all adapters off, in place, and leave the model as it was before, but for being frozen."""
    for name, adapted in adapted_maps(model).items():
        _put(model, name, adapted.base)


@torch.no_grad()
def merge(model: Transformer) -> None:
    """Work the adapters into the weights for good, in place: the model has plain linear maps afterwards.

    A quantised map becomes one in floating point. A projection to the vocabulary that shares its weight with the
    embedding is separated from it.
    """
    for name, adapted in adapted_maps(model).items():
        weight_NK, bias = adapted.merged_weight(), adapted.base.bias
        with torch.device("meta"):
            plain = Linear(adapted.in_features, adapted.out_features, bias=bias is not None)
        plain.weight = nn.Parameter(weight_NK, requires_grad=False)
        plain.register_parameter("bias", bias)
        _put(model, name, plain.train(adapted.training))
        if name == "output":
            model.config = replace(model.config, tie_embeddings=False)


@contextmanager
@torch.no_grad()
def merged(model: Transformer) -> Iterator[None]:
    """Work the adapters into the weights for the time of a `with`: faster to run, and bitwise undone at its end.

    The weights of the adapted maps are held twice meanwhile.

    Raises:
        InputError: a map is quantised, so that its weight cannot hold the sum.
    """
    maps = adapted_maps(model)
    if quantized := [name for name, adapted in maps.items() if isinstance(adapted.base, QuantizedLinear)]:
        raise InputError(f"{quantized[0]} is quantised, so an adapter cannot be merged into it for a while only.")
    originals: dict[AdaptedLinear, nn.Parameter] = {}
    try:
        for adapted in maps.values():
            originals[adapted] = adapted.base.get_parameter("weight")
            adapted.base.register_parameter("weight", nn.Parameter(adapted.merged_weight(), requires_grad=False))
            adapted.merged = True
        yield
    finally:
        for adapted, weight in originals.items():
            adapted.base.register_parameter("weight", weight)
            adapted.merged = False


def common_targets(names: Collection[str], all_names: Collection[str]) -> tuple[str, ...]:
    """Last parts of `names` ("query"), if these choose exactly them out of `all_names`; else the names themselves."""
    lasts = sorted({name.rpartition(".")[2] for name in names})
    chosen = {name for name in all_names if name.rpartition(".")[2] in lasts}
    return tuple(lasts) if chosen == set(names) else tuple(names)


def _put(model: Transformer, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
