"""Adapter directories as PEFT reads and writes them: `adapter_config.json` and `adapter_model.safetensors`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from puna.model.transformer import Transformer
from puna.peft.apply import (
    adaptable_names,
    adapted_maps,
    attach,
    common_targets,
    refuse_adapters,
    target_names,
    virtual_tokens,
    whole_parameters,
)
from puna.peft.method import AdaptedLinear, Base, MapMethod, Method, VirtualMethod, hf_name
from puna.peft.methods import METHODS
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_json, write_json
from puna.runtime.manifest import Manifest
from puna.weights.huggingface import open_safetensors
from puna.weights.names import from_hf, to_hf
from puna.weights.stored import shorten

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_VIRTUAL = "prompt_embeddings"


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter directory holds."""

    where: str
    """The directory, for errors."""
    method: Method
    """Its settings; its targets are the maps that it has tensors for, by name."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Name of a linear map -> name of an adapter's parameter -> its value."""
    whole: Mapping[str, Tensor]
    """Name of a parameter of the model -> its value."""
    virtual: Tensor | None
    """Virtual tokens."""
    head: Mapping[str, Tensor]
    """Parameters of a head that was put on the model, by name."""

    def check(self, model: Transformer) -> None:
        """See whether it was made for a model like this, which has no adapters.

        Raises:
            InputError: it adapts a map that the model has not, or one of another size; or its settings and its tensors
                contradict each other.
        """
        known = set(adaptable_names(model))
        if absent := [name for name in self.tensors if name not in known]:
            raise InputError(
                f"The adapter in {self.where} does not fit this model, which has no {shorten(absent)}. Use it with the "
                "model that it was trained on."
            )
        for name, own in self.tensors.items():
            base = model.get_submodule(name)
            assert isinstance(base, Base)
            assert isinstance(self.method, MapMethod)
            found = {parameter: tuple(tensor.shape) for parameter, tensor in own.items()}
            self._compare(name, found, self.method.shapes(name, base.in_features, base.out_features))
        if self.virtual is not None:
            assert isinstance(self.method, VirtualMethod)
            expected = (self.method.num_virtual_tokens, self.method.width(model.config))
            self._compare(_VIRTUAL, tuple(self.virtual.shape), expected)
        if isinstance(self.method, MapMethod):
            chosen = target_names(model, self.method)
            if lacking := [name for name in chosen if name not in self.tensors]:
                raise InputError(f"The adapter in {self.where} is incomplete: it lacks {shorten(lacking)}.")
        for name, parameter in whole_parameters(model, self.method).items():
            self._compare(name, tuple(self.whole[name].shape), tuple(parameter.shape))

    def _compare(self, name: str, found: object, expected: object) -> None:
        if found != expected:
            raise InputError(
                f"The adapter in {self.where} does not fit this model and its {CONFIG_FILE}: {name} has {found}, "
                f"but should have {expected}. Use it with the model that it was trained on."
            )


def read_adapter(directory: Path, head: str = "") -> StoredAdapter:
    """Read an adapter directory.

    Args:
        head: name of the head that it should be for; an adapter for one is not for a model without it.

    Raises:
        InputError: there is none, it is broken or incomplete, or of a method that Puna has not.
    """
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if not path.is_file():
            raise InputError(
                f"{directory} is no adapter that Puna reads: it lacks {path.name}. An adapter directory is what PEFT's "
                "save_pretrained writes."
            )
    values = read_json(config_path)
    if not isinstance(values, dict):
        raise InputError(f"{config_path} has to hold a JSON object.")
    kind = values.get("peft_type")
    methods = {method.PEFT_TYPE: method for method in METHODS.values()}
    if not isinstance(kind, str) or kind not in methods:
        raise InputError(f"{config_path} has peft_type {kind!r}; Puna reads {', '.join(methods)}.")
    if values.get("trainable_token_indices"):
        raise InputError(
            f"{config_path} has trainable_token_indices: rows of the embedding beside the adapter, which Puna does not "
            "read. Merge the adapter into its model with PEFT."
        )
    method = methods[kind]
    maps, whole, virtual, own_head = _read_tensors(weights_path, method, values, head)
    settings = method.from_peft(values, tuple(maps), tuple(whole), str(config_path))
    return StoredAdapter(str(directory), settings, maps, whole, virtual, own_head)


def _read_tensors(
    path: Path, method: type[Method], values: Mapping[str, Any], head: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], Tensor | None, dict[str, Tensor]]:
    """What `StoredAdapter` holds as tensors, whole, virtual and head."""
    file = open_safetensors(path)
    linear = method.linear(values) if issubclass(method, MapMethod) else None
    maps: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    own_head: dict[str, Tensor] = {}
    head_prefix = f"{method.PREFIX}{head}."
    virtual, unknown = None, []
    for key in file.keys():  # noqa: SIM118 (not a dictionary)
        if key == _VIRTUAL and issubclass(method, VirtualMethod):
            virtual = file.get_tensor(key)
        elif head and key.startswith(head_prefix):
            own_head[key.removeprefix(head_prefix)] = file.get_tensor(key)
        elif linear is not None and (found := _split(key.removeprefix(method.PREFIX), linear)):
            name, own = found
            maps.setdefault(name, {})[own] = file.get_tensor(key)
        elif name_whole := _own_name(key.removeprefix(method.PREFIX)):
            whole[name_whole] = file.get_tensor(key)
        else:
            unknown.append(key)
    if unknown:
        raise InputError(f"{path} holds tensors that Puna has no place for: {shorten(unknown)}.")
    own_part = virtual is not None if issubclass(method, VirtualMethod) else maps if linear else whole
    if not own_part:
        raise InputError(f"{path} holds no tensors of {method.kind}.")
    stored = [to_hf(name).rpartition(".")[0] for name in whole]
    stored += [head] * bool(own_head)
    if lacking := [m for m in values.get("modules_to_save") or () if not any(name.endswith(m) for name in stored)]:
        raise InputError(
            f"{path} is incomplete: it lacks {shorten(lacking)}, which {CONFIG_FILE} has as modules_to_save."
        )
    if linear and (half := [name for name, own in maps.items() if own.keys() != linear.FILE_NAMES.keys()]):
        raise InputError(f"{path} is incomplete: {shorten(half)} have only a part of the adapter's tensors.")
    return maps, whole, virtual, own_head


def _split(hf_key: str, linear: type[AdaptedLinear]) -> tuple[str, str] | None:
    """Names of the map and of the adapter's parameter that one of Hugging Face's stands for."""
    for own, suffix in linear.FILE_NAMES.items():
        stem = hf_key.removesuffix(f".{suffix}")
        if hf_key == f"{stem}.{suffix}" and (name := _own_name(f"{stem}.weight")):
            return name.removesuffix(".weight"), own
    return None


def _own_name(hf_key: str) -> str | None:
    """`from_hf`, if there is such a name."""
    try:
        return from_hf(hf_key)
    except KeyError:
        return None


def load_adapter(model: Transformer, directory: Path, head: str = "") -> Method:
    """Attach the adapter of a directory to a model, ready to be trained on or merged.

    Args:
        head: name of a module that the model has beside its own, a linear map, whose parameters are read too.

    Raises:
        InputError: see `read_adapter`; or it does not fit the model, or the model has adapters already.
    """
    stored = read_adapter(directory, head)
    refuse_adapters(model)
    stored.check(model)
    attach(model, stored.method)
    maps = adapted_maps(model)
    with torch.no_grad():
        for name, own in stored.tensors.items():
            for parameter_name, parameter in maps[name].own_parameters().items():
                parameter.copy_(own[parameter_name])
        for name, parameter in whole_parameters(model, stored.method).items():
            parameter.copy_(stored.whole[name])
        if (virtual := virtual_tokens(model)) and stored.virtual is not None:
            virtual.vectors.copy_(stored.virtual)
        for own_name, value in stored.head.items():
            model.get_submodule(head).get_parameter(own_name).copy_(value)
    return stored.method


def stored_parameters(model: Transformer, method: Method) -> dict[str, nn.Parameter]:
    """What a file holds of a model with this method attached, by its names there."""
    parameters = {
        f"{method.PREFIX}{hf_name(name)}.{adapted.FILE_NAMES[own]}": parameter
        for name, adapted in adapted_maps(model).items()
        for own, parameter in adapted.own_parameters().items()
    }
    whole = whole_parameters(model, method)
    parameters |= {f"{method.PREFIX}{to_hf(name)}": parameter for name, parameter in whole.items()}
    virtual = virtual_tokens(model)
    return parameters if virtual is None else parameters | {_VIRTUAL: virtual.vectors}


def save_adapter(
    model: Transformer,
    method: Method,
    directory: Path,
    *,
    base_model: str | None = None,
    head: str = "",
    settings: Mapping[str, Any] | None = None,
    manifest: Manifest | None = None,
) -> None:
    """Write a model's adapters as a directory that PEFT loads; whole or not at all.

    Args:
        method: with which they were attached.
        base_model: path or hub name of the model below, for those who read the directory.
        head: name of a module that the model has beside its own, which is written too.
        settings: more for adapter_config.json, or in place of what would be there.
        manifest: becomes `puna.json`.

    Raises:
        OSError: the disk is full, or cannot be written; nothing is left behind.
    """
    maps, whole = adapted_maps(model), whole_parameters(model, method)
    parameters = stored_parameters(model, method)
    assert parameters, "nothing was attached to the model"
    hf_names = {name: hf_name(name) for name in adaptable_names(model)}
    values: dict[str, Any] = {
        "peft_type": method.PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": sorted({to_hf(name).rpartition(".")[0] for name in whole} | {head} - {""}) or None,
        **method.to_peft(model.config, list(maps)),
        **(settings or {}),
    }
    if maps:
        targets = common_targets([hf_names[name] for name in maps], list(hf_names.values()))
        values.setdefault("target_modules", list(targets))
    if head:
        own_head = model.get_submodule(head).named_parameters()
        parameters |= {f"{method.PREFIX}{head}.{own}": parameter for own, parameter in own_head}
    tensors = {key: parameter.detach().cpu().contiguous() for key, parameter in parameters.items()}
    with atomic_path(directory) as fresh:
        fresh.mkdir()
        save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(fresh / CONFIG_FILE, values)
        if manifest is not None:
            manifest.write(fresh)
