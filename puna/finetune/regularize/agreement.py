"""R-Drop: two passes under different dropout should say the same (Liang et al. 2021, arXiv:2106.14448).

Shapes: B rows of a batch that holds each twice, T tokens, D model dimension, N units of one copy, V classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from puna.batches.packing import IGNORE, TokenBatch
from puna.finetune.numbered import twice
from puna.model.transformer import Linear, Transformer
from puna.peft.virtual import forward_arguments
from puna.train.loss import Loss, LossSum

_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Seen:
    """What the head of a model was given, and what it made of it."""

    h_BTD: Tensor
    output: Linear
    result: Any
    """What `Transformer.forward` returns."""


Divergence = Callable[[Seen, TokenBatch], Tensor]
"""How far the two copies are apart: a sum over the units of one copy. The rows of the second stand behind the first."""


def with_agreement(loss: Loss, factor: float, divergence: Divergence) -> Loss:
    """R-Drop's loss in training mode: for each unit, the losses of both passes and `factor` times their divergence
    (equation 4), over two units, so that the mean stays comparable to that of one pass.

    Both passes are one forward over twice the rows, as in the paper's algorithm 1. `loss` calls the model once.

    Args:
        loss: has to drop other numbers for the second copy of a row.
        factor: alpha in the paper.
    """

    def agreeing(model: Transformer, batch: TokenBatch) -> LossSum:
        if not model.training:
            return loss(model, batch)
        seen: list[Seen] = []

        def look(model: Transformer, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
            ids_BT, positions_BT, attend, head = forward_arguments(*args, **kwargs)

            def looked_at(h_BTD: Tensor, output: Linear) -> Any:
                result = output(h_BTD) if head is None else head(h_BTD, output)
                seen.append(Seen(h_BTD, output, result))
                return result

            return (), {"ids_BT": ids_BT, "positions_BT": positions_BT, "attend": attend, "head": looked_at}

        both = twice(batch)
        # First of all hooks, so that what others do about virtual tokens is done around this head.
        hook = model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
        try:
            part = loss(model, both)
        finally:
            hook.remove()
        [only] = seen
        return LossSum(part.total + factor * divergence(only, both), part.count)

    return agreeing


def symmetric_divergence(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """Sum over N of (KL(p || q) + KL(q || p)) / 2 (equation 2), from log-probabilities."""
    return ((log_p_NV.exp() - log_q_NV.exp()) * (log_p_NV - log_q_NV)).sum() / 2


def token_divergence(seen: Seen, batch: TokenBatch) -> Tensor:
    """`symmetric_divergence` of the next token's distribution, over the tokens that carry loss.

    Logits exist for a chunk of tokens at a time, and are computed again in the backward pass.
    """
    h_ND = seen.h_BTD[batch.labels_BT != IGNORE]
    first_ND, second_ND = h_ND.chunk(2)
    rows = max(1, _CHUNK_BYTES // (8 * seen.output.out_features))

    def part(p_ND: Tensor, q_ND: Tensor) -> Tensor:
        return symmetric_divergence(*(seen.output(h).float().log_softmax(-1) for h in (p_ND, q_ND)))

    parts = [
        checkpoint(part, p_ND, q_ND, use_reentrant=False, preserve_rng_state=False)
        for p_ND, q_ND in zip(torch.split(first_ND, rows), torch.split(second_ND, rows), strict=True)
    ]
    return torch.stack(parts).sum() if parts else h_ND.sum()
