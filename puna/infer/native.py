"""The model's layers by the native kernels, where they apply: one call for a forward in place of some ten per layer.

`Transformer.forward` over `PagedAttend` is the twin that says what is right, and takes over everywhere else.

Shapes: N tokens of a forward, D model dimension.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puna.compress.linear import QuantizedLinear
from puna.compress.multiply import native_map
from puna.infer.cache import KVPool
from puna.kernels.forward import HEAD_UNIT, NativeDecoder, NativeLayer, NativeMap, applicable
from puna.model.rope import frequencies, rotation
from puna.model.transformer import Layer, Linear, Transformer

_FEW_TOKENS = 8
"""Up to this many tokens, products with float weights are as fast as torch's, and the rest is faster."""


class NativeForward:
    """Hidden states of new tokens from a model's layers.

    Args:
        decoder: the layers.
        model: theirs.
        most_tokens: how many tokens are computed faster like this.
    """

    def __init__(self, decoder: NativeDecoder, model: Transformer, most_tokens: float) -> None:
        self._decoder = decoder
        self._model = model
        self.most_tokens = most_tokens

    @classmethod
    def of(cls, model: Transformer, pool: KVPool, max_context: int) -> "NativeForward | None":
        """None where the kernels do not read this model or cache, or would be no faster."""
        config = model.config
        layers = [_native_layer(layer) for layer in model.layers if type(layer) is Layer]
        known = [layer for layer in layers if layer is not None]
        stored = pool.keys[0].dtype in (torch.float32, torch.bfloat16)
        if not stored or len(known) < config.num_layers or config.head_dim % HEAD_UNIT:
            return None
        device = torch.device("cpu")
        cosines, sines = rotation(torch.arange(max_context), frequencies(config, device), torch.float32)
        decoder = NativeDecoder(
            known,
            model.norm.weight,
            norm_eps=config.norm_eps,
            num_heads=config.num_heads,
            cosines=cosines,
            sines=sines,
            keys=pool.keys,
            values=pool.values,
        )
        any_number = all(
            map_.takes_many_tokens() for layer in known for map_ in (layer.query, layer.output, layer.down)
        )
        return cls(decoder, model, float("inf") if any_number else _FEW_TOKENS)

    def __call__(
        self, ids: Sequence[int], tables: NDArray[np.int64], starts: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        """h_1ND in the dtype of the activations; what lies behind the sequences' tokens means nothing."""
        model = self._model
        embedded_ND = model.embedding(torch.tensor(ids))
        firsts = np.concatenate(([0], np.cumsum(counts)))
        h_ND = self._decoder(embedded_ND.float().contiguous(), tables, np.array(starts, dtype=np.int64), firsts)
        return h_ND.to(model.compute_dtype or embedded_ND.dtype)[None]


def _native_layer(layer: Layer) -> NativeLayer | None:
    attention, feed_forward = layer.attention, layer.feed_forward
    maps = {
        "query": _native(attention.query),
        "key": _native(attention.key),
        "value": _native(attention.value),
        "output": _native(attention.output),
        "gate": _native(feed_forward.gate),
        "up": _native(feed_forward.up),
        "down": _native(feed_forward.down),
    }
    readable = {name: weights for name, weights in maps.items() if weights is not None}
    if len(readable) < len(maps):
        return None
    return NativeLayer(
        layer.attention_norm.weight,
        layer.feed_forward_norm.weight,
        **readable,
        query_norm=None if isinstance(attention.query_norm, nn.Identity) else attention.query_norm.weight,
        key_norm=None if isinstance(attention.key_norm, nn.Identity) else attention.key_norm.weight,
    )


def _native(linear: nn.Module) -> NativeMap | None:
    """A map as the kernels read it; None where they do not."""
    if type(linear) is QuantizedLinear:
        weights = native_map(linear)
        return None if weights is None else NativeMap(weights.weights, weights.scales, linear.bias)
    if type(linear) is Linear and applicable(linear.weight):
        return NativeMap(linear.weight, None, linear.bias)
    return None
