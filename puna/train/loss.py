"""Losses as sums and counts.

A loss returns the sum over its units (tokens, here) and how many there were. The one division, by the count over the
whole step, is in `puna.train.step`, so that micro-batches, packing and data parallelism cannot change the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from puna.batches.packing import IGNORE, TokenBatch
from puna.kernels.attend import document_attend
from puna.model.transformer import Linear, Transformer
from puna.train.cross_entropy import linear_cross_entropy


@dataclass(frozen=True, slots=True)
class LossSum:
    """What a loss measured on one micro-batch."""

    total: Tensor
    """Sum of the loss over units, a scalar with gradient, in nats for likelihoods."""
    count: int
    """Number of units summed."""


Loss = Callable[[Transformer, TokenBatch], LossSum]


def causal_lm_loss(model: Transformer, batch: TokenBatch) -> LossSum:
    """Negative log-likelihood of each next token within its document."""

    def head(h_BTD: Tensor, output: Linear) -> Tensor:
        return linear_cross_entropy(h_BTD.flatten(0, 1), output.weight, batch.labels_BT.flatten(), IGNORE)

    attend = document_attend(batch.documents_BT)
    total = model(batch.ids_BT, batch.positions_BT, attend, head)
    return LossSum(total, batch.num_targets)
