"""Hugging Face model directories: `config.json` and safetensors, as `transformers` reads and writes them.

Both generations of `config.json` are read: `rope_theta` and `rope_scaling` (transformers 4), and `rope_parameters`
(transformers 5). The former are written, since both generations read them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from puna.model.config import LlamaConfig, RopeScaling
from puna.model.depths import Depths
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_json
from puna.weights.names import to_hf
from puna.weights.stored import StoredTensors, copy_weights, named_tensors, transfer_progress

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MAX_SHARD_BYTES = 5_000_000_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}
_OTHER_DTYPE = torch.bits8

GATED_SUFFIX = "_mixture_of_depths"
"""Ends the model_type of a model with gated layers, so that nobody takes it for a plain one."""
_DEPTHS_KEY = "mixture_of_depths"

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# What a config.json may ask for that Puna does not compute: key -> the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "hidden_act": (None, "silu"),
    "partial_rotary_factor": (None, 1.0),
}


def read_hf_config(directory: Path, *, head: str = "ForCausalLM") -> LlamaConfig:
    """The configuration in `directory/config.json`.

    Args:
        head: the end of the architecture's name that is expected, which says what is on the trunk.

    Raises:
        InputError: the file is absent or broken, a size is missing, or the model is something that Puna does not
            compute (another architecture, quantised weights, sliding windows, ...); the message names the key.
    """
    path = directory / CONFIG_FILE
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} has to hold a JSON object.")
    _refuse_unsupported(values, path, head)
    num_heads = _integer(values, "num_attention_heads", path)
    dim = _integer(values, "hidden_size", path)
    model_type = values["model_type"].removesuffix(GATED_SUFFIX)
    context_length = _integer(values, "max_position_embeddings", path, 2048)
    # What transformers' Qwen3Config takes for a missing head_dim; the others divide.
    default_head_dim = 128 if model_type == "qwen3" else dim // max(num_heads, 1)
    rope_theta, rope_scaling = _read_rope(values, context_length, path)
    try:
        return LlamaConfig(
            vocab_size=_integer(values, "vocab_size", path),
            dim=dim,
            num_layers=_integer(values, "num_hidden_layers", path),
            num_heads=num_heads,
            num_kv_heads=_integer(values, "num_key_value_heads", path, num_heads),
            head_dim=_integer(values, "head_dim", path, default_head_dim),
            hidden_dim=_integer(values, "intermediate_size", path),
            context_length=context_length,
            norm_eps=_number(values, "rms_norm_eps", path, 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def _refuse_unsupported(values: dict[str, Any], path: Path, head: str) -> None:
    def refuse(key: str, why: str = "") -> None:
        raise InputError(
            f"{path} has {key} = {values.get(key)!r}, which Puna does not support{why}. It reads dense models of "
            "the Llama, Qwen2 and Qwen3 families in floating point, with full attention."
        )

    if str(values.get("model_type")).removesuffix(GATED_SUFFIX) not in _ARCHITECTURES:
        refuse("model_type")
    if any(not str(name).endswith(head) for name in values.get("architectures") or []):
        refuse("architectures", f": a model {head} is wanted here")
    for key, harmless in _UNSUPPORTED.items():
        if values.get(key) not in harmless:
            refuse(key)
    if values.get("quantization_config") and quantization_config(path.parent) is None:
        refuse("quantization_config")
    if any(kind != "full_attention" for kind in values.get("layer_types") or []):
        refuse("layer_types")
    # Qwen writes a sliding_window even where it is switched off; Llama has no switch.
    if values.get("sliding_window") is not None and values.get("use_sliding_window", values["model_type"] == "llama"):
        refuse("sliding_window")


def read_depths(directory: Path) -> Depths | None:
    """Which layers of a model directory are gated (`puna.model.depths`); None for a plain model.

    Raises:
        InputError: config.json says that there are some, but not which.
    """
    path = directory / CONFIG_FILE
    values = read_json(path)
    if not str(values.get("model_type")).endswith(GATED_SUFFIX):
        return None
    try:
        return Depths(tuple(map(int, values[_DEPTHS_KEY]["layers"])), float(values[_DEPTHS_KEY]["capacity"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} lacks {_DEPTHS_KEY} with the gated layers and their capacity.") from error


def depths_config(values: dict[str, Any], depths: Depths) -> dict[str, Any]:
    """The `config.json` of a model with gated layers, from that of the plain one."""
    gated = {_DEPTHS_KEY: {"layers": list(depths.layers), "capacity": depths.capacity}}
    return values | {"model_type": values["model_type"] + GATED_SUFFIX} | gated


def quantization_config(directory: Path) -> dict[str, Any] | None:
    """How the weights of a model directory are stored as integers, if they are (`puna.compress`)."""
    values = read_json(directory / CONFIG_FILE).get("quantization_config")
    return values if isinstance(values, dict) and values.get("quant_method") == "compressed-tensors" else None


def _read_rope(values: dict[str, Any], context_length: int, path: Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, from either generation's keys."""
    key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError(f"{path}: {key} has to be one flat table; Puna has no positions that differ by layer.")
    rope = {"rope_theta": values.get("rope_theta"), **rope}
    theta = _number(rope, "rope_theta", path, 10_000.0)
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise InputError(f"{path}: {key} has a partial_rotary_factor; Puna rotates whole heads.")
    try:
        match kind:
            case "default":
                return theta, None
            case "linear":
                return theta, RopeScaling(kind="linear", factor=_number(rope, "factor", path))
            case "llama3":
                return theta, RopeScaling(
                    kind="llama3",
                    factor=_number(rope, "factor", path),
                    low_freq_factor=_number(rope, "low_freq_factor", path),
                    high_freq_factor=_number(rope, "high_freq_factor", path),
                    original_context_length=_integer(rope, "original_max_position_embeddings", path, context_length),
                )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    raise InputError(f"{path}: {key} has rope_type {kind!r}; Puna has 'default', 'linear' and 'llama3'.")


def _integer(values: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = _number(values, key, path, default)
    if not isinstance(value, int):
        raise InputError(f"{path}: {key} has to be a whole number, not {value!r}.")
    return value


def _number(values: Mapping[str, Any], key: str, path: Path, default: float | None = None) -> float:
    """The number under `key`; `default` where it is absent or null."""
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"{path} lacks {key}. Is it the config.json of a Llama, Qwen2 or Qwen3 model?")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{path}: {key} has to be a number, not {value!r}.")
    return value


def hf_config(
    config: LlamaConfig,
    dtype: torch.dtype,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
) -> dict[str, Any]:
    """The content of a `config.json` with which `transformers` 4 and 5 build this model.

    Args:
        dtype: what the weights are stored in.
        bos_id, eos_id, pad_id: from the tokenizer. Give no `pad_id` that is another token's too: `transformers`
            never updates the embedding of padding.

    Raises:
        InputError: no published family has this combination of flags.
    """
    if config.qkv_bias and config.qk_norm:
        raise InputError(
            "A model with both qkv_bias and qk_norm has no Hugging Face form: Qwen2 has the first, Qwen3 the "
            "second, and no family both. Train with one of them."
        )
    model_type = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _write_rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if model_type != "qwen2":
        values["attention_bias"] = False
    if model_type == "llama":
        values["mlp_bias"] = False
    else:
        values |= {"use_sliding_window": False, "sliding_window": None}
    return values


def _write_rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind == "llama3":
        values |= {
            "low_freq_factor": float(scaling.low_freq_factor),
            "high_freq_factor": float(scaling.high_freq_factor),
            "original_max_position_embeddings": scaling.original_context_length,
        }
    return values


def hf_tensors(directory: Path) -> StoredTensors:
    """The safetensors of a model directory, in one file or in shards listed by an index; nothing is read yet.

    Raises:
        InputError: there are none, one is cut short, or the index names a file that is not there.
    """
    paths: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in _weight_files(directory):
        file = open_safetensors(path)
        for name in file.keys():  # noqa: SIM118 (not a dictionary)
            if name.endswith("rotary_emb.inv_freq"):  # a constant that old versions of transformers stored
                continue
            header = file.get_slice(name)
            paths[name], shapes[name] = path, header.get_shape()
            dtypes[name] = _DTYPES.get(header.get_dtype(), _OTHER_DTYPE)

    def read(name: str) -> Tensor:
        # Opened for each tensor: what a mapping has read counts as this process's memory until it is gone.
        tensor: Tensor = open_safetensors(paths[name]).get_tensor(name)
        return tensor

    return StoredTensors(str(directory), shapes, dtypes, read, to_hf)


def load_hf_weights(model: Transformer, directory: Path) -> None:
    """Copy the weights of a model directory into `model`, whatever its dtype and device.

    Tensors are read one at a time from memory-mapped files, so that the model is in memory once.

    Raises:
        InputError: see `hf_tensors` and `copy_weights`.
    """
    copy_weights(model, hf_tensors(directory))


def _weight_files(directory: Path) -> list[Path]:
    if (directory / SINGLE_FILE).exists():
        return [directory / SINGLE_FILE]
    if not (directory / INDEX_FILE).exists():
        old = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
        hint = f" Save {old[0]} as safetensors first, for instance with transformers." if old else ""
        raise InputError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}.{hint}")
    index = read_json(directory / INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{directory / INDEX_FILE} has no weight_map, so it does not say where the weights are.")
    paths = [directory / str(name) for name in sorted(set(weight_map.values()))]
    if absent := [path.name for path in paths if not path.is_file()]:
        raise InputError(
            f"{directory / INDEX_FILE} names {', '.join(absent)}, which the directory does not hold. Was the "
            "download interrupted?"
        )
    return paths


def open_safetensors(path: Path) -> Any:
    """The tensors of a file, memory-mapped.

    Raises:
        InputError: it is cut short, or something else.
    """
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}). Interrupted downloads and Git LFS pointers look "
            "like this; fetch it again."
        ) from error


def save_hf_weights(
    model: Transformer,
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the weights into `directory` under Hugging Face's names, shard by shard.

    Args:
        dtype: to store them in; None keeps the parameters'.
        max_shard_bytes: size at which a new file begins. Where one file is enough there is no index.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    shards = list(_shards(model, dtype, max_shard_bytes))
    sizes = [sum(_num_bytes(tensor, dtype) for tensor in shard.values()) for shard in shards]
    weight_map: dict[str, str] = {}
    with transfer_progress("Writing weights", sum(sizes)) as advance:
        for number, (shard, size) in enumerate(zip(shards, sizes, strict=True), start=1):
            file_name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            _write(directory / file_name, shard, dtype)
            weight_map |= dict.fromkeys(shard, file_name)
            advance(size)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX_FILE, index)


def _write(path: Path, shard: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    tensors = {name: tensor.to("cpu", _stored_dtype(tensor, dtype)).contiguous() for name, tensor in shard.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def _shards(model: Transformer, dtype: torch.dtype | None, max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Parameters and buffers in the model's order, by Hugging Face's names, in parts of at most `max_shard_bytes`."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in named_tensors(model):
        num_bytes = _num_bytes(tensor, dtype)
        if shard and size + num_bytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[to_hf(name)] = tensor.detach()
        size += num_bytes
    yield shard


def _num_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * _stored_dtype(tensor, dtype).itemsize


def _stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
