"""Noise on embeddings while fine-tuning: NEFTune (Jain et al. 2023, arXiv:2310.05914, algorithm 1).

Shapes: B rows, T tokens, D model dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from puna.batches.mixture import MixedRows
from puna.batches.packing import PADDING, PackedRows, TokenBatch
from puna.batches.shards import TokenShards
from puna.model.transformer import Transformer
from puna.runtime.seeds import derive_seed
from puna.train.loss import Loss, LossSum


@dataclass(frozen=True, slots=True)
class NumberedBatch(TokenBatch):
    """Rows that know their numbers."""

    rows_B: Tensor
    """The number of each row, int64."""


class NumberedRows:
    """The same rows, with their numbers: what noise has to follow from, for a resumed run to be the same run."""

    def __init__(self, rows: PackedRows | MixedRows) -> None:
        self.rows = rows

    def batch(self, rows: Sequence[int]) -> NumberedBatch:
        """Rows by number, counted from 0."""
        plain = self.rows.batch(rows)
        columns = {field.name: getattr(plain, field.name) for field in fields(plain)}
        return NumberedBatch(**columns, rows_B=torch.tensor(list(rows)))

    def origins(self, row: int) -> list[tuple[TokenShards, int]]:
        """See `PackedRows.origins`."""
        return self.rows.origins(row)


def with_noise(loss: Loss, alpha: float, seed: int) -> Loss:
    """The same loss, in training mode from noisy embeddings; for batches of `NumberedRows`.

    Args:
        alpha: strength; 5 to 15 in the paper.
        seed: of the noise.
    """

    def noisy(model: Transformer, batch: TokenBatch) -> LossSum:
        if not model.training:
            return loss(model, batch)
        assert isinstance(batch, NumberedBatch)
        noise_BTD = embedding_noise(batch, model.config.dim, alpha, seed)

        def add(module: Any, inputs: Any, x_BTD: Tensor) -> Tensor:
            return x_BTD + noise_BTD

        hook = model.embedding.register_forward_hook(add)
        try:
            return loss(model, batch)
        finally:
            hook.remove()

    return noisy


def embedding_noise(batch: NumberedBatch, dim: int, alpha: float, seed: int) -> Tensor:
    """What is added to the embeddings, shape [B, T, D].

    Uniform in +-alpha / sqrt(L D), L being the tokens of the document that a token belongs to; zero for padding. A
    row's noise follows from the seed and its number, whatever rows are beside it.
    """
    documents_BT = batch.documents_BT
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    scale_BT = alpha / (same_BTT.sum(-1) * dim).sqrt()
    scale_BT = scale_BT.masked_fill(documents_BT == PADDING, 0.0)
    rows = []
    for number in batch.rows_B.tolist():
        generator = torch.Generator().manual_seed(derive_seed(seed, "neftune", number))
        rows.append(torch.rand(documents_BT.shape[1], dim, generator=generator) * 2 - 1)
    return torch.stack(rows).to(scale_BT.device) * scale_BT[:, :, None]
