"""The entropy of what a policy may say next, beside the log-probabilities of what it said.

Shapes: N tokens, D model dimension, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_SLICE_NUMBERS = 2**23
"""Logits that exist at a time."""


def naive_linear_logprobs_and_entropies(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """The readable twin of `linear_logprobs_and_entropies`."""
    logprobs_NV = F.linear(h_ND, weight_VD.to(h_ND.dtype)).float().log_softmax(-1)
    entropies_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return torch.stack([logprobs_NV.gather(1, labels_N[:, None]).squeeze(1), entropies_N])


def linear_logprobs_and_entropies(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """log softmax(h W^T)[label], and the entropy of softmax(h W^T) in nats, of each token, float32 [2, N].

    The logits exist for one slice of tokens at a time, and are computed again in the backward pass.
    """
    rows = max(1, _SLICE_NUMBERS // len(weight_VD))
    parts = [
        checkpoint(naive_linear_logprobs_and_entropies, h, weight_VD, labels, use_reentrant=False)
        for h, labels in zip(torch.split(h_ND, rows), torch.split(labels_N, rows), strict=True)
    ]
    return torch.cat(parts, dim=1)
