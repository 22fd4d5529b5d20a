"""One table of parameter names: Puna's, Hugging Face's, Meta's, and llama.cpp's.

Hugging Face's are those of `transformers` (Llama, Qwen2, Qwen3); Meta's those of `consolidated.NN.pth`, which knows
neither biases nor norms of queries and keys; llama.cpp's those of GGUF files.
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
    ("layers.#.router.weight", "model.layers.#.router.weight", None),
    ("layers.#.predictor.0.weight", "model.layers.#.predictor.0.weight", None),
    ("layers.#.predictor.2.weight", "model.layers.#.predictor.2.weight", None),
    ("norm.weight", "model.norm.weight", "norm.weight"),
    ("output.weight", "lm_head.weight", "output.weight"),
)  # fmt: skip

_HF_OF = {puna: hf for puna, hf, _ in _NAMES}
_META_OF = {puna: meta for puna, _, meta in _NAMES if meta is not None}
_PUNA_OF_HF = {hf: puna for puna, hf in _HF_OF.items()}
_PUNA_OF_META = {meta: puna for puna, meta in _META_OF.items()}

_GGUF_OF = {
    "embedding.weight": "token_embd.weight",
    "layers.#.attention_norm.weight": "blk.#.attn_norm.weight",
    "layers.#.attention.query.weight": "blk.#.attn_q.weight",
    "layers.#.attention.key.weight": "blk.#.attn_k.weight",
    "layers.#.attention.value.weight": "blk.#.attn_v.weight",
    "layers.#.attention.output.weight": "blk.#.attn_output.weight",
    "layers.#.attention.query.bias": "blk.#.attn_q.bias",
    "layers.#.attention.key.bias": "blk.#.attn_k.bias",
    "layers.#.attention.value.bias": "blk.#.attn_v.bias",
    "layers.#.attention.query_norm.weight": "blk.#.attn_q_norm.weight",
    "layers.#.attention.key_norm.weight": "blk.#.attn_k_norm.weight",
    "layers.#.feed_forward_norm.weight": "blk.#.ffn_norm.weight",
    "layers.#.feed_forward.gate.weight": "blk.#.ffn_gate.weight",
    "layers.#.feed_forward.down.weight": "blk.#.ffn_down.weight",
    "layers.#.feed_forward.up.weight": "blk.#.ffn_up.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}

# A quantised map has several tensors in place of its weight: weight_scale, weight_packed, ... (`puna.compress`). Files
# have the same names, but for one.
_QUANTIZED = ".weight_"
_STORED_PARTS = {"int8": "weight"}


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


def to_gguf(name: str) -> str:
    """llama.cpp's name of a parameter of `Transformer`.

    >>> to_gguf("layers.3.feed_forward.gate.weight")
    'blk.3.ffn_gate.weight'
    """
    return _translate(name, _GGUF_OF)


def _translate(name: str, table: dict[str, str]) -> str:
    stem, quantized, part = name.partition(_QUANTIZED)
    if quantized:
        return _translate(f"{stem}.weight", table).removesuffix("weight") + _STORED_PARTS.get(part, f"weight_{part}")
    layer = re.search(r"(?<=layers\.)\d+", name)
    if layer is None:
        return table[name]
    return table[name.replace(f"layers.{layer[0]}.", "layers.#.", 1)].replace("#", layer[0])
