"""Runs of words that questions have in common with a corpus."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from puna.batches.shingles import Hashes, Positions, build_set, contained, hash_shingles
from puna.batches.words import Words, hash_words, split_words

_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a question has in common with a corpus."""

    share: float
    """Of the question's words that lie in a common run."""
    in_answer: bool
    """Whether a common run reaches into the answer, so that the corpus may give it away."""
    run: str
    """The first common run, with what joins it."""
    document: str
    """The first document that has that run."""


def find_overlaps(
    questions: Sequence[tuple[str, str]], corpus: Iterable[tuple[str, str]], lengths: Sequence[int]
) -> list[list[Overlap | float | None]]:
    """Look for runs of words of each question, its answer behind it, in a corpus read once.

    Words are those of `puna.batches.words` (a Han character is one), compared without case and with all digits alike;
    what stands between them does not count. So a question is found as `puna curate`'s step decontaminate finds it.

    Args:
        questions: question and answer; their concatenation is looked for.
        corpus: id and text of each document.
        lengths: words in a run.

    Returns:
        For each length and each question its overlap, 0.0 if there is none, or None if it has fewer words.
    """
    words = split_words(pa.array([question + answer for question, answer in questions], pa.large_string()))
    hashes = hash_words(words)
    ngrams = [hash_shingles(hashes, words.documents, length) for length in lengths]
    first_documents = _first_documents([np.unique(values) for values, _ in ngrams], corpus, lengths)
    text_starts = np.cumsum([0, *(len((question + answer).encode()) for question, answer in questions)])
    answer_starts = text_starts[:-1] + [len(question.encode()) for question, _ in questions]
    return [
        _overlaps(words, answer_starts, values, offsets, documents, length)
        for (values, offsets), documents, length in zip(ngrams, first_documents, lengths, strict=True)
    ]


def _overlaps(
    words: Words,
    answer_starts: NDArray[np.int64],
    ngrams: Hashes,
    offsets: Positions,
    documents: dict[int, str],
    length: int,
) -> list[Overlap | float | None]:
    found = contained(ngrams, build_set(np.array(sorted(documents), np.uint64)))
    result: list[Overlap | float | None] = []
    for number, (start, stop) in enumerate(pairwise(offsets)):
        starts = np.flatnonzero(found[start:stop])
        if start == stop or not len(starts):
            result.append(None if start == stop else 0.0)
            continue
        covered = np.zeros(stop - start + length - 1, np.bool_)
        for at in starts:
            covered[at : at + length] = True
        first = words.documents[number]
        run = words.data[words.starts[first + starts[0]] : words.ends[first + starts[0] + length - 1]]
        in_answer = words.ends[first + starts[-1] + length - 1] > answer_starts[number]
        document = documents[int(ngrams[start + starts[0]])]
        result.append(Overlap(float(covered.mean()), bool(in_answer), run.tobytes().decode(), document))
    return result


def _first_documents(
    wanted: Sequence[Hashes], corpus: Iterable[tuple[str, str]], lengths: Sequence[int]
) -> list[dict[int, str]]:
    """For each length, which of the wanted runs the corpus has -> the id of the first document with it."""
    tables = [build_set(values) for values in wanted]
    seen: list[dict[int, str]] = [{} for _ in lengths]
    for batch in _batches(corpus):
        words = split_words(pa.array([text for _, text in batch], pa.large_string()))
        hashes = hash_words(words)
        for known, table, length in zip(seen, tables, lengths, strict=True):
            ngrams, offsets = hash_shingles(hashes, words.documents, length)
            places = np.flatnonzero(contained(ngrams, table))
            values, first = np.unique(ngrams[places], return_index=True)
            holders = np.searchsorted(offsets, places[first], side="right") - 1
            for value, holder in zip(values.tolist(), holders.tolist(), strict=True):
                known.setdefault(value, batch[holder][0])
    return seen


def _batches(corpus: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for document in corpus:
        batch.append(document)
        size += len(document[1])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
