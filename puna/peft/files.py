"""Adapter directories as PEFT reads and writes them: `adapter_config.json` and `adapter_model.safetensors`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from puna.compress.linear import QuantizedLinear
from puna.model.transformer import Linear, Transformer
from puna.peft.apply import adaptable_names, adapted_maps, attach, common_targets, refuse_adapters
from puna.peft.lora import LoRAConfig, LoRALinear
from puna.peft.method import AdaptedLinear, Method
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_json, write_json
from puna.runtime.manifest import Manifest
from puna.weights.huggingface import open_safetensors
from puna.weights.names import from_hf, to_hf
from puna.weights.stored import shorten

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

METHODS: Mapping[str, tuple[type[Method], type[AdaptedLinear]]] = {LoRAConfig.PEFT_TYPE: (LoRAConfig, LoRALinear)}
"""`peft_type` -> what configures it, and what it puts in a map's place."""

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter directory holds."""

    where: str
    """The directory, for errors."""
    method: Method
    """Its settings; its targets are the maps that it has tensors for, by name."""
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Name of a linear map -> name of an adapter's parameter -> its value."""

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
            assert isinstance(base, Linear | QuantizedLinear)
            expected = self.method.shapes(base.in_features, base.out_features)
            found = {parameter: tuple(tensor.shape) for parameter, tensor in own.items()}
            if found != expected:
                raise InputError(
                    f"The adapter in {self.where} does not fit this model and its {CONFIG_FILE}: {name} has {found}, "
                    f"but should have {expected}. Use it with the model that it was trained on."
                )


def read_adapter(directory: Path) -> StoredAdapter:
    """Read an adapter directory.

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
    if not isinstance(kind, str) or kind not in METHODS:
        raise InputError(f"{config_path} has peft_type {kind!r}; Puna reads {', '.join(METHODS)}.")
    if values.get("modules_to_save") or values.get("trainable_token_indices"):
        raise InputError(
            f"{config_path} has modules_to_save or trainable_token_indices: whole layers or rows beside the adapter, "
            "which Puna does not read. Merge the adapter into its model with PEFT."
        )
    method, module = METHODS[kind]
    tensors = _read_tensors(weights_path, module)
    return StoredAdapter(str(directory), method.from_peft(values, tuple(tensors), str(config_path)), tensors)


def _read_tensors(path: Path, module: type[AdaptedLinear]) -> dict[str, dict[str, Tensor]]:
    file = open_safetensors(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key in file.keys():  # noqa: SIM118 (not a dictionary)
        found = _split(key, module)
        if found is None:
            unknown.append(key)
        else:
            name, own = found
            tensors.setdefault(name, {})[own] = file.get_tensor(key)
    if unknown:
        raise InputError(f"{path} holds tensors that Puna has no place for: {shorten(unknown)}.")
    if not tensors:
        raise InputError(f"{path} holds no tensors.")
    if half := [name for name, own in tensors.items() if own.keys() != module.FILE_NAMES.keys()]:
        raise InputError(f"{path} is incomplete: {shorten(half)} have only a part of the adapter's tensors.")
    return tensors


def _split(key: str, module: type[AdaptedLinear]) -> tuple[str, str] | None:
    """Names of the map and of the adapter's parameter that a file's key stands for."""
    for own, suffix in module.FILE_NAMES.items():
        stem = key.removeprefix(_PREFIX).removesuffix(f".{suffix}")
        if key == f"{_PREFIX}{stem}.{suffix}":
            try:
                return from_hf(f"{stem}.weight").removesuffix(".weight"), own
            except KeyError:
                return None
    return None


def load_adapter(model: Transformer, directory: Path) -> Method:
    """Attach the adapter of a directory to a model, ready to be trained on or merged.

    Raises:
        InputError: see `read_adapter`; or it does not fit the model, or the model has adapters already.
    """
    stored = read_adapter(directory)
    refuse_adapters(model)
    stored.check(model)
    attach(model, stored.method)
    maps = adapted_maps(model)
    with torch.no_grad():
        for name, own in stored.tensors.items():
            for parameter_name, parameter in maps[name].own_parameters().items():
                parameter.copy_(own[parameter_name])
    return stored.method


def save_adapter(
    model: Transformer,
    method: Method,
    directory: Path,
    *,
    base_model: str | None = None,
    manifest: Manifest | None = None,
) -> None:
    """Write a model's adapters as a directory that PEFT loads; whole or not at all.

    Args:
        method: with which they were attached.
        base_model: path or hub name of the model below, for those who read the directory.
        manifest: becomes `puna.json`.

    Raises:
        OSError: the disk is full, or cannot be written; nothing is left behind.
    """
    maps = adapted_maps(model)
    assert maps, "the model has no adapters"
    hf_names = {name: to_hf(f"{name}.weight").removesuffix(".weight") for name in adaptable_names(model)}
    targets = common_targets([hf_names[name] for name in maps], list(hf_names.values()))
    values: dict[str, Any] = {
        "peft_type": method.PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": list(targets),
        **method.to_peft(),
    }
    tensors = {
        f"{_PREFIX}{hf_names[name]}.{adapted.FILE_NAMES[own]}": parameter.detach().cpu().contiguous()
        for name, adapted in maps.items()
        for own, parameter in adapted.own_parameters().items()
    }
    with atomic_path(directory) as fresh:
        fresh.mkdir()
        save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(fresh / CONFIG_FILE, values)
        if manifest is not None:
            manifest.write(fresh)
