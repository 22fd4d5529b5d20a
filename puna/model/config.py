"""The shape of a Llama: the numbers that a published table or a `config.json` gives."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context that they were trained with."""

    kind: Literal["linear", "llama3"]
    """`linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595); `llama3` divides only
    the slow ones and blends in between (Llama 3.1 release)."""
    factor: float
    """How many times longer the context becomes."""
    low_freq_factor: float = 1.0
    """`llama3` only: wavelengths above original_context / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """`llama3` only: wavelengths below original_context / high_freq_factor are left alone."""
    original_context_length: int = 8192
    """`llama3` only: context length, in tokens, before stretching."""

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"rope_scaling.factor is {self.factor}; it has to be positive.")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor ({self.low_freq_factor}) has to be below "
                f"high_freq_factor ({self.high_freq_factor})."
            )


@dataclass(frozen=True)
class LlamaConfig:
    """Architecture of a decoder of the Llama family.

    The flags at the end exist because a published family needs them (Qwen2: `qkv_bias`; Qwen3: `qk_norm`;
    small models of several families: `tie_embeddings`). Published sizes are in `puna.model.presets`.
    """

    vocab_size: int = 4096
    """Rows of the embedding (may exceed the tokenizer's vocabulary: padding to a round number)."""
    dim: int = 256
    """Width of the residual stream."""
    num_layers: int = 6
    """Number of decoder layers."""
    num_heads: int = 4
    """Query heads per layer."""
    num_kv_heads: int = 4
    """Key/value heads per layer: num_heads is multi-head, 1 is multi-query, between is grouped-query attention."""
    head_dim: int = 64
    """Width of one head; num_heads * head_dim need not equal dim (Qwen3)."""
    hidden_dim: int = 688
    """Width inside the SwiGLU feed-forward."""
    context_length: int = 1024
    """Longest sequence, in tokens, that the model is meant for."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies; none when absent."""
    tie_embeddings: bool = False
    """Use the embedding's weight as the output projection too."""
    qkv_bias: bool = False
    """Add a bias to the query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """Normalise every query and key head with RMSNorm before rotation (Qwen3)."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "hidden_dim",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 1.")
        if self.context_length < 1:
            raise ValueError(f"context_length is {self.context_length}; it has to be at least 1.")
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim ({self.dim}) has to be a multiple of num_heads ({self.num_heads}); every published model's is, "
                "and transformers refuses others."
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) has to be a multiple of num_kv_heads ({self.num_kv_heads}): "
                "each key/value head serves the same number of query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even number.")
