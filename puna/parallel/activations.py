"""Activation checkpointing: what the backward pass computes again instead of keeping (Chen et al. 2016,
arXiv:1604.06174)."""

from functools import partial
from typing import Any

import torch
from torch._functorch import config as compiler
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from puna.model.transformer import Transformer
from puna.parallel.config import ParallelConfig

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}
"""Operations whose results are dear to compute and small to keep."""


def checkpoint_activations(model: Transformer, config: ParallelConfig) -> None:
    """Make every layer of `model` keep less for the backward pass, in the way that `config` says."""
    if config.activation_checkpointing == "none":
        return
    if config.activation_checkpointing == "budget":
        compiler.activation_memory_budget = config.activation_budget
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if config.activation_checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, **options)


def _policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
