"""Rows of fixed length out of documents of any length, each a pure function of (shards, seed, row number).

Two ways to fill rows:
    `cut`    documents in shuffled order form one stream, cut every `row_length` tokens, and the rows are shuffled
             again, so that one long document does not fill a whole batch: nothing is wasted. For pretraining.
    `whole`  documents stay whole and are fitted side by side, the tightest fit first. For conversations, where an
             answer must see its question.

In both a token knows its document and its position, so that attention stays inside documents (Llama 3,
arXiv:2407.21783, section 3.2). What a cut sends to the next row starts again from position 0 there.

Shapes: B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.batches.shards import TokenShards
from puna.runtime.errors import InputError
from puna.runtime.seeds import derive_seed

IGNORE = -100
"""Label of a position that is not a training target."""

PADDING = -1
"""Document number of padding."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows of packed documents."""

    ids_BT: Tensor
    """Token ids, int64."""
    labels_BT: Tensor
    """The id that should follow each token, or IGNORE, int64."""
    positions_BT: Tensor
    """Position of each token in its document's part within the row, int64."""
    documents_BT: Tensor
    """Number of each token's document within its row, rising from 0; PADDING for padding, int64."""

    @property
    def num_targets(self) -> int:
        """How many positions carry a loss."""
        return int((self.labels_BT != IGNORE).sum())

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        return type(self)(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def without_targets(self, rows_B: Tensor) -> Self:
        """The same batch, but that nothing is counted of the rows that are marked."""
        labels = [field.name for field in fields(self) if "labels" in field.name]
        marked = {name: rows_B.view(-1, *[1] * (getattr(self, name).ndim - 1)) for name in labels}
        return replace(self, **{name: getattr(self, name).masked_fill(marked[name], IGNORE) for name in labels})

    def split(self, micro_rows: int) -> list[Self]:
        """The same rows in micro-batches of at most `micro_rows`."""
        parts = [getattr(self, field.name).split(micro_rows) for field in fields(self)]
        return [type(self)(*part) for part in zip(*parts, strict=True)]


class Rows(Protocol):
    """Endless rows, each a pure function of its number."""

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """Rows by number, counted from 0."""
        ...


class EpochRows(Rows, Protocol):
    """Rows that go over the same documents again and again."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the documents."""
        ...


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a document."""

    document: int
    """Its number in the shards."""
    start: int
    """First token."""
    stop: int
    """After the last token."""


class _Cut:
    """One epoch of `cut`: shuffled rows of a shuffled stream of documents."""

    def __init__(self, lengths: NDArray[np.int64], row_length: int, generator: np.random.Generator) -> None:
        self.row_length = row_length
        self.order = generator.permutation(len(lengths))
        self.starts = np.concatenate(([0], np.cumsum(lengths[self.order])))
        self.num_rows = int(self.starts[-1]) // row_length
        self.row_order = generator.permutation(self.num_rows)

    def pieces(self, row: int) -> list[Piece]:
        start = int(self.row_order[row]) * self.row_length
        stop = start + self.row_length
        first, last = np.searchsorted(self.starts, (start, stop - 1), side="right") - 1
        return [
            Piece(
                int(self.order[n]),
                max(start - int(self.starts[n]), 0),
                int(min(stop, self.starts[n + 1]) - self.starts[n]),
            )
            for n in range(first, last + 1)
        ]


class _Whole:
    """One epoch of `whole`: documents fitted into rows, rows shuffled."""

    def __init__(self, lengths: NDArray[np.int64], row_length: int, generator: np.random.Generator) -> None:
        self.lengths = np.minimum(lengths, row_length)
        shuffled = generator.permutation(len(lengths))
        longest_first = shuffled[np.argsort(-self.lengths[shuffled], kind="stable")]
        rows = best_fit(self.lengths[longest_first].tolist(), row_length)
        self.rows = [[int(longest_first[item]) for item in rows[n]] for n in generator.permutation(len(rows))]
        self.num_rows = len(rows)

    def pieces(self, row: int) -> list[Piece]:
        return [Piece(document, 0, int(self.lengths[document])) for document in self.rows[row]]


class PackedRows:
    """Endless rows of `row_length` tokens, epoch after epoch, each epoch in an order of its own.

    Args:
        shards: the documents.
        row_length: tokens in a row.
        seed: of the order.
        packing: "cut" or "whole", see above. A document longer than a row is cut off in "whole".
        pad_id: fills the ends of rows.

    Raises:
        InputError: fewer tokens than one row.
    """

    def __init__(
        self, shards: TokenShards, row_length: int, seed: int, packing: Literal["cut", "whole"], pad_id: int = 0
    ) -> None:
        if packing == "cut" and shards.num_tokens < row_length:
            raise InputError(
                f"{shards.directory} holds {shards.num_tokens:,} tokens, less than one row of {row_length:,}. "
                "Give more text, or a smaller row_length."
            )
        self.shards, self.row_length, self.seed, self.pad_id = shards, row_length, seed, pad_id
        self._layout = lru_cache(maxsize=2)(partial(self._make_layout, _Cut if packing == "cut" else _Whole))
        self.rows_per_epoch = self._layout(0).num_rows
        """Rows in one pass over the documents: the same in every epoch, since only their order changes."""

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """Rows by number, counted from 0 over all epochs."""
        filled = [fill_row(self.shards, self._pieces(row), self.row_length, self.pad_id) for row in rows]
        return TokenBatch(*(torch.from_numpy(np.stack(column)) for column in zip(*filled, strict=True)))

    def documents(self, row: int) -> list[int]:
        """The documents that a row holds tokens of."""
        return [piece.document for piece in self._pieces(row)]

    def origins(self, row: int) -> list[tuple[TokenShards, int]]:
        """The documents that a row holds tokens of, with the shards that they are in."""
        return [(self.shards, document) for document in self.documents(row)]

    def _pieces(self, row: int) -> list[Piece]:
        epoch, within = divmod(row, self.rows_per_epoch)
        return self._layout(epoch).pieces(within)

    def _make_layout(self, kind: type[_Cut] | type[_Whole], epoch: int) -> _Cut | _Whole:
        generator = np.random.default_rng(derive_seed(self.seed, "documents", epoch))
        return kind(self.shards.lengths(), self.row_length, generator)


def fill_row(
    shards: TokenShards, pieces: Sequence[Piece], row_length: int, pad_id: int
) -> tuple[NDArray[np.int64], ...]:
    """One row of pieces side by side: the columns of a `TokenBatch`."""
    ids = np.full(row_length, pad_id, dtype=np.int64)
    labels = np.full(row_length, IGNORE, dtype=np.int64)
    positions = np.zeros(row_length, dtype=np.int64)
    documents = np.full(row_length, PADDING, dtype=np.int64)
    at = 0
    for number, piece in enumerate(pieces):
        span = slice(at, at + piece.stop - piece.start)
        ids[span] = shards.ids(piece.document, piece.start, piece.stop)
        # A token's label is the next token of the same document, also where that stands in the next row.
        targets = shards.ids(piece.document, piece.start + 1, piece.stop + 1).astype(np.int64)
        mask = shards.mask(piece.document, piece.start + 1, piece.stop + 1)
        if mask is not None:
            targets = np.where(mask, targets, IGNORE)
        labels[at : at + len(targets)] = targets
        positions[span] = np.arange(piece.stop - piece.start)
        documents[span] = number
        at = span.stop
    return ids, labels, positions, documents


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins: each goes to the fullest bin that still has room; decreasing lengths waste least.

    Args:
        lengths: of each item, none above `capacity`.
        capacity: of each bin.

    Returns:
        The items of each bin. Ding et al. 2024 (arXiv:2404.10830) show what this is good for in training.
    """
    bins: list[list[int]] = []
    bins_with_space: dict[int, list[int]] = {}
    spaces = 0  # bit s is set when some bin has s left: the tightest fit is the lowest set bit at or above a length
    for item, length in enumerate(lengths):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            target = bins_with_space[space].pop()
            if not bins_with_space[space]:
                spaces &= ~(1 << space)
        else:
            space, target = capacity, len(bins)
            bins.append([])
        bins[target].append(item)
        bins_with_space.setdefault(space - length, []).append(target)
        spaces |= 1 << (space - length)
    return bins
