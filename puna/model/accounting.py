"""Exact counts that follow from a configuration: parameters, floating-point operations, cache bytes."""

from puna.model.config import LlamaConfig


def _layer_matmul_parameters(config: LlamaConfig) -> int:
    query_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return config.dim * (2 * query_dim + 2 * kv_dim) + 3 * config.dim * config.hidden_dim


def count_parameters(config: LlamaConfig) -> int:
    """Number of parameters, tied weights counted once."""
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    norms = 2 * config.dim + (2 * config.head_dim if config.qk_norm else 0)
    biases = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim if config.qkv_bias else 0
    return embeddings + config.num_layers * (_layer_matmul_parameters(config) + norms + biases) + config.dim


def forward_flops_per_token(config: LlamaConfig, mean_context: float) -> float:
    """Floating-point operations of the matrix products for one token, a multiply-add counted as two.

    Args:
        mean_context: how many tokens a token attends to, itself included, averaged over tokens: (T + 1) / 2 for
            causal attention over rows of T, T for bidirectional attention.

    Norms, rotations and softmax, below one percent of the whole at any published size, are left out, as in
    Hoffmann et al. 2022 (arXiv:2203.15556), appendix F.
    """
    matmul_parameters = config.num_layers * _layer_matmul_parameters(config) + config.vocab_size * config.dim
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * mean_context
    return 2 * matmul_parameters + attention


def training_flops_per_token(config: LlamaConfig, mean_context: float) -> float:
    """Forward and backward: the backward pass costs twice the forward. Recomputation is not counted."""
    return 3 * forward_flops_per_token(config, mean_context)


def kv_bytes_per_token(config: LlamaConfig, bytes_per_element: int = 2) -> int:
    """Bytes that one token adds to the key/value cache, all layers together."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * bytes_per_element
