"""Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928): how much of each token reaches the others.

Shapes: B texts, T queries, S keys, H query heads, G key/value heads, K head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from puna.model.transformer import Transformer
from puna.peft.apply import virtual_tokens
from puna.peft.heads import Attention


class RecordingAttend:
    """Attention over whole rows that keeps its weights.

    Attributes:
        weights: of each layer so far, the mean over heads, [B, T, S].
    """

    def __init__(self, attention: Attention) -> None:
        self.causal = attention == "causal"
        self.weights: list[Tensor] = []

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """See `puna.model.attend.Attend`."""
        queries_per_group = q_BTHK.shape[2] // k_BTGK.shape[2]
        k_BSHK = k_BTGK.repeat_interleave(queries_per_group, dim=2)
        v_BSHK = v_BTGK.repeat_interleave(queries_per_group, dim=2)
        scores_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK).float() * q_BTHK.shape[-1] ** -0.5
        if self.causal:
            later_TS = torch.ones_like(scores_BHTS[0, 0], dtype=torch.bool).triu(1)
            scores_BHTS = scores_BHTS.masked_fill(later_TS, -torch.inf)
        weights_BHTS = scores_BHTS.softmax(-1)
        self.weights.append(weights_BHTS.mean(1))
        return torch.einsum("bhts,bshk->bthk", weights_BHTS.to(v_BSHK.dtype), v_BSHK)


def rollout(weights: Sequence[Tensor]) -> Tensor:
    """Product of the layers' weights, the first layer's at the right, each mixed half and half with the identity, for
    the residual connection (section 3, equation 1).

    Args:
        weights: of each layer from the first on, mean over heads, [..., T, T], rows summing to 1.

    Returns:
        [..., T, T]; row t says which share of what stands at t comes from each token. Rows sum to 1.
    """
    identity = torch.eye(weights[0].shape[-1], dtype=weights[0].dtype, device=weights[0].device)
    total = identity
    for layer_TT in weights:
        total = (0.5 * layer_TT + 0.5 * identity) @ total
    return total


@torch.no_grad()
def attention_rollout(model: Transformer, ids: Sequence[int], attention: Attention) -> Tensor | None:
    """Rollout over one text, [T, T], float32 on the CPU; None where the model has virtual tokens, which are no part of
    the text, but are looked at."""
    if virtual_tokens(model) is not None:
        return None
    recorder = RecordingAttend(attention)
    ids_BT = torch.tensor([list(ids)], device=model.embedding.weight.device)
    model(ids_BT, None, recorder, lambda h_BTD, _: h_BTD)
    return rollout(recorder.weights)[0].cpu()
