"""GGUF models, in and out: llama.cpp's names, metadata and order of rows (llama.cpp, convert_hf_to_gguf.py).

llama.cpp turns neighbours (2i, 2i + 1) of a head in its `llama` models, as Meta's code does, so rows of the query and
key projections are permuted on the way; in its `qwen2` and `qwen3` models it turns (i, i + K/2) as Puna does.

Shapes: H heads, K head dimension, P rotated pairs (K / 2).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.model.config import LlamaConfig, RopeScaling
from puna.model.rope import frequencies
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.gguf_file import BY_NAME, Encoding, GgufFile, read_gguf, write_gguf
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.gguf import gguf_vocabulary
from puna.weights.gguf_blocks import dequantize, quantize
from puna.weights.meta import deinterleave, interleave
from puna.weights.names import to_gguf
from puna.weights.stored import StoredTensors, transfer_progress

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k"]
"""What Puna stores weight matrices in; norms and biases are always in float32, as llama.cpp wants them."""

_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k": 14, "bf16": 32}
_QUANTIZATION_VERSION = 2

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
EMBEDDING, OUTPUT, _ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# A file that claims more is not a model but a mistake, or an attack on memory.
_MAX_CONTEXT = 1 << 28

# Frequencies computed by others in float32.
_FREQUENCY_TOLERANCE = 1e-4


def read_gguf_config(path: Path) -> LlamaConfig:
    """The configuration in a GGUF file's metadata; every size in it is also that of the tensors in the file.

    Raises:
        InputError: the file is broken or incomplete, or the model is something that Puna does not compute.
    """
    return _config(read_gguf(path))


def _config(file: GgufFile) -> LlamaConfig:
    architecture = file.get("general.architecture", str)
    if architecture not in _ARCHITECTURES:
        raise InputError(
            f"{file.path} holds a model of the architecture {architecture!r}; Puna reads {', '.join(_ARCHITECTURES)}."
        )
    if (file.get("split.count", int) or 1) > 1:
        raise InputError(f"{file.path} is one part of a split model; join it with llama-gguf-split --merge.")

    def integer(key: str, default: int | None = None) -> int:
        value = file.get(f"{architecture}.{key}", int)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{file.path} lacks {architecture}.{key}.")
        return value

    def number(key: str, default: float) -> float:
        value = file.get(f"{architecture}.{key}", float)
        value = default if value is None else value
        if not 0 < value < math.inf:
            raise InputError(f"{file.path}: {architecture}.{key} is {value}; it has to be a positive number.")
        return value

    for key in ("expert_count", "attention.sliding_window"):
        if integer(key, 0):
            raise InputError(f"{file.path} has {architecture}.{key}, which Puna does not support.")
    if EMBEDDING not in file.tensors:
        raise InputError(f"{file.path} holds a vocabulary, but no model: there is no tensor {EMBEDDING}.")
    num_heads = integer("attention.head_count")
    dim, num_layers = integer("embedding_length"), integer("block_count")
    head_dim = integer("attention.key_length", dim // max(num_heads, 1))
    if integer("rope.dimension_count", head_dim) != head_dim or integer("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{file.path} has heads whose key, value and rotated parts are of several widths.")
    if not 1 <= (context_length := integer("context_length")) <= _MAX_CONTEXT:
        raise InputError(f"{file.path} has {architecture}.context_length = {context_length}.")
    try:
        config = LlamaConfig(
            vocab_size=file.tensors[EMBEDDING].shape[0],
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            hidden_dim=integer("feed_forward_length"),
            context_length=context_length,
            norm_eps=number("attention.layer_norm_rms_epsilon", 1e-5),
            rope_theta=number("rope.freq_base", 10_000.0),
            tie_embeddings=OUTPUT not in file.tensors,
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{file.path}: {error}") from error
    _check_sizes(file, config)
    match file.get(f"{architecture}.rope.scaling.type", str):
        case None | "none":
            scaling = None
        case "linear":
            scaling = RopeScaling(kind="linear", factor=number("rope.scaling.factor", 1.0))
        case other:
            raise InputError(f"{file.path} scales rotary positions by {other!r}; Puna has 'linear' and 'llama3'.")
    config = replace(config, rope_scaling=scaling)
    return _with_rope_factors(file, config) if _ROPE_FACTORS in file.tensors else config


def _check_sizes(file: GgufFile, config: LlamaConfig) -> None:
    """Refuse sizes that the tensors do not have, before memory is asked for by them."""
    query_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    expected = {
        EMBEDDING: (config.vocab_size, config.dim),
        "blk.0.attn_q.weight": (query_dim, config.dim),
        "blk.0.attn_k.weight": (kv_dim, config.dim),
        "blk.0.ffn_gate.weight": (config.hidden_dim, config.dim),
        f"blk.{config.num_layers - 1}.attn_norm.weight": (config.dim,),
    }
    for name, shape in expected.items():
        found = file.tensors[name].shape if name in file.tensors else None
        if found != shape:
            raise InputError(f"{file.path}: {name} is {found or 'absent'}, and its metadata asks for {shape}.")


def _with_rope_factors(file: GgufFile, config: LlamaConfig) -> LlamaConfig:
    """The configuration whose scaling divides the frequencies by the factors that llama.cpp stores."""
    plain = frequencies(config)
    factors = _values(file, _ROPE_FACTORS).float()
    if factors.shape == plain.shape and (factors == 1).all():
        return config
    if config.rope_scaling is None and factors.shape == plain.shape and factors.isfinite().all():
        for scaling in _fitting_scalings(plain, factors):
            scaled = replace(config, rope_scaling=scaling)
            if torch.allclose(frequencies(scaled) * factors, plain, rtol=_FREQUENCY_TOLERANCE, atol=0):
                return scaled
    raise InputError(f"{file.path} scales rotary positions by factors ({_ROPE_FACTORS}) other than those of Llama 3.1.")


def _fitting_scalings(plain_P: Tensor, factors_P: Tensor) -> Iterator[RopeScaling]:
    """Scalings that may have given these factors: the published one first.

    In the blend between its two ends a factor is 1 / (keep + (1 - keep) / factor), and keep is
    (turns - low) / (high - low), a line in the frequency; only ratios of turns, low and high count, so low is 1.
    """
    factor = factors_P.max().item()
    if factor <= 0:
        return
    yield RopeScaling(kind="llama3", factor=factor)
    keep_P = ((1 / factors_P - 1 / factor) / max(1 - 1 / factor, 1e-9)).double()
    between = (keep_P > 1e-3) & (keep_P < 1 - 1e-3)
    turns_per_length_P = plain_P.double() / (2 * math.pi)
    if between.sum() >= 2:
        x, y = turns_per_length_P[between], keep_P[between]
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        ratio = -(y.mean() - slope * x.mean())  # low / (high - low)
        if slope > 0 and ratio > 0:
            yield _llama3_scaling(factor, 1 + 1 / ratio.item(), (slope / ratio).item())
    elif between.any():
        length = (1 + 3 * keep_P[between]) / turns_per_length_P[between]
        yield _llama3_scaling(factor, 4.0, length.item())
    elif (keep_P > 0.5).any():
        slow, fast = turns_per_length_P[keep_P <= 0.5].max(), turns_per_length_P[keep_P > 0.5].min()
        yield _llama3_scaling(factor, 1.0, (1 / (slow * fast).sqrt()).item())


def _llama3_scaling(factor: float, high_freq_factor: float, length: float) -> RopeScaling:
    high_freq_factor = max(float(f"{high_freq_factor:.5g}"), 1.001)
    return RopeScaling("llama3", factor, 1.0, high_freq_factor, max(round(min(length, _MAX_CONTEXT)), 1))


def _values(file: GgufFile, name: str) -> Tensor:
    tensor = file.tensors[name]
    return dequantize(torch.from_numpy(file.blocks(name)), tensor.encoding).view(tensor.shape)


def gguf_tensors(path: Path) -> StoredTensors:
    """The tensors of a GGUF file, memory-mapped; quantised ones are turned into float32 as they are read.

    Norms and biases, which these files hold in float32, count as of the matrices' dtype where that holds them exactly,
    so that a file in bfloat16 gives a model in bfloat16.

    Raises:
        InputError: see `read_gguf_config`.
    """
    file = read_gguf(path)
    _config(file)  # says what is wrong with it
    names = [name for name in file.tensors if name != _ROPE_FACTORS]
    return StoredTensors(
        where=str(path),
        shapes={name: file.tensors[name].shape for name in names},
        dtypes=_dtypes(file, names),
        read=lambda name: row_order(file, name, _values(file, name)),
        file_name=to_gguf,
    )


def row_order(file: GgufFile, name: str, values: Tensor) -> Tensor:
    """What belongs to the rows of a tensor, [N, ...] in the file's order, in Puna's."""
    part = name.split(".")[-2]
    if file.get("general.architecture", str) != "llama" or part not in ("attn_q", "attn_k"):
        return values
    num_heads = file.get("llama.attention.head_count", int)
    if part == "attn_k":
        num_heads = file.get("llama.attention.head_count_kv", int) or num_heads
    assert num_heads is not None, "the configuration has been read"
    return _deinterleave(values, num_heads)


def _dtypes(file: GgufFile, names: list[str]) -> dict[str, torch.dtype]:
    own = {name: _DTYPES.get(file.tensors[name].encoding.name, torch.float32) for name in names}
    matrices = {own[name] for name in names if len(file.tensors[name].shape) > 1}
    if len(matrices) == 1:
        (dtype,) = matrices
        for name in names:
            if own[name] != dtype and torch.equal(values := _values(file, name), values.to(dtype).to(values.dtype)):
                own[name] = dtype
    return own


def _interleave(values: Tensor, num_heads: int) -> Tensor:
    """`puna.weights.meta.interleave`, of a bias as well."""
    return interleave(values.view(len(values), -1), num_heads).view(values.shape)


def _deinterleave(values: Tensor, num_heads: int) -> Tensor:
    return deinterleave(values.view(len(values), -1), num_heads).view(values.shape)


def save_gguf(
    model: Transformer,
    path: Path,
    *,
    type: GgufType,
    pure: bool = False,
    tokenizer: Tokenizer | None = None,
    name: str | None = None,
) -> None:
    """Write a GGUF file that llama.cpp runs.

    Args:
        type: of the weight matrices; see `encoding_of` for the exceptions.
        pure: see `encoding_of`.
        tokenizer: goes into the file; llama.cpp runs no file without one.
        name: what llama.cpp shows as the model's name.

    Raises:
        InputError: llama.cpp has no such model, or no such tokenizer.
        OSError: the disk is full, or cannot be written.
    """
    config = model.config
    metadata = _metadata(config, type, name)
    if tokenizer is not None:
        metadata |= gguf_vocabulary(tokenizer, config.vocab_size)
    interleaves = metadata["general.architecture"] == "llama"
    tensors = {to_gguf(name): parameter.detach() for name, parameter in model.named_parameters()}
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if interleaves else {}
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        tensors[_ROPE_FACTORS] = frequencies(replace(config, rope_scaling=None)) / frequencies(config)
    encodings = {name: encoding_of(name, tensor.shape, type, pure) for name, tensor in tensors.items()}

    with transfer_progress("Writing weights", sum(tensor.nbytes for tensor in tensors.values())) as advance:

        def blocks() -> Iterator[NDArray[np.uint8]]:
            for name, tensor in tensors.items():
                values = tensor.to("cpu")
                if (num_heads := heads.get(name.split(".")[-2])) is not None:
                    values = _interleave(values, num_heads)
                yield quantize(values, encodings[name]).numpy()
                advance(tensor.nbytes)

        listed = [(name, tuple(tensor.shape), encodings[name]) for name, tensor in tensors.items()]
        write_gguf(path, metadata, listed, blocks())


def encoding_of(name: str, shape: tuple[int, ...], type: GgufType, pure: bool = False) -> Encoding:
    """What a tensor is stored in where matrices are asked for in `type`.

    Vectors are in F32. The embedding and the output projection of a 4-bit file are in Q8_0 unless `pure`, as four bits
    cost most there. A matrix whose rows are not whole blocks takes the next finer type: Q4_0 for Q4_K, F16 for the
    others.
    """
    if len(shape) == 1:
        return BY_NAME["F32"]
    if type.startswith("q4") and name in (EMBEDDING, OUTPUT) and not pure:
        type = "q8_0"
    finer: dict[GgufType, GgufType] = {"q4_k": "q4_0", "q4_0": "f16", "q8_0": "f16"}
    encoding = BY_NAME[type.upper()]
    return encoding if shape[-1] % encoding.block_elements == 0 else encoding_of(name, shape, finer[type], True)


@torch.no_grad()
def round_weights(model: Transformer, type: GgufType, pure: bool = False) -> None:
    """Give every parameter of a float32 model the value that `save_gguf` stores of it."""
    for name, parameter in model.named_parameters():
        encoding = encoding_of(to_gguf(name), tuple(parameter.shape), type, pure)
        parameter.copy_(dequantize(quantize(parameter.detach(), encoding), encoding).view(parameter.shape))


def _metadata(config: LlamaConfig, type: GgufType, name: str | None) -> dict[str, Any]:
    if config.qkv_bias and config.qk_norm:
        raise InputError("A model with both qkv_bias and qk_norm has no GGUF form: no family has both.")
    scaling = config.rope_scaling
    architecture = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    if scaling is not None and scaling.kind == "llama3" and architecture != "llama":
        raise InputError(
            f"llama.cpp runs a model with qkv_bias or qk_norm as {architecture}, where it has no rope_scaling of the "
            "kind llama3. This model has no GGUF form."
        )
    values: Mapping[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "embedding_length": config.dim,
        "block_count": config.num_layers,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if scaling is not None and scaling.kind == "linear":
        values = {**values, "rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    general: dict[str, Any] = {"architecture": architecture, "file_type": _FILE_TYPES[type]}
    if name is not None:
        general["name"] = name
    if type.startswith("q"):
        general["quantization_version"] = _QUANTIZATION_VERSION
    return {
        **{f"general.{key}": value for key, value in general.items()},
        **{f"{architecture}.{key}": value for key, value in values.items()},
    }
