"""How far a text's distribution of words is from that of the training corpus."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from puna.batches.words import Positions, hash_words, split_words
from puna.curate.document import REQUIRED, Outcome, split
from puna.curate.filters.reasons import first_reason
from puna.curate.filters.texts import with_column
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path

FILE_NAME = "words.safetensors"
_NUM_BUCKETS = 1 << 18


@dataclass(frozen=True)
class TokenDivergence:
    """Reject texts with too many unusual words, by Kullback-Leibler divergence (Llama 3, section 3.1.1).

    The reference is the distribution of hashed words in texts that you chose (`train_word_distribution`): a file, and
    not the corpus that is being filtered, so that what is kept does not depend on the rest of a crawl. The divergence
    falls with the length of a text, so texts are compared by their first `max_words` words.
    """

    kind: Literal["token_divergence"] = "token_divergence"
    """This step's name."""
    reference: Path = Path()
    """Folder of a trained word distribution."""
    max_divergence: float = 8.0
    """Texts that are further away, in nats, are rejected. Look at the column's histogram to choose."""
    min_words: int = 50
    """Shorter texts are not judged."""
    max_words: int = 1000
    """Words of a text that are looked at, from its beginning."""
    column: str = "token_divergence"
    """Column for the divergence."""

    def __post_init__(self) -> None:
        if self.reference == Path():
            raise ValueError("reference must name the folder of a trained word distribution.")
        if self.max_divergence <= 0:
            raise ValueError(f"max_divergence must be above 0, not {self.max_divergence}.")
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(f"min_words ({self.min_words}) must be between 1 and max_words ({self.max_words}).")
        if not self.column or self.column in REQUIRED.names:
            raise ValueError(f"column must be a name of its own, not {self.column!r}.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Add the divergence; reject what is too far away.

        Raises:
            InputError: there is no such distribution, or it is broken.
        """
        words = split_words(documents["text"])
        reference = load_word_distribution(self.reference)
        found = _divergences(_buckets(hash_words(words)), words.documents, reference, self.max_words)
        judged = np.diff(words.documents) >= self.min_words
        tests = [((found > self.max_divergence) & judged, "unusual words")]
        return split(with_column(documents, self.column, pa.array(found)), first_reason(len(documents), tests))


def train_word_distribution(texts: pa.Array | pa.ChunkedArray) -> NDArray[np.float32]:
    """Log-probability of each bucket of words, one occurrence added to all.

    Raises:
        InputError: there is no word.
    """
    buckets = _buckets(hash_words(split_words(texts)))
    if not len(buckets):
        raise InputError("There is no text to learn a distribution of words from: the documents hold no word.")
    counts = np.bincount(buckets, minlength=_NUM_BUCKETS) + 1.0
    distribution: NDArray[np.float32] = np.log(counts / counts.sum()).astype(np.float32)
    return distribution


def save_word_distribution(distribution: NDArray[np.float32], directory: Path) -> None:
    """Write `words.safetensors` into `directory`."""
    with atomic_path(directory / FILE_NAME) as path:
        save_file({"log_probabilities": distribution}, path)


@cache
def load_word_distribution(directory: Path) -> NDArray[np.float32]:
    """Read what `save_word_distribution` wrote, once a process.

    Raises:
        InputError: there is none, or it is broken.
    """
    path = directory / FILE_NAME
    try:
        distribution: NDArray[np.float32] = load_file(path)["log_probabilities"]
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist. Train a word distribution first, or give its folder.") from error
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path} is not a word distribution of Puna: {error}.") from error
    if distribution.shape != (_NUM_BUCKETS,):
        raise InputError(f"{path} is not a word distribution of Puna: it holds {distribution.shape} numbers.")
    return distribution


def _buckets(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (hashes % np.uint64(_NUM_BUCKETS)).astype(np.int64)


@njit(cache=True, nogil=True)
def _divergences(
    buckets: Positions, documents: Positions, reference: NDArray[np.float32], max_words: int
) -> NDArray[np.float64]:
    """Sum over a text's words of p log(p / q); 0 for texts without words."""
    found = np.zeros(len(documents) - 1)
    for document in range(len(documents) - 1):
        words = np.sort(buckets[documents[document] : min(documents[document + 1], documents[document] + max_words)])
        first = 0
        for word in range(1, len(words) + 1):
            if word == len(words) or words[word] != words[first]:
                share = (word - first) / len(words)
                found[document] += share * (np.log(share) - reference[words[first]])
                first = word
    return found
