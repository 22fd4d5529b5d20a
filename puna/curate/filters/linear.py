"""Linear text classifiers over hashed words and characters, after fastText (Joulin et al. 2016).

A text is the bag of its words, of runs of words and of runs of characters inside words, each hashed to a row of a
table; the mean of the rows is the score of each label, and their softmax its probability. Unlike fastText there is no
layer between: with hashing, a table of labels is small and as good. Training is Adagrad, one text at a time, in order
of a seeded shuffle: the same examples give the same bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from puna.batches.words import (
    Bytes,
    Positions,
    character_classes,
    decode,
    folded_characters,
    hash_folded,
    next_word,
    scramble,
    text_buffers,
)
from puna.curate.filters.reasons import require_not_negative
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path

FILE_NAME = "classifier.safetensors"
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_EDGE = np.uint64(0x5F)


@dataclass(frozen=True)
class Features:
    """What of a text a classifier looks at."""

    word_n_grams: int = 2
    """Longest run of words; 0 looks at no words."""
    min_character_n_gram: int = 0
    """Shortest run of characters of a word (its edges count as characters); 0 looks at no characters."""
    max_character_n_gram: int = 0
    """Longest run of characters of a word."""
    num_rows: int = 1 << 18
    """Rows of the table; more of them collide less. A power of two."""
    max_bytes: int = 20_000
    """How much of the beginning of a text is looked at, in bytes of UTF-8."""

    def __post_init__(self) -> None:
        require_not_negative(self, "word_n_grams", "min_character_n_gram")
        if self.max_character_n_gram < self.min_character_n_gram:
            raise ValueError("max_character_n_gram is smaller than min_character_n_gram.")
        if self.word_n_grams == 0 and self.min_character_n_gram == 0:
            raise ValueError(
                "a classifier has to look at words or at characters: set word_n_grams or min_character_n_gram."
            )
        if self.num_rows < 2 or self.num_rows & (self.num_rows - 1):
            raise ValueError(f"num_rows must be a power of two, not {self.num_rows}.")
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {self.max_bytes}.")


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """A trained classifier."""

    labels: tuple[str, ...]
    features: Features
    table: NDArray[np.float32]
    """(features.num_rows, labels)."""

    def probabilities(self, texts: pa.Array | pa.ChunkedArray) -> NDArray[np.float32]:
        """Probability of each label for each text, (texts, labels); all the same for texts without features."""
        data, offsets = text_buffers(texts)
        probabilities: NDArray[np.float32] = _score(data, offsets, *_settings(self.features), self.table)
        return probabilities

    def save(self, directory: Path) -> None:
        """Write `classifier.safetensors` into `directory`."""
        # One entry: the order of several would differ from run to run.
        settings = json.dumps({"labels": self.labels, "features": asdict(self.features)})
        with atomic_path(directory / FILE_NAME) as path:
            save_file({"table": self.table}, path, metadata={"classifier": settings})


def load_classifier(directory: Path) -> LinearClassifier:
    """Read what `LinearClassifier.save` wrote.

    Raises:
        InputError: there is none, or it is broken.
    """
    path = directory / FILE_NAME
    try:
        with safe_open(path, framework="numpy") as file:
            settings = json.loads((file.metadata() or {})["classifier"])
            table = file.get_tensor("table")
        features, labels = Features(**settings["features"]), tuple(settings["labels"])
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist. Train a classifier first, or give the folder that holds one."
        ) from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a classifier of Puna: {error}.") from error
    if table.shape != (features.num_rows, len(labels)):
        raise InputError(f"{path} is broken: its table is {table.shape}, not {(features.num_rows, len(labels))}.")
    return LinearClassifier(labels, features, table)


@cache
def cached_classifier(directory: Path) -> LinearClassifier:
    """`load_classifier`, once a process."""
    return load_classifier(directory)


def train_classifier(
    texts: pa.Array | pa.ChunkedArray,
    labels: Sequence[str],
    features: Features | None = None,
    *,
    epochs: int = 5,
    learning_rate: float = 1.0,
    seed: int = 0,
) -> LinearClassifier:
    """Learn from labelled texts.

    Args:
        texts: the examples.
        labels: the label of each; at least two different ones.
        features: what to look at.
        epochs: passes over all examples.
        learning_rate: of Adagrad.
        seed: of the order of examples.

    Raises:
        InputError: not one label for each text, or fewer than two labels.
    """
    features = features or Features()
    names = tuple(sorted(set(labels)))
    if len(labels) != len(texts) or len(names) < 2:
        raise InputError(
            f"A classifier learns from texts with at least two different labels: got {len(texts)} texts, {len(labels)} "
            f"labels, {len(names)} of them different."
        )
    numbers = {name: number for number, name in enumerate(names)}
    targets = np.array([numbers[label] for label in labels], np.int64)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(len(texts)) for epoch in range(epochs)])
    table = np.zeros((features.num_rows, len(names)), np.float32)
    data, offsets = text_buffers(texts)
    _train(data, offsets, *_settings(features), targets, order, learning_rate, table)
    return LinearClassifier(names, features, table)


def _settings(features: Features) -> tuple[Bytes, NDArray[np.uint32], tuple[int, int, int, int, int]]:
    numbers = (
        features.word_n_grams,
        features.min_character_n_gram,
        features.max_character_n_gram,
        features.num_rows,
        features.max_bytes,
    )
    return character_classes(), folded_characters(), numbers


@njit(cache=True, nogil=True)
def _find_features(
    data: Bytes,
    at: int,
    end: int,
    classes: Bytes,
    folded: NDArray[np.uint32],
    settings: tuple[int, int, int, int, int],
    rows: NDArray[np.int64],
) -> tuple[int, NDArray[np.int64]]:
    """Rows of the table for the features of bytes [at, end), and how many; `rows` is given back, larger if need be."""
    word_n_grams, shortest, longest, num_rows, max_bytes = settings
    mask = np.uint64(num_rows - 1)
    end = min(end, at + max_bytes)
    while end > at and end < len(data) and data[end] & 0xC0 == 0x80:
        end -= 1
    recent = np.zeros(max(word_n_grams, 1), np.uint64)
    characters = np.empty(64, np.uint64)
    count = words = 0
    while True:
        start, at = next_word(data, at, end, classes)
        if start == end:
            return count, rows
        needed = count + word_n_grams + (longest - shortest + 1) * (at - start + 2)
        if needed > len(rows):
            rows = np.concatenate((rows, np.empty(needed, np.int64)))
        if word_n_grams:
            recent[words % word_n_grams] = hash_folded(data, start, at, folded)
            words += 1
            value = np.uint64(0)
            for n in range(min(word_n_grams, words)):
                value = scramble(value * _PRIME + recent[(words - 1 - n) % word_n_grams] + np.uint64(n))
                rows[count] = value & mask
                count += 1
        if shortest:
            if at - start + 2 > len(characters):
                characters = np.empty(2 * (at - start + 2), np.uint64)
            characters[0] = _EDGE
            length, inner = 1, start
            while inner < at:
                code, size = decode(data, inner)
                characters[length] = folded[code]
                length += 1
                inner += size
            characters[length] = _EDGE
            length += 1
            for first in range(length):
                value = _PRIME
                for n in range(min(longest, length - first)):
                    value = (value ^ characters[first + n]) * _PRIME
                    value ^= value >> np.uint64(29)
                    if n + 1 >= shortest:
                        rows[count] = scramble(value + np.uint64(n)) & mask
                        count += 1


@njit(cache=True, nogil=True)
def _predict(rows: NDArray[np.int64], count: int, table: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Softmax of the mean of the rows."""
    out[:] = 0
    for feature in range(count):
        row = table[rows[feature]]
        for label in range(len(out)):
            out[label] += row[label]
    largest = np.float32(-np.inf)
    for label in range(len(out)):
        out[label] /= max(count, 1)
        largest = max(largest, out[label])
    total = np.float32(0)
    for label in range(len(out)):
        out[label] = np.exp(out[label] - largest)
        total += out[label]
    for label in range(len(out)):
        out[label] /= total


@njit(cache=True, nogil=True)
def _score(
    data: Bytes,
    offsets: Positions,
    classes: Bytes,
    folded: NDArray[np.uint32],
    settings: tuple[int, int, int, int, int],
    table: NDArray[np.float32],
) -> NDArray[np.float32]:
    probabilities = np.empty((len(offsets) - 1, table.shape[1]), np.float32)
    rows = np.empty(4096, np.int64)
    for document in range(len(offsets) - 1):
        start, end = offsets[document], offsets[document + 1]
        count, rows = _find_features(data, start, end, classes, folded, settings, rows)
        _predict(rows, count, table, probabilities[document])
    return probabilities


@njit(cache=True, nogil=True)
def _train(
    data: Bytes,
    offsets: Positions,
    classes: Bytes,
    folded: NDArray[np.uint32],
    settings: tuple[int, int, int, int, int],
    targets: NDArray[np.int64],
    order: NDArray[np.int64],
    learning_rate: float,
    table: NDArray[np.float32],
) -> None:
    """Adagrad over rows: one accumulator a row and label; the gradient of the mean, times the number of features."""
    squares = np.full(table.shape, np.float32(1e-6))
    rows = np.empty(4096, np.int64)
    probabilities = np.empty(table.shape[1], np.float32)
    for document in order:
        start, end = offsets[document], offsets[document + 1]
        count, rows = _find_features(data, start, end, classes, folded, settings, rows)
        _predict(rows, count, table, probabilities)
        probabilities[targets[document]] -= 1
        for feature in range(count):
            row = rows[feature]
            for label in range(table.shape[1]):
                gradient = probabilities[label]
                squares[row, label] += gradient * gradient
                table[row, label] -= learning_rate * gradient / np.sqrt(squares[row, label])
