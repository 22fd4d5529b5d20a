"""One table of parameter names: Puna's, Hugging Face's, and Meta's.

Hugging Face's are those of `transformers` (Llama, Qwen2, Qwen3); Meta's those of `consolidated.NN.pth`, which knows
neither biases nor norms of queries and keys.
"""

import re

_NAMES: tuple[tuple[str, str, str | None], ...] = (
    ("embedding.weight", "model.embed_tokens.weight", "tok_embeddings.weight"),
    ("layers.#.attention_norm.weight", "model.layers.#.input_layernorm.weight", "layers.#.attention_norm.weight"),
    ("layers.#.attention.query.weight", "model.layers.#.self_attn.q_proj.weight", "layers.#.attention.wq.weight"),
    ("layers.#.attention.key.weight", "model.layers.#.self_attn.k_proj.weight", "layers.#.attention.wk.weight"),
    ("layers.#.attention.value.weight", "model.layers.#.self_attn.v_proj.weight", "layers.#.attention.wv.weight"),
    ("layers.#.attention.output.weight", "model.layers.#.self_attn.o_proj.weight", "layers.#.attention.wo.weight"),
    ("layers.#.attention.query.bias", "model.layers.#.self_attn.q_proj.bias", None),
    ("layers.#.attention.key.bias", "model.layers.#.self_attn.k_proj.bias", None),
    ("layers.#.attention.value.bias", "model.layers.#.self_attn.v_proj.bias", None),
    ("layers.#.attention.query_norm.weight", "model.layers.#.self_attn.q_norm.weight", None),
    ("layers.#.attention.key_norm.weight", "model.layers.#.self_attn.k_norm.weight", None),
    ("layers.#.feed_forward_norm.weight", "model.layers.#.post_attention_layernorm.weight", "layers.#.ffn_norm.weight"),
    ("layers.#.feed_forward.gate.weight", "model.layers.#.mlp.gate_proj.weight", "layers.#.feed_forward.w1.weight"),
    ("layers.#.feed_forward.down.weight", "model.layers.#.mlp.down_proj.weight", "layers.#.feed_forward.w2.weight"),
    ("layers.#.feed_forward.up.weight", "model.layers.#.mlp.up_proj.weight", "layers.#.feed_forward.w3.weight"),
    ("norm.weight", "model.norm.weight", "norm.weight"),
    ("output.weight", "lm_head.weight", "output.weight"),
)  # fmt: skip

_HF_OF = {puna: hf for puna, hf, _ in _NAMES}
_META_OF = {puna: meta for puna, _, meta in _NAMES if meta is not None}
_PUNA_OF_HF = {hf: puna for puna, hf in _HF_OF.items()}
_PUNA_OF_META = {meta: puna for puna, meta in _META_OF.items()}


def to_hf(name: str) -> str:
    """Hugging Face's name of a parameter of `Transformer`.

    Raises:
        KeyError: it is not one of the model's parameters. So do all functions here.

    >>> to_hf("layers.3.attention.query.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    return _translate(name, _HF_OF)


def from_hf(name: str) -> str:
    """The inverse of `to_hf`."""
    return _translate(name, _PUNA_OF_HF)


def to_meta(name: str) -> str:
    """Meta's name of a parameter of `Transformer`.

    >>> to_meta("layers.3.feed_forward.gate.weight")
    'layers.3.feed_forward.w1.weight'
    """
    return _translate(name, _META_OF)


def from_meta(name: str) -> str:
    """The inverse of `to_meta`."""
    return _translate(name, _PUNA_OF_META)


def _translate(name: str, table: dict[str, str]) -> str:
    layer = re.search(r"(?<=layers\.)\d+", name)
    if layer is None:
        return table[name]
    return table[name.replace(f"layers.{layer[0]}.", "layers.#.", 1)].replace("#", layer[0])
