"""Data that a model has learnt before: learning it again (replay), and measuring how much of it is forgotten."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from puna.batches.chat import write_chat_shards
from puna.batches.conversations import read_conversations
from puna.batches.mixture import Ingredient, MixedRows
from puna.batches.packing import PackedRows, TokenBatch
from puna.batches.shards import TokenShards
from puna.finetune.numbered import row_numbers, with_numbers
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.manifest import FILE_NAME
from puna.tokenizer.base import Tokenizer
from puna.train.config import TrainConfig
from puna.train.loss import Loss, LossSum, causal_lm_loss

_MEASURED_AT_ONCE = 16


def open_earlier(path: Path, tokenizer: Tokenizer, train: TrainConfig, tokens: Path) -> PackedRows:
    """Rows of earlier data: a folder of token shards, or conversations.

    Args:
        tokens: where the token shards of conversations are written to.

    Raises:
        InputError: it is neither, the shards are another tokenizer's, or conversations cannot be rendered.
    """
    if (path / FILE_NAME).exists():
        shards = TokenShards(path, tokenizer.hash)
        return PackedRows(shards, train.row_length, train.seed, "cut", tokenizer.pad_id)
    if tokenizer.chat_template is None:
        raise InputError(
            f"{path} is no folder of token shards, and to read it as conversations the model has no chat template. "
            "Make shards of it with `puna tokenize` and this model's tokenizer."
        )
    write_chat_shards(read_conversations(path), tokenizer, tokens, train.row_length)
    return PackedRows(TokenShards(tokens, tokenizer.hash), train.row_length, train.seed, "whole", tokenizer.pad_id)


def with_replayed_rows(rows: PackedRows | MixedRows, earlier: PackedRows, share: float) -> MixedRows:
    """The rows of a training, of which a share is earlier data's."""
    new = rows.ingredients if isinstance(rows, MixedRows) else [Ingredient("new", rows, 1.0, 1.0)]
    kept = 1 - share
    thinned = [replace(part, share=part.share * kept, annealing_share=part.annealing_share * kept) for part in new]
    return MixedRows([*thinned, Ingredient("earlier", earlier, share, share)], annealing_start=0)


def with_replayed_loss(loss: Loss, earlier_loss: Loss, earlier: PackedRows, share: float, units_per_row: float) -> Loss:
    """A task's loss and, in training mode, that of the next token in earlier data, in the proportion (1 - share) to
    share: the mean of the one plus share / (1 - share) times the mean of the other.

    Of earlier rows so many are read as that factor says, spread evenly over the rows of the training: which, follows
    from their numbers (`puna.finetune.numbered.NumberedRows`). All is linear in rows, so that the size of micro-batches
    does not matter.

    Args:
        earlier_loss: of the next token, for numbered rows too.
        units_per_row: units of `loss` in a mean row of the training.
    """
    factor = share / (1 - share)
    scale = units_per_row / (earlier.shards.num_targets / earlier.rows_per_epoch)

    def replaying(model: Transformer, batch: TokenBatch) -> LossSum:
        part = loss(model, batch)
        if not model.training:
            return part
        rows = row_numbers(batch)
        chosen = [n for row in rows for n in range(math.floor(row * factor), math.floor((row + 1) * factor))]
        if not chosen:
            return part
        numbered = with_numbers(earlier.batch(chosen), torch.tensor(chosen)).to(batch.ids_BT.device)
        return LossSum(part.total + scale * earlier_loss(model, numbered).total, part.count)

    return replaying


@torch.no_grad()
def loss_on(model: Transformer, rows: PackedRows, num_rows: int) -> float:
    """Nats per token on the first rows of an epoch, at most `num_rows`; in evaluation mode."""
    device = model.norm.weight.device
    total, count = 0.0, 0
    limit = min(num_rows, rows.rows_per_epoch)
    with as_measured(model):
        for start in range(0, limit, _MEASURED_AT_ONCE):
            chosen = range(start, min(start + _MEASURED_AT_ONCE, limit))
            part = causal_lm_loss(model, rows.batch(chosen).to(device))
            total += part.total.item()
            count += part.count
    return total / max(1, count)


@contextmanager
def as_measured(model: Transformer) -> Iterator[None]:
    """In evaluation mode and in the parameters' own precision, for the time of a `with`."""
    was_training, compute_dtype = model.training, model.compute_dtype
    model.eval()
    model.compute_dtype = None
    try:
        yield
    finally:
        model.train(was_training)
        model.compute_dtype = compute_dtype


def bits_per_byte(nats_per_token: float, shards: TokenShards) -> float:
    """The same loss in bits per byte, by the number of tokens that a byte of these shards has; all of them have to be
    targets, save the first of each document."""
    return nats_per_token / math.log(2) * (shards.num_tokens - len(shards)) / shards.num_bytes
