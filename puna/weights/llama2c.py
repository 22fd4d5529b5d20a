"""The legacy `.bin` of llama2.c, in which the tinyllamas models are published.

karpathy/llama2.c, export.py, version 0: seven little-endian int32 (dim, hidden_dim, layers, heads, key/value heads,
vocabulary, context), then float32: every
kind of parameter for all layers in turn, then tables of rotary angles. A negative vocabulary size says that an output
projection follows. Pairs of a rotation are interleaved, as in Meta's checkpoints.

Shapes: L layers, D model dimension, Q queries (heads x head dimension), G keys or values, F feed-forward, V vocabulary.
"""

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from puna.model.config import LlamaConfig
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.weights.meta import deinterleave
from puna.weights.names import to_meta
from puna.weights.stored import StoredTensors, copy_weights

_HEADER = struct.Struct("<7i")
_NEW_MAGIC = 0x616B3432


def read_llama2c_config(path: Path) -> LlamaConfig:
    """The configuration in the header; what it does not say is llama2.c's constant.

    Raises:
        InputError: the file is not of this format, or its size is not what the header says.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise InputError(f"{path} is cut short: it has {len(header)} bytes, less than the header of llama2.c.")
    dim, hidden_dim, num_layers, num_heads, num_kv_heads, vocab_size, context_length = _HEADER.unpack(header)
    if dim == _NEW_MAGIC:
        raise InputError(
            f"{path} is a .bin of llama2.c's version 1 or 2. Puna reads the legacy version 0; export it with "
            "export.py --version 0, or convert the model that it came from."
        )
    try:
        config = LlamaConfig(
            vocab_size=abs(vocab_size),
            dim=dim,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=dim // max(num_heads, 1),
            hidden_dim=hidden_dim,
            context_length=context_length,
            tie_embeddings=vocab_size > 0,
        )
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path} is not a .bin of llama2.c: {error}") from error
    expected = _HEADER.size + 4 * sum(math.prod(shape) for _, shape in _layout(config))
    if (size := path.stat().st_size) != expected:
        what = "cut short" if size < expected else "too long"
        raise InputError(f"{path} is {what}: it has {size:,} bytes, and its header asks for {expected:,}.")
    return config


def llama2c_tensors(path: Path) -> StoredTensors:
    """The tensors of the file, memory-mapped.

    Raises:
        InputError: see `read_llama2c_config`.
    """
    config = read_llama2c_config(path)
    floats = torch.from_file(str(path), size=path.stat().st_size // 4, dtype=torch.float32)
    position = _HEADER.size // 4
    tensors: dict[str, Tensor] = {}
    for name, shape in _layout(config):
        values = floats[position : position + math.prod(shape)].view(shape)
        position += values.numel()
        if name.startswith("layers.#."):
            tensors |= {name.replace("#", str(layer)): value for layer, value in enumerate(values)}
        elif not name.startswith("freqs"):
            tensors[name] = values
    heads = {"wq": config.num_heads, "wk": config.num_kv_heads}

    def read(name: str) -> Tensor:
        num_heads = heads.get(name.split(".")[-2])
        return tensors[name] if num_heads is None else deinterleave(tensors[name], num_heads)

    return StoredTensors(
        where=str(path),
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        dtypes=dict.fromkeys(tensors, torch.float32),
        read=read,
        file_name=to_meta,
    )


def load_llama2c_weights(model: Transformer, path: Path) -> None:
    """Copy the weights of the file into `model`.

    Raises:
        InputError: see `read_llama2c_config` and `copy_weights`.
    """
    copy_weights(model, llama2c_tensors(path))


def _layout(config: LlamaConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names (Meta's) and shapes of the arrays, in the order of the file."""
    L, D, F, V = config.num_layers, config.dim, config.hidden_dim, config.vocab_size
    Q, G = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    angles = (config.context_length, config.head_dim // 2)
    arrays: list[tuple[str, tuple[int, ...]]] = [
        ("tok_embeddings.weight", (V, D)),
        ("layers.#.attention_norm.weight", (L, D)),
        ("layers.#.attention.wq.weight", (L, Q, D)),
        ("layers.#.attention.wk.weight", (L, G, D)),
        ("layers.#.attention.wv.weight", (L, G, D)),
        ("layers.#.attention.wo.weight", (L, D, Q)),
        ("layers.#.ffn_norm.weight", (L, D)),
        ("layers.#.feed_forward.w1.weight", (L, F, D)),
        ("layers.#.feed_forward.w2.weight", (L, D, F)),
        ("layers.#.feed_forward.w3.weight", (L, F, D)),
        ("norm.weight", (D,)),
        ("freqs_cos", angles),
        ("freqs_sin", angles),
    ]
    return arrays if config.tie_embeddings else [*arrays, ("output.weight", (V, D))]
