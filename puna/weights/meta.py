"""Meta's own checkpoints: `params.json` and `consolidated.NN.pth`, one file per model-parallel rank.

Names, formula and split follow llama-models (models/llama3/model.py, args.py). Meta's rotary positions turn pairs
(2i, 2i + 1), Puna's (i, i + K/2), so the rows of the query and key projections are permuted on the way.

Shapes: H heads, K head dimension, D model dimension.
"""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.config import parse_config
from puna.model.config import LlamaConfig, RopeScaling
from puna.model.presets import PRESETS
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_json
from puna.runtime.manifest import FILE_NAME as MANIFEST_FILE
from puna.runtime.manifest import Manifest
from puna.weights.names import to_meta
from puna.weights.stored import StoredTensors, copy_weights, shorten, transfer_progress

PARAMS_FILE = "params.json"

BEYOND_PARAMS = "beyond_params_json"
"""Key of the manifest's results under which `save_meta` keeps what `params.json` has no place for."""

_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"

# The dimension along which model-parallel ranks hold a part; replicated where there is none. The embedding's depends
# on the generation, see `_split_dim`.
_SPLIT_DIM = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}

# In params.json, a true value of one of these means another architecture or another storage.
_UNSUPPORTED = ("quantization_args", "lora_args", "vision_model", "vision_args", "moe_args", "use_qk_norm", "ffn_exp")

# Llama 3.2 is shipped without its factor, and Meta's code applies Llama 3.1's; the published model has 32.
_FACTOR_32 = {(config.dim, config.num_layers) for name, config in PRESETS.items() if name.startswith("llama-3.2")}


def interleave(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection from Puna's order, [i, i + K/2], to Meta's, [2i, 2i + 1], in every head."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def deinterleave(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of `interleave`."""
    return weight.reshape(num_heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def meta_hidden_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Width of the feed-forward by the formula in llama-models, models/llama3/model.py, FeedForward."""
    hidden_dim = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden_dim = int(ffn_dim_multiplier * hidden_dim)
    return multiple_of * ((hidden_dim + multiple_of - 1) // multiple_of)


def read_meta_config(path: Path) -> LlamaConfig:
    """The configuration of a Meta checkpoint.

    `params.json` says neither how long the context is nor whether the embeddings are tied. If Puna wrote the
    checkpoint the manifest beside it does; if not, the context is that of the release which has these parameters,
    and embeddings are tied where the output projection is absent or equal to the embedding.

    Args:
        path: the checkpoint's directory, or a weight file in it.

    Raises:
        InputError: `params.json` is absent or incomplete, or asks for what Puna does not compute.
    """
    shards = _shard_paths(path)
    params_path = shards[0].parent / PARAMS_FILE
    if not params_path.exists():
        raise InputError(
            f"{shards[0]} has no {PARAMS_FILE} beside it. The number of heads, among others, cannot be told from "
            f'the weights: put a {PARAMS_FILE} there, such as {{"dim": 4096, "n_layers": 32, "n_heads": 32, '
            '"n_kv_heads": 8, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, '
            '"rope_theta": 500000.0}.'
        )
    params = read_json(params_path)
    if not isinstance(params, dict):
        raise InputError(f"{params_path} has to hold a JSON object.")
    if odd := [key for key in _UNSUPPORTED if params.get(key)]:
        raise InputError(f"{params_path} has {', '.join(odd)}, which Puna does not support.")
    try:
        config = _config_of_params(params)
    except KeyError as error:
        raise InputError(f"{params_path} lacks {error.args[0]}.") from error
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{params_path}: {error}") from error

    contents = [_load_shard(shard) for shard in shards]
    if _EMBEDDING not in contents[0]:
        raise InputError(f"{shards[0]} has no {_EMBEDDING}: these are not the weights of a Llama in Meta's names.")
    if params.get("vocab_size", -1) < 0:
        config = replace(config, vocab_size=_merged_shape(_EMBEDDING, contents, config.dim)[0])
    manifest_path = params_path.parent / MANIFEST_FILE
    beyond = Manifest.read(params_path.parent).results.get(BEYOND_PARAMS) if manifest_path.exists() else None
    if beyond is None:
        beyond = {"tie_embeddings": _is_tied(contents)}
    return parse_config(LlamaConfig, asdict(config) | beyond, source=str(params_path))


def _config_of_params(params: Mapping[str, Any]) -> LlamaConfig:
    dim, num_heads = params["dim"], params["n_heads"]
    norm_eps = params.get("norm_eps", 1e-5)
    rope_theta = params.get("rope_theta") or 10_000.0
    scaling = None
    if params.get("use_scaled_rope"):
        scaling = RopeScaling(
            kind="llama3",
            factor=params.get("rope_scaling_factor") or (32.0 if (dim, params["n_layers"]) in _FACTOR_32 else 8.0),
            high_freq_factor=params.get("rope_high_freq_factor") or 4.0,
        )
    return LlamaConfig(
        vocab_size=max(params.get("vocab_size", -1), 1),
        dim=dim,
        num_layers=params["n_layers"],
        num_heads=num_heads,
        num_kv_heads=params.get("n_kv_heads") or num_heads,
        head_dim=dim // num_heads,
        hidden_dim=meta_hidden_dim(dim, params.get("multiple_of", 256), params.get("ffn_dim_multiplier")),
        context_length=_published_context(rope_theta, norm_eps, scaling),
        norm_eps=norm_eps,
        rope_theta=rope_theta,
        rope_scaling=scaling,
    )


def _published_context(rope_theta: float, norm_eps: float, scaling: RopeScaling | None) -> int:
    """Context in tokens of the Llama release with these parameters: 3.1 and later, 3, Code Llama, 1, 2."""
    if scaling is not None:
        return 131_072
    by_theta = {500_000.0: 8192, 1_000_000.0: 16_384}
    return by_theta.get(rope_theta, 2048 if norm_eps == 1e-6 else 4096)


def _is_tied(shards: list[dict[str, Tensor]]) -> bool:
    if _OUTPUT not in shards[0]:
        return True
    if len(shards) > 1:  # the published models with tied embeddings are small and come in one file
        return False
    embedding, output = shards[0][_EMBEDDING], shards[0][_OUTPUT]
    # The first row first: it spares reading both whole.
    return torch.equal(embedding[:1], output[:1]) and torch.equal(embedding, output)


def meta_tensors(path: Path, config: LlamaConfig) -> StoredTensors:
    """The tensors of a Meta checkpoint, joined from its shards and permuted as they are read.

    Args:
        path: the checkpoint's directory, or a weight file in it.
        config: its configuration; see `read_meta_config`.

    Raises:
        InputError: a file is missing, cut short, or holds anything but tensors; the shards do not belong together.
    """
    paths = _shard_paths(path)
    shards = [_load_shard(shard) for shard in paths]
    names = [name for name in shards[0] if name != "rope.freqs"]  # a constant
    for shard_path, shard in zip(paths, shards, strict=True):
        if odd := (set(names) ^ set(shard)) - {"rope.freqs"}:
            raise InputError(
                f"{shard_path} and {paths[0].name} do not hold the same tensors: {shorten(sorted(odd))} is in one "
                "of them only. Are these the shards of one model?"
            )
    heads = {"wq": config.num_heads, "wk": config.num_kv_heads}

    def read(name: str) -> Tensor:
        parts = [shard[name] for shard in shards]
        dim = _split_dim(name, parts[0].shape, config.dim)
        if dim is None and any(not torch.equal(part, parts[0]) for part in parts[1:]):
            raise InputError(f"{name} differs between the shards in {paths[0].parent}: they are of several models.")
        whole = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim)
        num_heads = heads.get(_kind(name))
        return whole if num_heads is None else deinterleave(whole, num_heads)

    return StoredTensors(
        where=str(path),
        shapes={name: _merged_shape(name, shards, config.dim) for name in names},
        dtypes={name: shards[0][name].dtype for name in names},
        read=read,
        file_name=to_meta,
    )


def load_meta_weights(model: Transformer, path: Path) -> None:
    """Copy the weights of a Meta checkpoint into `model`, whatever its dtype and device.

    Raises:
        InputError: see `meta_tensors` and `copy_weights`.
    """
    copy_weights(model, meta_tensors(path, model.config))


def _shard_paths(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    shards = sorted(path.glob("consolidated.*.pth"))
    if shards:
        expected = [f"consolidated.{rank:02}.pth" for rank in range(int(shards[-1].name.split(".")[1]) + 1)]
        if absent := sorted(set(expected) - {shard.name for shard in shards}):
            raise InputError(f"{path} lacks {', '.join(absent)}: the model is split over {len(expected)} files.")
        return shards
    others = sorted([*path.glob("*.pth"), *path.glob("*.pt")])
    if len(others) != 1:
        found = f"{len(others)} files *.pth and *.pt" if others else "no such file"
        raise InputError(f"{path} has to hold consolidated.00.pth and so on, or one *.pth or *.pt; it holds {found}.")
    return others


def _load_shard(path: Path) -> dict[str, Tensor]:
    """A memory-mapped file of tensors by name; nothing in it is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is broken, or holds more than tensors, which could run code when it is read, so Puna does not "
            "read it. Save its state dictionary alone, or use the safetensors release."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is not a whole PyTorch file ({reason}). Was its download interrupted?") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path} has to hold a dictionary of tensors, as Meta's checkpoints do.")
    return content


def _kind(name: str) -> str:
    """`wq` of layers.3.attention.wq.weight."""
    return name.split(".")[-2] if "." in name else name


def _split_dim(name: str, shard_shape: torch.Size, dim: int) -> int | None:
    """The dimension along which shards hold parts of a tensor; None where each holds all of it.

    Llama 1 and 2 split the embedding's columns, Llama 3 its rows (whole columns give it away).
    """
    if name == _EMBEDDING:
        return 0 if shard_shape[1] == dim else 1
    return _SPLIT_DIM.get(_kind(name))


def _merged_shape(name: str, shards: list[dict[str, Tensor]], dim: int) -> list[int]:
    shape = list(shards[0][name].shape)
    split = _split_dim(name, shards[0][name].shape, dim)
    if split is not None and split < len(shape):
        shape[split] = sum(shard[name].shape[split] for shard in shards)
    return shape


def save_meta(
    model: Transformer,
    directory: Path,
    *,
    manifest: Manifest,
    dtype: torch.dtype | None = None,
    num_shards: int = 1,
) -> None:
    """Write a Meta checkpoint into `directory`, which exists: weights, `params.json` and the manifest.

    Args:
        manifest: of the conversion; to it is added what `params.json` cannot say, so that reading gives the same
            configuration again.
        dtype: to store the weights in; None keeps the parameters'.
        num_shards: model-parallel ranks to split the weights for.

    Raises:
        InputError: Meta's format cannot hold this model, or it cannot be split so.
        OSError: the disk is full, or cannot be written.
    """
    config = model.config
    params = meta_params(config)
    _refuse_uneven_split(config, num_shards)
    parameters: dict[str, Tensor] = {to_meta(name): parameter for name, parameter in model.named_parameters()}
    parameters[_OUTPUT] = model.output.weight  # also where it is tied
    num_bytes = sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters.values())
    with transfer_progress("Writing weights", num_bytes) as advance:
        for rank in range(num_shards):
            shard = {
                name: _shard_of(name, parameter.detach(), rank, num_shards, config, dtype)
                for name, parameter in parameters.items()
            }
            path = directory / f"consolidated.{rank:02}.pth"
            try:
                torch.save(shard, path)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"{path} could not be written: {error}") from error
            advance(sum(tensor.nbytes for tensor in shard.values()))
    write_json(directory / PARAMS_FILE, params)
    beyond = {"context_length": config.context_length, "tie_embeddings": config.tie_embeddings}
    replace(manifest, results=manifest.results | {BEYOND_PARAMS: beyond}).write(directory)


def meta_params(config: LlamaConfig) -> dict[str, Any]:
    """The content of a `params.json`.

    Raises:
        InputError: Meta's code has no such model; the message says what is in the way.
    """
    scaling = config.rope_scaling
    obstacles = {
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "a head_dim other than dim / num_heads": config.head_dim * config.num_heads != config.dim,
        "linear rope_scaling": scaling is not None and scaling.kind == "linear",
        "rope_scaling with another low_freq_factor or original_context_length than Llama 3.1": (
            scaling is not None
            and scaling.kind == "llama3"
            and (scaling.low_freq_factor, scaling.original_context_length) != (1.0, 8192)
        ),
    }
    if found := [name for name, is_there in obstacles.items() if is_there]:
        raise InputError(
            f"This model has {' and '.join(found)}, which Meta's format and code do not have. Convert it to the "
            'Hugging Face format (to = "hf").'
        )
    params = {
        "dim": config.dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        **feed_forward_params(config.dim, config.hidden_dim),
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "use_scaled_rope": scaling is not None,
    }
    if scaling is not None:
        # Meta's code takes these two from params.json since Llama 4; earlier code ignores them and takes 8 and 4.
        params |= {"rope_scaling_factor": scaling.factor, "rope_high_freq_factor": scaling.high_freq_factor}
    return params


def feed_forward_params(dim: int, hidden_dim: int) -> dict[str, Any]:
    """`multiple_of` and, if needed, `ffn_dim_multiplier` for which `meta_hidden_dim` is exactly `hidden_dim`.

    Round numbers such as Meta's are preferred.
    """
    ratio = hidden_dim / int(2 * (4 * dim) / 3)
    multipliers = (None, round(ratio, 1), round(ratio, 2), round(ratio, 4), ratio)
    usual = [(multiple_of, multiplier) for multiplier in multipliers for multiple_of in (256, 1024, 4096)]
    for multiple_of, multiplier in [*usual, *((hidden_dim, multiplier) for multiplier in multipliers)]:
        if meta_hidden_dim(dim, multiple_of, multiplier) == hidden_dim:
            params: dict[str, Any] = {"multiple_of": multiple_of}
            return params if multiplier is None else params | {"ffn_dim_multiplier": multiplier}
    raise AssertionError(f"no parameters give {hidden_dim} from {dim}")


def _refuse_uneven_split(config: LlamaConfig, num_shards: int) -> None:
    split = {"num_kv_heads": config.num_kv_heads, "hidden_dim": config.hidden_dim, "dim": config.dim}
    split["vocab_size"] = config.vocab_size
    uneven = [f"{name} ({size})" for name, size in split.items() if num_shards < 1 or size % num_shards]
    if uneven:
        raise InputError(f"shards is {num_shards}, which does not divide {', '.join(uneven)} evenly.")


def _shard_of(
    name: str, weight: Tensor, rank: int, num_shards: int, config: LlamaConfig, dtype: torch.dtype | None
) -> Tensor:
    """One rank's part of a parameter, in Meta's layout, in a storage of its own (torch.save writes whole storages)."""
    heads = {"wq": config.num_heads, "wk": config.num_kv_heads}.get(_kind(name))
    if heads is not None:
        weight = interleave(weight, heads)
    # Llama 3 splits rows of the embedding; it is told by its base of the rotary frequencies.
    dim = int(config.rope_theta != 500_000.0) if name == _EMBEDDING else _SPLIT_DIM.get(_kind(name))
    part = weight if dim is None or num_shards == 1 else weight.chunk(num_shards, dim)[rank]
    part = part.to("cpu", dtype or part.dtype).contiguous()
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()
