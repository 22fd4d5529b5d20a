"""Noise on embeddings while fine-tuning: NEFTune (Jain et al. 2023, arXiv:2310.05914, algorithm 1).

Shapes: B rows, T tokens, D model dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from puna.batches.packing import PADDING, TokenBatch
from puna.finetune.embeddings import changed_embeddings
from puna.finetune.numbered import row_numbers
from puna.model.transformer import Transformer
from puna.runtime.seeds import derive_seed
from puna.train.loss import Loss, LossSum


def with_noise(loss: Loss, alpha: float, seed: int) -> Loss:
    """The same loss, in training mode from noisy embeddings; for batches of `puna.finetune.numbered.NumberedRows`.

    Args:
        alpha: strength; 5 to 15 in the paper.
        seed: of the noise.
    """

    def noisy(model: Transformer, batch: TokenBatch) -> LossSum:
        if not model.training:
            return loss(model, batch)

        def add(x_BTD: Tensor, documents_BT: Tensor) -> Tensor:
            noise_BTD = embedding_noise(documents_BT, row_numbers(batch), x_BTD.shape[2], alpha, seed)
            return x_BTD + noise_BTD

        with changed_embeddings(model, add):
            return loss(model, batch)

    return noisy


def embedding_noise(documents_BT: Tensor, rows: Sequence[int], dim: int, alpha: float, seed: int) -> Tensor:
    """What is added to the embeddings, shape [B, T, D].

    Uniform in +-alpha / sqrt(L D), L being the tokens of the document that a token belongs to; zero for padding. A
    row's noise follows from the seed and its number, whatever rows are beside it.
    """
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    scale_BT = alpha / (same_BTT.sum(-1) * dim).sqrt()
    scale_BT = scale_BT.masked_fill(documents_BT == PADDING, 0.0)
    noises = []
    for number in rows:
        generator = torch.Generator().manual_seed(derive_seed(seed, "neftune", number))
        noises.append(torch.rand(documents_BT.shape[1], dim, generator=generator) * 2 - 1)
    return torch.stack(noises).to(scale_BT.device) * scale_BT[:, :, None]
