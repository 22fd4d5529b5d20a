"""Adversarial training on embeddings: FGM (Miyato et al. 2017, arXiv:1605.07725) and PGD (Madry et al. 2018,
arXiv:1706.06083).

Miyato et al. normalise the embeddings (equation 1), lest the model outgrow the change by making them larger. Here they
stay as they are, and the length of the change is measured in units in which the text's embeddings have a mean square of
1, which is the same but for one factor and mean in place of one for each dimension.

Shapes: B rows, T tokens, D model dimension.
"""

import torch
from torch import Tensor

from puna.batches.packing import PADDING, TokenBatch
from puna.finetune.embeddings import changed_embeddings
from puna.finetune.regularize.config import AdversaryConfig
from puna.model.transformer import Transformer
from puna.train.loss import Loss, LossSum


def with_adversary(loss: Loss, config: AdversaryConfig) -> Loss:
    """The loss, plus in training mode `weight` times the loss on embeddings changed to raise it.

    The change r of a text maximises the loss among those with |r| <= epsilon, as far as gradients show: with one step
    r = epsilon g / |g| (Miyato et al., equation 6), with several r <- P(r + step_size g / |g|) from r = 0, where P
    shortens to epsilon. g is the gradient at r. No gradient flows through r.

    What `loss` draws at random has to be the same in each call, or g belongs to another loss.
    """
    step_size = config.epsilon if config.steps == 1 else config.step_size

    def attacked(model: Transformer, batch: TokenBatch) -> LossSum:
        if not model.training:
            return loss(model, batch)
        embeddings = _Embeddings()
        with changed_embeddings(model, embeddings.add):
            clean = loss(model, batch)
            total = clean.total
            for step in range(config.steps):
                [g_BTD] = torch.autograd.grad(total, embeddings.change, retain_graph=step == 0)
                embeddings.climb(g_BTD, step_size, config.epsilon)
                total = loss(model, batch).total
        return LossSum(clean.total + config.weight * total, clean.count)

    return attacked


class _Embeddings:
    """A change of a batch's embeddings.

    Attributes:
        change: [B, T, D] in float32, zero at first; a leaf that gradients are taken by.
    """

    change: Tensor
    _documents_BT: Tensor
    _unit_BT1: Tensor

    def add(self, x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
        """The embeddings with the change."""
        if not hasattr(self, "change"):
            self._documents_BT = documents_BT
            squares_BT = x_BTD.detach().float().square().mean(-1)
            tokens_BT = sum_by_text(torch.ones_like(squares_BT), documents_BT)
            self._unit_BT1 = (sum_by_text(squares_BT, documents_BT) / tokens_BT).sqrt()[:, :, None]
            self.change = torch.zeros_like(x_BTD, dtype=torch.float32).requires_grad_()
        return x_BTD + self.change.to(x_BTD.dtype)

    @torch.no_grad()
    def climb(self, g_BTD: Tensor, step_size: float, epsilon: float) -> None:
        """One step along the gradient, no further from the start than epsilon."""
        change_BTD = self.change / self._unit_BT1.clamp(min=torch.finfo(g_BTD.dtype).tiny)
        change_BTD = change_BTD + step_size * g_BTD / self._length(g_BTD)
        change_BTD = change_BTD * (epsilon / self._length(change_BTD)).clamp(max=1)
        self.change = (change_BTD * self._unit_BT1).requires_grad_()

    def _length(self, x_BTD: Tensor) -> Tensor:
        """Euclidean length of each text's part, [B, T, 1]; above 0."""
        squares_BT = sum_by_text(x_BTD.square().sum(-1), self._documents_BT)
        return squares_BT.sqrt().clamp(min=torch.finfo(x_BTD.dtype).tiny)[:, :, None]


def sum_by_text(x_BT: Tensor, documents_BT: Tensor) -> Tensor:
    """For each token the sum over the tokens of its text, [B, T]; padding counts as a text of its own."""
    keys_BT = documents_BT - PADDING
    sums = x_BT.new_zeros(len(x_BT), int(keys_BT.max()) + 1).scatter_add(1, keys_BT, x_BT)
    return sums.gather(1, keys_BT)
