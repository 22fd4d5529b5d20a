"""Losses as sums and counts.

A loss returns the sum over its units (tokens, here) and how many there were. The one division, by the count over the
whole step, is in `puna.train.step`, so that micro-batches, packing and data parallelism cannot change the answer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from puna.batches.packing import IGNORE, TokenBatch
from puna.kernels.attend import document_attend
from puna.model.transformer import Linear, Transformer
from puna.train.cross_entropy import cross_entropy, linear_cross_entropy


@dataclass(frozen=True, slots=True)
class LossSum:
    """What a loss measured on one micro-batch."""

    total: Tensor
    """Sum of the loss over units, a scalar with gradient, in nats for likelihoods."""
    count: int
    """Number of units summed."""


Loss = Callable[[Transformer, TokenBatch], LossSum]


def with_penalty(loss: Loss, penalty: Callable[[Transformer], Tensor]) -> Loss:
    """The same loss, plus in training mode a penalty for each unit: a scalar that follows from the model alone."""

    def penalised(model: Transformer, batch: TokenBatch) -> LossSum:
        part = loss(model, batch)
        return LossSum(part.total + part.count * penalty(model), part.count) if model.training else part

    return penalised


def causal_lm_loss(model: Transformer, batch: TokenBatch, *, z_loss: float = 0.0) -> LossSum:
    """Negative log-likelihood of each next token within its document.

    Args:
        z_loss: see `token_loss`.
    """

    def head(h_BTD: Tensor, output: Linear) -> Tensor:
        return token_loss(h_BTD, output, batch.labels_BT, z_loss=z_loss)

    attend = document_attend(batch.documents_BT)
    total = model(batch.ids_BT, batch.positions_BT, attend, head)
    return LossSum(total, batch.num_targets)


def token_loss(h_BTD: Tensor, output: Linear, labels_BT: Tensor, *, z_loss: float = 0.0) -> Tensor:
    """Sum of -log softmax(output(h))[label] over positions whose label is not IGNORE; call it in a head.

    Where the output projection is split by vocabulary (tensor parallelism), all logits exist at once, each process
    holding its share of them.

    Args:
        z_loss: factor of the squared log-normaliser of each position, a regulariser: it is added in training
            mode, and not where a model is measured.
    """
    z_loss = z_loss if output.training else 0.0
    if isinstance(output.weight, DTensor):
        return cross_entropy(output(h_BTD).flatten(0, 1), labels_BT.flatten(), IGNORE, z_loss)
    return linear_cross_entropy(h_BTD.flatten(0, 1), output.weight, labels_BT.flatten(), IGNORE, z_loss)
