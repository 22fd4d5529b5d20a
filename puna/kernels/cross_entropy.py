"""Softmax cross-entropy of rows of logits: natively on a CPU, by torch elsewhere.

Shapes: N tokens, V vocabulary.
"""

import ctypes

import torch
from torch import Tensor

from puna.kernels.loader import address, level, loaded_library, native_library


def cross_entropy_and_error(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of logsumexp(logits) - logits[label], and its gradient softmax(logits) - onehot(label).

    Args:
        logits_NV: float32 and dense; overwritten, for the gradient takes its place.
        labels_N: int64, each below V.
    """
    if logits_NV.device.type == "cpu" and native_library() is not None:
        losses_N = torch.empty(len(labels_N))
        loaded_library().puna_cross_entropy(
            ctypes.c_int(level()),
            address(logits_NV),
            *map(ctypes.c_long, logits_NV.shape),
            address(labels_N.contiguous()),
            address(losses_N),
        )
        return losses_N.sum(), logits_NV
    return plain_cross_entropy_and_error(logits_NV, labels_N)


def plain_cross_entropy_and_error(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """The readable twin."""
    labels_N1 = labels_N[:, None]
    logits_NV.sub_(logits_NV.amax(-1, keepdim=True))
    label_logits_N1 = logits_NV.gather(1, labels_N1)
    denominator_N1 = logits_NV.exp_().sum(-1, keepdim=True)
    error_NV = logits_NV.div_(denominator_N1)
    error_NV.scatter_add_(1, labels_N1, error_NV.new_full((), -1.0).expand_as(labels_N1))
    return (denominator_N1.log() - label_logits_N1).sum(), error_NV
