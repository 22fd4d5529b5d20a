"""Methods onto a model and off it again, by the names of its linear maps and parameters."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import cast, get_args

import torch
from torch import nn

from puna.model.transformer import Linear, Transformer
from puna.peft.method import (
    QUANTIZED,
    AdaptedLinear,
    Base,
    MapMethod,
    MergeableLinear,
    Method,
    VirtualMethod,
    VirtualTokens,
)
from puna.runtime.errors import InputError
from puna.weights.stored import shorten


def adaptable_names(model: Transformer) -> list[str]:
    """Names of all linear maps of a model, plain, quantised or adapted, in its order; a head put on it is none."""
    maps = (*get_args(Base), AdaptedLinear)
    # An adapted map has the map below it as `base`.
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, maps) and not name.endswith(".base") and (name.startswith("layers.") or name == "output")
    ]


@dataclass(frozen=True)
class Trainable:
    """What a method leaves to be trained."""

    names: tuple[str, ...]
    """The parameters."""
    num_trained: int
    """Numbers in them."""
    num_total: int
    """Numbers in all parameters of the model with its adapters; a quantised map's are none."""


def apply(model: Transformer, method: Method, *, seed: int = 0) -> Trainable:
    """`attach`, and say what is trained then.

    Raises:
        InputError: see `attach`.
    """
    attach(model, method, seed=seed)
    parameters = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    return Trainable(
        tuple(trained), sum(p.numel() for p in trained.values()), sum(p.numel() for p in parameters.values())
    )


def attach(model: Transformer, method: Method, *, seed: int = 0) -> list[str]:
    """Freeze the model and put a method's parts into it, in place; returns the names of the linear maps adapted.

    The model computes the same until it is trained, but for virtual tokens and for a base that the method quantises.

    Args:
        seed: of the parts' initial values.

    Raises:
        InputError: the model has adapters already; or a target fits no linear map, or a pattern of `whole` no
            parameter. Nothing has changed then.
    """
    refuse_adapters(model)
    chosen = target_names(model, method) if isinstance(method, MapMethod) else []
    whole = whole_parameters(model, method)
    if both := [name for name in chosen if f"{name}.weight" in whole]:
        raise InputError(f"{both[0]} is to be adapted and to be trained whole; take it out of targets or of whole.")
    generator = torch.Generator().manual_seed(seed)
    method.prepare(model)
    model.requires_grad_(False)
    if isinstance(method, MapMethod):
        for name in chosen:
            base = model.get_submodule(name)
            assert isinstance(base, Base)
            _put(model, name, method.wrap(name, base, generator).train(base.training))
    elif isinstance(method, VirtualMethod):
        method.put_on(model, generator)
    for parameter in whole.values():
        parameter.requires_grad_()
    return chosen


def target_names(model: Transformer, method: MapMethod) -> list[str]:
    """The linear maps that a method adapts, by name.

    Raises:
        InputError: a target fits none.
    """
    names = adaptable_names(model)
    _refuse_useless(method.targets, names, "targets", "linear map")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in method.targets)]


def whole_parameters(model: Transformer, method: Method) -> dict[str, nn.Parameter]:
    """The model's own parameters that a method trains, by the names that they have without adapters.

    Raises:
        InputError: a pattern fits none, or it fits one of two that share their values.
    """
    parameters = {
        name.replace(".base.", "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), (AdaptedLinear, VirtualTokens))
    }
    patterns = method.whole_in(model.config)

    def fits(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)

    useless = [pattern for pattern in patterns if not any(fits(name, pattern) for name in parameters)]
    _refuse_useless(useless, list(parameters), "whole", "parameter")
    chosen = {name: p for name, p in parameters.items() if any(fits(name, pattern) for pattern in patterns)}
    if model.config.tie_embeddings and {"output.weight", "embedding.weight"} & chosen.keys():
        raise InputError(
            "whole has the embedding or the projection to the vocabulary, which share their values in this model, so "
            "that neither can be trained and stored alone. Leave it out, or train all parameters."
        )
    return chosen


def _refuse_useless(patterns: Collection[str], names: list[str], setting: str, noun: str) -> None:
    if useless := [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]:
        raise InputError(
            f"{setting} has {', '.join(map(repr, useless))}, which fits no {noun} of this model. They are called "
            f"{', '.join(names[:7])}, ..., {names[-1]}."
        )


def refuse_adapters(model: Transformer) -> None:
    """Adapters are not stacked.

    Raises:
        InputError: the model has some.
    """
    if adapted_maps(model) or virtual_tokens(model):
        raise InputError("This model has adapters already; merge or detach them first.")


def adapted_maps(model: Transformer) -> dict[str, AdaptedLinear]:
    """The adapted maps by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def virtual_tokens(model: Transformer) -> VirtualTokens | None:
    """The virtual tokens of a model, if it has any."""
    return next((module for module in model.modules() if isinstance(module, VirtualTokens)), None)


def detach(model: Transformer) -> None:
    """Take all adapters off, in place, and leave the model as it was before, but for being frozen.

    What was trained whole stays trained, and a base that the method quantised stays so.
    """
    for name, adapted in adapted_maps(model).items():
        _put(model, name, adapted.base)
    if virtual := virtual_tokens(model):
        virtual.take_off(model)


@torch.no_grad()
def merge(model: Transformer) -> None:
    """Work the adapters into the weights for good, in place: the model has plain linear maps afterwards.

    A quantised map becomes one in floating point. A projection to the vocabulary that shares its weight with the
    embedding is separated from it.

    Raises:
        InputError: the adapters are not linear, or have biases where the model has no room for any. Nothing has changed
            then.
    """
    if obstacle := why_not_merged(model):
        raise InputError(obstacle)
    for name, adapted in adapted_maps(model).items():
        _put(model, name, _plain(adapted))
        if name == "output":
            model.config = replace(model.config, tie_embeddings=False)
    model.config = replace(model.config, qkv_bias=bool(_biased(model)))


def why_not_merged(model: Transformer) -> str:
    """What keeps the adapters from being merged for good, in a sentence; empty where nothing does."""
    if virtual_tokens(model):
        return "Prefix and prompt tuning add tokens, not weights: they cannot be merged into the model."
    if crooked := [name for name, adapted in adapted_maps(model).items() if not isinstance(adapted, MergeableLinear)]:
        return f"The adapter of {crooked[0]} is not linear, so that it cannot be merged into the model's weights."
    biased = _biased(model)
    parts = ("query", "key", "value")
    projections = {f"layers.{n}.attention.{part}" for n in range(model.config.num_layers) for part in parts}
    if biased not in (set(), projections):
        return (
            f"These adapters give biases to {shorten(sorted(biased))}; a model has room for them on the queries, keys "
            "and values of all layers, or nowhere. Choose exactly these as targets to be able to merge."
        )
    return ""


def _biased(model: Transformer) -> set[str]:
    """The model's own linear maps that have a bias, or would have one if the adapters were merged."""
    maps = adapted_maps(model)
    biases = {
        name: maps[name].merged_bias() if name in maps else model.get_submodule(name).bias
        for name in adaptable_names(model)
    }
    return {name for name, bias in biases.items() if bias is not None}


def _plain(adapted: AdaptedLinear) -> Linear:
    assert isinstance(adapted, MergeableLinear), "asked before, see `why_not_merged`"
    weight_NK, bias = adapted.merged_weight(), adapted.merged_bias()
    with torch.device("meta"):
        linear = Linear(adapted.in_features, adapted.out_features, bias=False)
    linear.weight = nn.Parameter(weight_NK, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear.train(adapted.training)


@contextmanager
@torch.no_grad()
def merged(model: Transformer) -> Iterator[None]:
    """Work the adapters into the weights for the time of a `with`: faster to run, and bitwise undone at its end.

    The weights of the adapted maps are held twice meanwhile.

    Raises:
        InputError: a map is quantised, so that its weight cannot hold the sum; or the adapters are not linear.
    """
    maps = adapted_maps(model)
    if virtual_tokens(model) or not all(isinstance(each, MergeableLinear) for each in maps.values()):
        raise InputError(why_not_merged(model))
    if quantized := [name for name, adapted in maps.items() if isinstance(adapted.base, QUANTIZED)]:
        raise InputError(f"{quantized[0]} is quantised, so an adapter cannot be merged into it for a while only.")
    originals: dict[AdaptedLinear, tuple[nn.Parameter, nn.Parameter | None]] = {}
    try:
        for adapted in maps.values():
            fresh = _plain(adapted)
            originals[adapted] = adapted.base.get_parameter("weight"), adapted.base.bias
            adapted.base.register_parameter("weight", cast(nn.Parameter, fresh.weight))
            adapted.base.register_parameter("bias", cast(nn.Parameter | None, fresh.bias))
            adapted.merged = True
        yield
    finally:
        for adapted, (weight, bias) in originals.items():
            adapted.base.register_parameter("weight", weight)
            adapted.base.register_parameter("bias", bias)
            adapted.merged = False


@contextmanager
def disabled(model: Transformer) -> Iterator[None]:
    """Compute without the adapters for the time of a `with`: as the model did before they were put on.

    What a method trains of the model itself stays as it is.
    """
    maps = [adapted for adapted in adapted_maps(model).values() if not adapted.merged]
    for adapted in maps:
        adapted.merged = True  # the base alone is the answer
    try:
        yield
    finally:
        for adapted in maps:
            adapted.merged = False


def common_targets(names: Collection[str], all_names: Collection[str]) -> tuple[str, ...]:
    """Last parts of `names` ("query"), if these choose exactly them out of `all_names`; else the names themselves."""
    lasts = sorted({name.rpartition(".")[2] for name in names})
    chosen = {name for name in all_names if name.rpartition(".")[2] in lasts}
    return tuple(lasts) if chosen == set(names) else tuple(names)


def _put(model: Transformer, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
