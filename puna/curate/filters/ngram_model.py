"""A language model that counts n-grams, saved and quick: what perplexity filters score with.

Interpolated Kneser-Ney over the tokens of a tokenizer of Puna, trained by `puna.evaluate.baselines.KneserNey`; here its
counts are put into hash tables and files. Texts are lower-cased and their digits made 0 first, as CCNet does (Wenzek et
al. 2020, section 3.3).
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from puna.batches.words import scramble
from puna.evaluate.baselines import KneserNey
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer

FILE_NAME = "ngrams.safetensors"
_PRIME = np.uint64(0x9E3779B97F4A7C15)

Hashes = NDArray[np.uint64]
Floats = NDArray[np.float32]


class NgramModel:
    """Interpolated Kneser-Ney n-gram model (Chen and Goodman 1999, section 4.1.6).

    Args:
        tokenizer: what its tokens are.
        arrays: for each order n from 1: "grams_n" and "counts_n" (counts less the discount), "contexts_n", "totals_n"
            and "freed_n" (what the discount frees for the next lower order).
    """

    def __init__(self, tokenizer: Tokenizer, arrays: dict[str, NDArray[Any]]) -> None:
        self.tokenizer = tokenizer
        self.arrays = arrays
        self.order = sum(name.startswith("grams_") for name in arrays)
        self._grams = [_hash_table(arrays[f"grams_{n}"]) for n in range(1, self.order + 1)]
        self._contexts = [_hash_table(arrays[f"contexts_{n}"]) for n in range(1, self.order + 1)]

    @classmethod
    def train(cls, texts: pa.Array | pa.ChunkedArray, tokenizer: Tokenizer, order: int = 5) -> "NgramModel":
        """Count the n-grams of reference texts; takes some 100 bytes of memory a token.

        Raises:
            InputError: there is no token to learn from.
        """
        documents = [np.asarray(ids, np.int64) for ids in tokenizer.encode_batch(_normalize(texts).to_pylist()) if ids]
        if not documents:
            raise InputError("There is no text to train a language model on: the documents are empty.")
        counted = _Counted(documents, order, tokenizer.vocab_size)
        return cls(tokenizer, counted.arrays())

    def perplexities(self, texts: pa.Array | pa.ChunkedArray) -> NDArray[np.float64]:
        """exp of the mean negative log-likelihood of a token, for each text; not a number for empty ones."""
        encoded = self.tokenizer.encode_batch(_normalize(texts).to_pylist())
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded], dtype=np.int64)])
        tokens = np.fromiter((token for ids in encoded for token in ids), np.uint64, offsets[-1])
        probabilities = np.full(len(tokens), 1 / self.tokenizer.vocab_size)
        for n in range(1, self.order + 1):
            counts, totals, freed = (self.arrays[f"{name}_{n}"] for name in ("counts", "totals", "freed"))
            _mix(tokens, offsets, n, *self._grams[n - 1], counts, *self._contexts[n - 1], totals, freed, probabilities)
        sums = np.concatenate([[0], np.cumsum(-np.log(probabilities))])
        lengths = np.diff(offsets)
        nats = (sums[offsets[1:]] - sums[offsets[:-1]]) / np.maximum(lengths, 1)
        return np.where(lengths > 0, np.exp(nats), np.nan)

    def save(self, directory: Path) -> None:
        """Write the counts and the tokenizer into `directory`."""
        self.tokenizer.save(directory)
        with atomic_path(directory / FILE_NAME) as path:
            save_file(self.arrays, path, metadata={"tokenizer": self.tokenizer.hash})


@cache
def load_ngram_model(directory: Path) -> NgramModel:
    """Read what `NgramModel.save` wrote, once a process.

    Raises:
        InputError: there is none, it is broken, or its tokenizer is another one.
    """
    path = directory / FILE_NAME
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            trained_with = (file.metadata() or {}).get("tokenizer")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist. Train a language model first, or give the folder of one.") from error
    except SafetensorError as error:
        raise InputError(f"{path} is not an n-gram model of Puna: {error}.") from error
    tokenizer = load_tokenizer(directory)
    if tokenizer.hash != trained_with:
        raise InputError(f"The tokenizer in {directory} is not the one that {FILE_NAME} was trained with.")
    return NgramModel(tokenizer, arrays)


class _Counted(KneserNey):
    """The counts of a trained model, as `NgramModel` wants them."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {}
        for order in self._orders:
            found[f"grams_{order.n}"] = order.grams
            found[f"counts_{order.n}"] = np.maximum(order.counts - order.discount, 0).astype(np.float32)
            found[f"contexts_{order.n}"] = order.contexts
            found[f"totals_{order.n}"] = order.totals.astype(np.float32)
            found[f"freed_{order.n}"] = (order.discount * order.kinds).astype(np.float32)
        return found


def _normalize(texts: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return pc.replace_substring_regex(pc.utf8_lower(texts), r"\d", "0")


@njit(cache=True, nogil=True)
def _hash_table(keys: Hashes) -> tuple[Hashes, NDArray[np.int32]]:
    """Places for twice as many keys, a power of two, each with the key's index or -1; probed one by one."""
    size = 2
    while size < 2 * len(keys):
        size *= 2
    table, indices = np.zeros(size, np.uint64), np.full(size, -1, np.int32)
    for index in range(len(keys)):
        place = np.int64(keys[index] & np.uint64(size - 1))
        while indices[place] >= 0:
            place = (place + 1) & (size - 1)
        table[place], indices[place] = keys[index], index
    return table, indices


@njit(cache=True, nogil=True, inline="always")
def _find(table: Hashes, indices: NDArray[np.int32], key: np.uint64) -> int:
    """Index of a key, or -1."""
    mask = len(table) - 1
    place = np.int64(key & np.uint64(mask))
    while indices[place] >= 0 and table[place] != key:
        place = (place + 1) & mask
    return int(indices[place])


@njit(cache=True, nogil=True)
def _mix(
    tokens: Hashes,
    offsets: NDArray[np.int64],
    n: int,
    gram_table: Hashes,
    gram_indices: NDArray[np.int32],
    counts: Floats,
    context_table: Hashes,
    context_indices: NDArray[np.int32],
    totals: Floats,
    freed: Floats,
    probabilities: NDArray[np.float64],
) -> None:
    """Replace each token's probability by that of the next higher order, n, where the n - 1 tokens before are known."""
    for document in range(len(offsets) - 1):
        for at in range(offsets[document] + n - 1, offsets[document + 1]):
            context = np.uint64(0)
            for before in range(at - n + 1, at):
                context = scramble(context * _PRIME + tokens[before] + np.uint64(1))
            found = _find(context_table, context_indices, context)
            if found < 0:
                continue
            gram = _find(gram_table, gram_indices, scramble(context * _PRIME + tokens[at] + np.uint64(1)))
            kept = counts[gram] if gram >= 0 else np.float32(0)
            probabilities[at] = (kept + freed[found] * probabilities[at]) / totals[found]
