"""Rows that know their numbers: what randomness has to follow from, for a resumed run to be the same run."""

from collections.abc import Sequence
from dataclasses import fields, make_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from puna.batches.packing import Rows, TokenBatch
from puna.batches.shards import TokenShards
from puna.train.quarantine import Traceable


class NumberedRows:
    """The same rows, in batches that have their numbers too (`row_numbers`).

    Args:
        rows: their batches may be of any class derived from `TokenBatch`.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """Rows by number, counted from 0."""
        return with_numbers(self.rows.batch(rows), torch.tensor(list(rows)))

    def origins(self, row: int) -> list[tuple[TokenShards, int]]:
        """See `puna.batches.packing.PackedRows.origins`; empty where the rows do not know."""
        return self.rows.origins(row) if isinstance(self.rows, Traceable) else []


def with_numbers(batch: TokenBatch, rows_B: Tensor) -> TokenBatch:
    """The same batch, of a class derived from its own that has a column more: the number of each row."""
    columns = {field.name: getattr(batch, field.name) for field in fields(batch)}
    kind: Any = type(batch)
    numbered: TokenBatch = _kind(kind)(**columns, rows_B=rows_B)
    return numbered


def row_numbers(batch: TokenBatch) -> list[int]:
    """The numbers of the rows of a batch of `NumberedRows`."""
    numbers: list[int] = batch.rows_B.tolist()  # type: ignore[attr-defined]
    return numbers


def twice(batch: TokenBatch) -> TokenBatch:
    """The rows of a batch of `NumberedRows`, and behind them the same rows again, the second copy of row n being ~n."""
    columns = {field.name: getattr(batch, field.name) for field in fields(batch)}
    second = columns | {"rows_B": ~columns["rows_B"]}
    return type(batch)(**{name: torch.cat((column, second[name])) for name, column in columns.items()})


@cache
def _kind(kind: Any) -> Any:
    return make_dataclass(f"Numbered{kind.__name__}", [("rows_B", Tensor)], bases=(kind,), frozen=True, slots=True)
