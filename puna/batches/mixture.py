"""Rows from several sources in fixed proportions; row *i* is still a pure function of (shards, mixture, seed, *i*).

Each row comes from one source. Which one is read from a table of `PERIOD` entries that repeats: in every prefix of it a
source has its share of the rows, rounded up or down to a whole row, so that every stretch of a training run has the
wanted composition. Drawing sources at random would not: of 100 rows, 4.5 % would come out as anything from none to ten.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from puna.batches.packing import EpochRows, PackedRows, TokenBatch
from puna.batches.shards import TokenShards, shard_folders
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer

PERIOD = 100_000
"""Rows after which the order of sources repeats; shares are rounded to 1 / PERIOD."""


@dataclass(frozen=True)
class MixtureSource:
    """One ingredient."""

    name: str
    """What it is called in reports."""
    tokens: Path
    """Folder of token shards; or of several such folders (`puna tokenize` with split_by), weighed by `temperature`."""
    proportion: float = 0.0
    """Share of the rows; only the ratio to the other sources' matters."""
    annealing_proportion: float | None = None
    """The same for the last part of training; absent, it stays as it is."""
    temperature: float = 1.0
    """Between several folders, shares are in proportion to tokens ** (1 / temperature): 1 is as they are, larger
    values bring small ones up (languages: Conneau et al. 2020, arXiv:1911.02116, section 3.1)."""

    def __post_init__(self) -> None:
        if min(self.proportion, self.annealing_proportion or 0.0) < 0:
            raise ValueError(f"The proportions of {self.name} have to be 0 or more.")
        if not self.temperature > 0:
            raise ValueError(f"The temperature of {self.name} is {self.temperature}; it has to be above 0.")

    @property
    def final_proportion(self) -> float:
        """Share of the rows in the last part of training."""
        return self.proportion if self.annealing_proportion is None else self.annealing_proportion


@dataclass(frozen=True)
class MixtureConfig:
    """What to train on, in which proportions."""

    sources: tuple[MixtureSource, ...]
    """The ingredients."""
    annealing_share: float = 0.0
    """The last share of the steps that uses the annealing proportions (Llama 3, arXiv:2407.21783, section 3.4.3)."""
    max_epochs: float = 4.0
    """Refuse to go over a source more often than this. Up to four times, repeated text is nearly as good as fresh
    (Muennighoff et al. 2023, arXiv:2305.16264, section 6)."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"Two sources of the mixture have the same name ({', '.join(names)}).")
        if not sum(source.proportion for source in self.sources) > 0:
            raise ValueError("A mixture needs a source whose proportion is above 0.")
        if not sum(source.final_proportion for source in self.sources) > 0:
            raise ValueError("Annealing needs a source whose proportion is above 0.")
        if not 0 <= self.annealing_share < 1:
            raise ValueError(f"annealing_share is {self.annealing_share}; it has to be at least 0 and less than 1.")
        annealing = [source.annealing_proportion for source in self.sources]
        if any(value is not None for value in annealing) != (self.annealing_share > 0):
            raise ValueError("Set annealing_share and some source's annealing_proportion, or neither.")


class Rotation:
    """An endless sequence of numbers 0, ..., n - 1 in which each has its share of every prefix, to within one.

    Args:
        shares: of each number; only their ratios matter. One above 0 gets at least one place in `PERIOD`.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.counts = whole_counts(shares, PERIOD)
        """Places of each number in one period."""
        self._order = fair_order(self.counts)
        self._places = [np.flatnonzero(self._order == number) for number in range(len(shares))]

    def at(self, place: int) -> int:
        """The number at a place, 0, 1, ..."""
        return int(self._order[place % PERIOD])

    def count(self, number: int, places: int) -> int:
        """How often a number stands in the first `places`."""
        periods, rest = divmod(places, PERIOD)
        return int(periods * self.counts[number] + np.searchsorted(self._places[number], rest))


def whole_counts(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total` in the given proportions (largest remainders), none of them 0 for a share
    above 0."""
    exact = np.asarray(shares, dtype=np.float64) / sum(shares) * total
    counts = np.floor(exact + 1e-9).astype(np.int64)
    counts[(counts == 0) & (exact > 0)] = 1
    by_need = np.argsort(counts - exact, kind="stable")
    missing = total - int(counts.sum())
    if missing >= 0:
        counts[by_need[:missing]] += 1
    else:
        counts[np.argmax(counts)] += missing
    return [int(count) for count in counts]


def fair_order(counts: Sequence[int]) -> NDArray[np.uint16]:
    """Arrange `counts[n]` copies of each n so that every prefix has its share of each, rounded up or down.

    Copy j of n may stand no earlier than place floor(j * total / counts[n]) and before ceil((j + 1) * total /
    counts[n]); taking, of the copies that may, the one whose time runs out first always succeeds (Baruah et al. 1996,
    "Proportionate progress", theorem 1, for one processor; Tijdeman 1980, "The chairman assignment problem").
    """
    total = sum(counts)
    order = np.empty(total, dtype=np.uint16)
    later = [(0, number, 0) for number, count in enumerate(counts) if count]
    due: list[tuple[int, int, int]] = []
    for place in range(total):
        while later and later[0][0] <= place:
            _, number, copy = heapq.heappop(later)
            heapq.heappush(due, (-(-(copy + 1) * total // counts[number]), number, copy))
        _, number, copy = heapq.heappop(due)
        order[place] = number
        if copy + 1 < counts[number]:
            heapq.heappush(later, ((copy + 1) * total // counts[number], number, copy + 1))
    return order


class SourceRows(EpochRows, Protocol):
    """Rows of one folder of token shards."""

    @property
    def shards(self) -> TokenShards:
        """The shards."""
        ...

    def origins(self, row: int) -> list[tuple[TokenShards, int]]:
        """The documents that a row holds tokens of, with the shards that they are in."""
        ...


@dataclass(frozen=True)
class Ingredient:
    """One folder of token shards within a mixture."""

    name: str
    """The source's name, and the folder's within it where there are several."""
    rows: SourceRows
    """Its rows, of the same kind as those of the others."""
    share: float
    """Of the rows before annealing, 0 to 1."""
    annealing_share: float
    """Of the rows from there on, 0 to 1."""


class MixedRows:
    """Endless rows from several sources, each of which are rows by themselves, such as `PackedRows`.

    Args:
        ingredients: what to mix.
        annealing_start: the row with which the annealing shares begin.
    """

    def __init__(self, ingredients: Sequence[Ingredient], annealing_start: int) -> None:
        self.ingredients = list(ingredients)
        self.annealing_start = annealing_start
        self._before = Rotation([ingredient.share for ingredient in ingredients])
        self._after = Rotation([ingredient.annealing_share for ingredient in ingredients])

    def locate(self, row: int) -> tuple[int, int]:
        """(number of the ingredient, number of its row)."""
        annealing = row - self.annealing_start
        number = self._before.at(row) if annealing < 0 else self._after.at(annealing)
        return number, self.count(number, row)

    def count(self, ingredient: int, rows: int) -> int:
        """How many of the first `rows` come from an ingredient."""
        before = min(rows, self.annealing_start)
        return self._before.count(ingredient, before) + self._after.count(ingredient, rows - before)

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """Rows by number, counted from 0."""
        located = [self.locate(row) for row in rows]
        parts = [self.ingredients[number].rows.batch([row]) for number, row in located]
        kind = type(parts[0])
        return kind(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(kind)))

    def origins(self, row: int) -> list[tuple[TokenShards, int]]:
        """The documents that a row holds tokens of, with the shards that they are in."""
        number, own = self.locate(row)
        return self.ingredients[number].rows.origins(own)

    def epochs(self, rows: int) -> dict[str, float]:
        """How often each ingredient has been gone over after that many rows."""
        return {
            ingredient.name: self.count(number, rows) / ingredient.rows.rows_per_epoch
            for number, ingredient in enumerate(self.ingredients)
        }


def temperature_shares(sizes: Sequence[int], temperature: float) -> list[float]:
    """Shares in proportion to size ** (1 / temperature), adding up to 1."""
    weights = np.asarray(sizes, dtype=np.float64) ** (1 / temperature)
    return [float(share) for share in weights / weights.sum()]


def open_mixture(
    config: MixtureConfig,
    *,
    tokenizer: Tokenizer,
    row_length: int,
    seed: int,
    steps: int,
    batch_rows: int,
) -> MixedRows:
    """Open the shards of a mixture for a training of `steps` steps.

    Args:
        config: the mixture.
        tokenizer: the one that has to have made the shards.
        row_length: tokens in a row.
        seed: of the order of documents within each source.
        steps: of the training; decides where annealing begins and how often each source is gone over.
        batch_rows: rows in a step.

    Raises:
        InputError: a folder is no folder of shards, was made by another tokenizer, holds less than a row, or would be
            gone over more than `max_epochs` times.
    """
    before = _shares({source.name: source.proportion for source in config.sources})
    after = _shares({source.name: source.final_proportion for source in config.sources})
    ingredients = []
    for source in config.sources:
        if not (before[source.name] or after[source.name]):
            continue
        folders = shard_folders(source.tokens)
        opened = {name: TokenShards(folder, tokenizer.hash) for name, folder in folders.items()}
        inner = temperature_shares([shards.num_tokens for shards in opened.values()], source.temperature)
        for (name, shards), share in zip(opened.items(), inner, strict=True):
            ingredients.append(
                Ingredient(
                    f"{source.name}/{name}" if name else source.name,
                    PackedRows(shards, row_length, seed, "cut", tokenizer.pad_id),
                    before[source.name] * share,
                    after[source.name] * share,
                )
            )
    rows = MixedRows(ingredients, batch_rows * (steps - round(steps * config.annealing_share)))
    too_often = {name: n for name, n in rows.epochs(steps * batch_rows).items() if n > config.max_epochs}
    if too_often:
        raise InputError(
            f"This training would go over {', '.join(f'{name} {n:.1f} times' for name, n in too_often.items())}, more "
            f"often than max_epochs ({config.max_epochs:g}). Lower the proportion, train on fewer tokens, give more "
            "text, or raise max_epochs."
        )
    return rows


def _shares(proportions: Mapping[str, float]) -> dict[str, float]:
    total = sum(proportions.values())
    return {name: proportion / total for name, proportion in proportions.items()}
