"""Who may look at whom: the attention contexts that training and scoring use.

An `Attend` is what `Attention` calls between projecting and mixing heads. Here are those without a cache;
`puna.infer` has the one that holds keys and values of earlier steps.

Shapes: B batch, T tokens, S keys, H query heads, G key/value heads, K head dimension.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Scaled dot-product attention in some context."""

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """Return o_BTHK. `layer` counts from 0; keys and queries are rotated already."""
        ...


def scaled_dot_product(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, mask_BTS: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with grouped heads; `mask_BTS` is true where a query may look."""
    grouped = q_BTHK.shape[2] != k_BSGK.shape[2]
    o_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=None if mask_BTS is None else mask_BTS.unsqueeze(1),
        is_causal=causal,
        enable_gqa=grouped,
    )
    return o_BHTK.transpose(1, 2)


def causal(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Every token sees itself and what came before it in its row."""
    return scaled_dot_product(q_BTHK, k_BTGK, v_BTGK, causal=True)


def bidirectional(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Every token sees its whole row."""
    return scaled_dot_product(q_BTHK, k_BTGK, v_BTGK)


class DocumentAttend:
    """Attention that stays inside documents packed side by side in a row.

    Also the context for padded batches: give padding a document number of its own.

    Args:
        documents_BT: the document that each token belongs to; equal numbers mean the same document, and a
            document's tokens stand together.
        causal: whether a token sees only what came before it.
    """

    def __init__(self, documents_BT: Tensor, *, causal: bool = True) -> None:
        self.mask_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
        if causal:
            self.mask_BTS = self.mask_BTS.tril()

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        return scaled_dot_product(q_BTHK, k_BTGK, v_BTGK, mask_BTS=self.mask_BTS)
