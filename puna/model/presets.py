"""Every published size of the families that Puna supports, by name.

Sources: Llama 1, arXiv:2302.13971, table 2; Llama 2, arXiv:2307.09288, table 1 and appendix A.2.1; Code Llama,
arXiv:2308.12950, section 2; Llama 3 and 3.1, arXiv:2407.21783, table 3; Llama 3.2 and 3.3, model cards; Qwen2,
arXiv:2407.10671, table 1; Qwen2.5, arXiv:2412.15115, table 1; Qwen3, arXiv:2505.09388, table 1. What the tables
leave out (feed-forward widths, contexts) is what the published `config.json` says.
"""

import difflib
from dataclasses import replace

from puna.model.config import LlamaConfig, RopeScaling


def _llama(dim: int, num_layers: int, num_heads: int, hidden_dim: int, num_kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        hidden_dim=hidden_dim,
    )


def _llama1(dim: int, num_layers: int, num_heads: int, hidden_dim: int) -> LlamaConfig:
    config = _llama(dim, num_layers, num_heads, hidden_dim, num_kv_heads=num_heads)
    return replace(config, context_length=2048, norm_eps=1e-6)


def _llama2(dim: int, num_layers: int, num_heads: int, hidden_dim: int, num_kv_heads: int) -> LlamaConfig:
    return replace(_llama(dim, num_layers, num_heads, hidden_dim, num_kv_heads), context_length=4096)


def _code_llama(llama2: LlamaConfig, vocab_size: int) -> LlamaConfig:
    return replace(llama2, vocab_size=vocab_size, context_length=16_384, rope_theta=1_000_000.0)


def _llama3(dim: int, num_layers: int, num_heads: int, hidden_dim: int) -> LlamaConfig:
    config = _llama(dim, num_layers, num_heads, hidden_dim, num_kv_heads=8)
    return replace(config, vocab_size=128_256, context_length=8192, rope_theta=500_000.0)


def _long(llama3: LlamaConfig, factor: float, *, head_dim: int = 128, tie_embeddings: bool = False) -> LlamaConfig:
    return replace(
        llama3,
        context_length=131_072,
        rope_scaling=RopeScaling(kind="llama3", factor=factor),
        head_dim=head_dim,
        tie_embeddings=tie_embeddings,
    )


def _qwen2(
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    hidden_dim: int,
    *,
    vocab_size: int = 152_064,
    context_length: int = 131_072,
    norm_eps: float = 1e-6,
    tie_embeddings: bool = False,
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim // num_heads,
        hidden_dim=hidden_dim,
        context_length=context_length,
        norm_eps=norm_eps,
        rope_theta=1_000_000.0,
        tie_embeddings=tie_embeddings,
        qkv_bias=True,
    )


def _qwen3(dim: int, num_layers: int, num_heads: int, hidden_dim: int, *, tie_embeddings: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=151_936,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        hidden_dim=hidden_dim,
        context_length=40_960,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        tie_embeddings=tie_embeddings,
        qk_norm=True,
    )


_LLAMA2_7B = _llama2(4096, 32, 32, 11_008, 32)
_LLAMA2_13B = _llama2(5120, 40, 40, 13_824, 40)
_LLAMA2_34B = _llama2(8192, 48, 64, 22_016, 8)
_LLAMA2_70B = _llama2(8192, 80, 64, 28_672, 8)
_LLAMA3_8B = _llama3(4096, 32, 32, 14_336)
_LLAMA3_70B = _llama3(8192, 80, 64, 28_672)
_LLAMA31_70B = _long(_LLAMA3_70B, 8.0)
_QWEN2_05B = _qwen2(896, 24, 14, 2, 4864, vocab_size=151_936, context_length=32_768, tie_embeddings=True)
_QWEN2_15B = _qwen2(1536, 28, 12, 2, 8960, vocab_size=151_936, tie_embeddings=True)
_QWEN2_7B = _qwen2(3584, 28, 28, 4, 18_944)

PRESETS: dict[str, LlamaConfig] = {
    "llama-1-7b": _llama1(4096, 32, 32, 11_008),
    "llama-1-13b": _llama1(5120, 40, 40, 13_824),
    "llama-1-33b": _llama1(6656, 60, 52, 17_920),
    "llama-1-65b": _llama1(8192, 80, 64, 22_016),
    "llama-2-7b": _LLAMA2_7B,
    "llama-2-13b": _LLAMA2_13B,
    "llama-2-34b": _LLAMA2_34B,
    "llama-2-70b": _LLAMA2_70B,
    "code-llama-7b": _code_llama(_LLAMA2_7B, 32_016),
    "code-llama-13b": _code_llama(_LLAMA2_13B, 32_016),
    "code-llama-34b": _code_llama(_LLAMA2_34B, 32_000),
    "code-llama-70b": _code_llama(_LLAMA2_70B, 32_016),
    "llama-3-8b": _LLAMA3_8B,
    "llama-3-70b": _LLAMA3_70B,
    "llama-3.1-8b": _long(_LLAMA3_8B, 8.0),
    "llama-3.1-70b": _LLAMA31_70B,
    "llama-3.1-405b": _long(_llama3(16_384, 126, 128, 53_248), 8.0),
    "llama-3.2-1b": _long(_llama3(2048, 16, 32, 8192), 32.0, head_dim=64, tie_embeddings=True),
    "llama-3.2-3b": _long(_llama3(3072, 28, 24, 8192), 32.0, tie_embeddings=True),
    "llama-3.3-70b": _LLAMA31_70B,
    "qwen2-0.5b": replace(_QWEN2_05B, context_length=131_072),
    "qwen2-1.5b": _QWEN2_15B,
    "qwen2-7b": _QWEN2_7B,
    "qwen2-72b": _qwen2(8192, 80, 64, 8, 29_568, norm_eps=1e-5),
    "qwen2.5-0.5b": _QWEN2_05B,
    "qwen2.5-1.5b": _QWEN2_15B,
    "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 11_008, vocab_size=151_936, context_length=32_768, tie_embeddings=True),
    "qwen2.5-7b": _QWEN2_7B,
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13_824, norm_eps=1e-5),
    "qwen2.5-32b": _qwen2(5120, 64, 40, 8, 27_648, norm_eps=1e-5),
    "qwen2.5-72b": _qwen2(8192, 80, 64, 8, 29_568, norm_eps=1e-5),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tie_embeddings=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tie_embeddings=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tie_embeddings=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600),
}


def preset(name: str) -> LlamaConfig:
    """The configuration of a published model.

    Raises:
        ValueError: no such name; the message gives the nearest one.

    >>> preset("llama-3.1-8b").num_layers
    32
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)[0]
        raise ValueError(f"There is no published model {name!r}; did you mean {near!r}? Known: {', '.join(PRESETS)}.")
    return PRESETS[name]
