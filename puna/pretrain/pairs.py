"""Sentence pairs: do two stretches of text follow each other?

A "sentence" is any contiguous stretch of a document, as in BERT (arXiv:1810.04805, appendix A.2) and ALBERT
(arXiv:1909.11942, section 3.1). A row is BOS, the first stretch, EOS, the second, EOS, and padding. There is no
embedding of the segment: position and EOS tell the two apart.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from puna.batches.packing import PADDING
from puna.batches.shards import TokenShards
from puna.runtime.errors import InputError
from puna.runtime.seeds import derive_seed
from puna.tokenizer.base import Tokenizer

PairKind = Literal["next_sentence", "sentence_order"]

_SHORTEST = 8
"""Tokens that a document needs for a pair to be cut from it."""
_SPECIAL = 3
"""BOS and two EOS."""
_TRIES = 1000

ShardsOf = Callable[[int], TokenShards]
"""The documents that a row is made of, by the row's number."""


class PairRows:
    """Endless rows of one pair each; row *i* is a pure function of (shards, seed, *i*).

    Class 0 is a stretch and what follows it; class 1, as often, is a stretch and a stretch of another document
    ("next_sentence"), or the two of class 0 exchanged ("sentence_order").

    Args:
        shards_of: where a row's text comes from. Every token is as likely as any other to be in a row.
        tokenizer: gives BOS, EOS and padding.
        row_length: tokens in a row.
        seed: of the choice.
        kind: what class 1 is.

    Raises:
        InputError: the tokenizer has no BOS or EOS, or rows are too short.
    """

    def __init__(self, shards_of: ShardsOf, tokenizer: Tokenizer, row_length: int, seed: int, kind: PairKind) -> None:
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            raise InputError(f"The objective {kind} needs a tokenizer with BOS and EOS, to stand around the stretches.")
        if row_length < _SHORTEST + _SPECIAL:
            raise InputError(f"The objective {kind} needs rows of at least {_SHORTEST + _SPECIAL} tokens.")
        self.shards_of, self.row_length, self.seed, self.kind = shards_of, row_length, seed, kind
        self.bos_id, self.eos_id, self.pad_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id

    def row(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int]:
        """Ids, positions and document numbers of a row, each of shape [T], and its class."""
        first, second, label, _ = self._choose(number)
        return *self._lay_out(first, second), label

    def origins(self, number: int) -> list[tuple[TokenShards, int]]:
        """The documents that a row's stretches are from, with their shards."""
        _, _, _, documents = self._choose(number)
        return [(self.shards_of(number), document) for document in documents]

    def _choose(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int, list[int]]:
        """The two stretches of a row, its class, and the documents that they are from."""
        shards = self.shards_of(number)
        generator = np.random.default_rng(derive_seed(self.seed, self.kind, number))
        document, text = self._draw(shards, generator, other_than=None)
        documents = [document]
        budget = self.row_length - _SPECIAL
        start = int(generator.integers(max(1, len(text) - budget + 1)))
        stretch = text[start : start + budget]
        # Neither side is less than a quarter of the whole.
        split = int(generator.integers(len(stretch) // 4, len(stretch) - len(stretch) // 4 + 1))
        first, second = stretch[:split], stretch[split:]
        label = int(generator.integers(2))
        if label and self.kind == "sentence_order":
            first, second = second, first
        elif label:
            other, text = self._draw(shards, generator, other_than=document)
            documents.append(other)
            start = int(generator.integers(max(1, len(text) - len(second) + 1)))
            second = text[start : start + len(second)]
        return first, second, label, documents

    def _draw(
        self, shards: TokenShards, generator: np.random.Generator, other_than: int | None
    ) -> tuple[int, NDArray[np.int64]]:
        """A document that holds a token drawn from all of them, and its ids without BOS and EOS."""
        for _ in range(_TRIES):
            document, _ = shards.document_of_token(int(generator.integers(shards.num_tokens)))
            ids = shards.ids(document).astype(np.int64)
            ids = ids[(ids != self.bos_id) & (ids != self.eos_id)]
            if len(ids) >= _SHORTEST and document != other_than:
                return document, ids
        raise InputError(
            f"{shards.directory} hardly holds documents of {_SHORTEST} tokens or more (or only one), so that the "
            f"objective {self.kind} finds no pairs."
        )

    def _lay_out(
        self, first: NDArray[np.int64], second: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        text = np.concatenate(([self.bos_id], first, [self.eos_id], second, [self.eos_id]))
        ids = np.full(self.row_length, self.pad_id, dtype=np.int64)
        positions = np.zeros(self.row_length, dtype=np.int64)
        documents = np.full(self.row_length, PADDING, dtype=np.int64)
        ids[: len(text)], positions[: len(text)], documents[: len(text)] = text, np.arange(len(text)), 0
        return ids, positions, documents
