"""What every task has in common: settings, examples, rows of them, and what a head is.

Shapes: B examples, T tokens, C outputs of the head.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from puna.batches.packing import IGNORE, PADDING, Rows, TokenBatch
from puna.finetune.regularize.agreement import symmetric_divergence
from puna.peft.heads import Attention, HeadSpec
from puna.runtime.errors import InputError
from puna.runtime.seeds import derive_seed
from puna.tokenizer.base import Tokenizer

Item = TypeVar("Item")


@dataclass(frozen=True)
class TaskData:
    """The examples of a task."""

    train: Path
    """File to learn from; what may be in it, the task says."""
    held_out: Path | None = None
    """File to measure on."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a .csv or .tsv file that has no header."""
    held_out_share: float = 0.0
    """Where `held_out` is absent, this share of the examples is set aside for it, by chance and always the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share is {self.held_out_share}; it has to be at least 0 and less than 1.")


def read_both(data: TaskData, read: Callable[[Path], Sequence[Item]]) -> tuple[list[Item], list[Item]]:
    """What there is to learn from, and what is held out.

    Args:
        read: reads a file.

    Raises:
        InputError: a file holds nothing, or too little to hold something out.
    """
    train = list(read(data.train))
    if not train:
        raise InputError(f"{data.train} holds no example.")
    if data.held_out is not None:
        held_out = list(read(data.held_out))
        if not held_out:
            raise InputError(f"{data.held_out} holds no example.")
        return train, held_out
    count = round(data.held_out_share * len(train))
    if data.held_out_share and not 0 < count < len(train):
        raise InputError(
            f"{data.train} holds {len(train):,} examples, of which data.held_out_share ({data.held_out_share:g}) is "
            f"{'none' if not count else 'all'}."
        )
    generator = np.random.default_rng(derive_seed(0, "held out"))
    chosen = set(generator.permutation(len(train))[:count].tolist())
    return (
        [item for number, item in enumerate(train) if number not in chosen],
        [item for number, item in enumerate(train) if number in chosen],
    )


@dataclass(frozen=True, slots=True)
class Example:
    """One text, and what the head should say about it."""

    ids: list[int]
    """Its tokens."""
    labels: list[int]
    """For each token the class that the head should give there; IGNORE where it is not asked. For other targets: 0
    where the head is asked."""
    targets: tuple[float, ...] = ()
    """Targets of the whole text that are not classes of tokens."""


@dataclass(frozen=True, slots=True)
class ExampleBatch(TokenBatch):
    """One example a row, filled up on the right."""

    targets_BC: Tensor
    """`Example.targets`, float32."""


class ExampleRows:
    """Endless rows of one example each, epoch after epoch, each in an order of its own; row *i* follows from the seed.

    Args:
        examples: at least one.
        pad_id: fills rows up to the longest of a batch.
        seed: of the order.
    """

    def __init__(self, examples: Sequence[Example], pad_id: int, seed: int) -> None:
        self.examples, self.pad_id, self.seed = examples, pad_id, seed
        self.rows_per_epoch = len(examples)
        self._order = lru_cache(maxsize=2)(self._make_order)

    def batch(self, rows: Sequence[int]) -> ExampleBatch:
        """Rows by number, counted from 0."""
        return collate([self.example(row) for row in rows], self.pad_id)

    def example(self, row: int) -> Example:
        """The example in a row."""
        epoch, within = divmod(row, self.rows_per_epoch)
        return self.examples[int(self._order(epoch)[within])]

    def _make_order(self, epoch: int) -> Any:
        return np.random.default_rng(derive_seed(self.seed, "examples", epoch)).permutation(self.rows_per_epoch)


def collate(examples: Sequence[Example], pad_id: int) -> ExampleBatch:
    """Examples as rows, filled up to the longest."""
    shape = len(examples), max(len(example.ids) for example in examples)
    ids_BT = torch.full(shape, pad_id)
    labels_BT = torch.full(shape, IGNORE)
    documents_BT = torch.full(shape, PADDING)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids_BT[row, :length] = torch.tensor(example.ids)
        labels_BT[row, :length] = torch.tensor(example.labels)
        documents_BT[row, :length] = 0
    positions_BT = torch.arange(shape[1]).expand(shape).clone()
    targets_BC = torch.tensor([example.targets for example in examples], dtype=torch.float32)
    return ExampleBatch(ids_BT, labels_BT, positions_BT, documents_BT, targets_BC)


def mean_units(examples: Sequence[Example]) -> float:
    """Labels that are asked for in a mean example."""
    return sum(label != IGNORE for example in examples for label in example.labels) / len(examples)


class OpenTask(ABC):
    """A task with its data read and checked.

    Attributes:
        head: what the head is.
        attention: whether a token sees what comes after it.
        train, held_out: the examples.
        metrics: names of the curves that `measure` draws.
    """

    head: HeadSpec
    attention: Attention
    train: list[Example]
    held_out: list[Example]
    metrics: tuple[str, ...]

    def rows(self, pad_id: int, seed: int) -> Rows:
        """Endless rows of what there is to learn from.

        Args:
            pad_id: fills rows up to the longest of a batch.
            seed: of the order.
        """
        return ExampleRows(self.train, pad_id, seed)

    @property
    def units_per_row(self) -> float:
        """Units of the loss in a mean row."""
        return mean_units(self.train)

    @abstractmethod
    def loss(self, logits_BTC: Tensor, batch: ExampleBatch) -> Tensor:
        """Sum over the batch's units, which are the labels that are not IGNORE."""

    def divergence(self, logits_BTC: Tensor, batch: ExampleBatch) -> Tensor:
        """How far two passes are apart, for R-Drop: `symmetric_divergence` summed over the units of one.

        Args:
            logits_BTC: the second pass's rows stand behind those of the first, as the batch has every example twice.
        """
        first_NC, second_NC = logits_BTC[batch.labels_BT != IGNORE].log_softmax(-1).chunk(2)
        return symmetric_divergence(first_NC, second_NC)

    @abstractmethod
    def measure(self, logits: Sequence[Tensor]) -> tuple[dict[str, float], str]:
        """Metrics by the names of curves, and a report to read, from the logits [T, C] of each held-out example."""


class Task(ABC):
    """The settings of a task; each is a frozen dataclass with a `kind`."""

    attention: Attention

    @abstractmethod
    def open(self, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> OpenTask:
        """Read and check the data.

        Raises:
            InputError: it cannot be learnt from; names file, line and reason.
        """
