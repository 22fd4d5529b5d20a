"""Texts of evaluation sets, kept out of the training data."""

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from puna.batches.shingles import Hashes, Positions, build_set, contained, hash_shingles
from puna.batches.words import hash_words, split_words, text_buffers
from puna.curate.dedup.cut import cut_words
from puna.curate.dedup.outcomes import reasons_where, with_texts
from puna.curate.dedup.substrings import covered
from puna.curate.document import Outcome, split
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl

REASON = "overlaps an evaluation set"


@dataclass(frozen=True)
class Decontaminate:
    """Find runs of words that also occur in evaluation sets (Brown et al. 2020, appendix C: 13 words).

    Words are compared without case and with all digits alike; what stands between them does not count. Evaluation texts
    of fewer than ngram_words words are not looked for.
    """

    kind: Literal["decontaminate"] = "decontaminate"
    """This step's name."""
    evaluations: tuple[Path, ...] = ()
    """JSON Lines files (.jsonl, .jsonl.gz) of evaluation sets, or folders of such files."""
    fields: tuple[str, ...] = ()
    """Fields to look for; absent, all strings in each object, also those inside lists and objects."""
    ngram_words: int = 13
    """Words in a run."""
    min_matches: int = 1
    """Documents with fewer different runs in common with the evaluation sets are left alone."""
    mode: Literal["drop", "cut"] = "drop"
    """Reject the documents, or cut the common runs out of them."""

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise ValueError("evaluations is empty: name the files of the evaluation sets to keep out.")
        for name in ("ngram_words", "min_matches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject or cut the documents of a batch."""
        table = evaluation_ngrams(self.evaluations, self.fields, self.ngram_words)
        words = split_words(documents["text"])
        ngrams, offsets = hash_shingles(hash_words(words), words.documents, self.ngram_words)
        found = contained(ngrams, table)
        matches = _distinct(ngrams[found], np.concatenate([np.zeros(1, np.int64), np.cumsum(found)])[offsets])
        contaminated = matches >= self.min_matches
        counts = {"documents that overlap an evaluation set": int(contaminated.sum())}
        if self.mode == "drop":
            return split(documents, reasons_where(contaminated, REASON), counts)
        counts_of_ngrams, counts_of_words = np.diff(offsets), np.diff(words.documents)
        shift = np.repeat(words.documents[:-1] - offsets[:-1], counts_of_ngrams)
        starts = (np.arange(len(ngrams)) + shift)[found & np.repeat(contaminated, counts_of_ngrams)]
        removed = covered(len(words.starts), starts, starts + self.ngram_words)
        left = np.diff(np.concatenate([np.zeros(1, np.int64), np.cumsum(~removed)])[words.documents])
        empty = contaminated & (left == 0) & (counts_of_words > 0)
        outcome = split(documents, reasons_where(empty, REASON))
        texts = cut_words(words, text_buffers(documents["text"])[1], removed).filter(pa.array(~empty))
        counts["words cut"] = int(removed.sum())
        return Outcome(with_texts(outcome.kept, texts), outcome.rejected, counts)


@cache
def evaluation_ngrams(evaluations: tuple[Path, ...], fields: tuple[str, ...], ngram_words: int) -> Hashes:
    """Hash table of all runs of `ngram_words` words in the evaluation sets, for `contained`: at most 32 bytes each.

    Raises:
        InputError: a file cannot be read, or lacks a field, or there is no run of so many words in any.
    """
    texts: list[str] = []
    for path in evaluations:
        for row in read_jsonl(path):
            for field in fields:
                if field not in row:
                    raise InputError(f"{path}: a line lacks the field {field!r}; it has {', '.join(row)}.")
            texts.extend(_strings([row[field] for field in fields] if fields else row))
    words = split_words(pa.array(texts, pa.large_string()))
    ngrams, _ = hash_shingles(hash_words(words), words.documents, ngram_words)
    if not len(ngrams):
        names = ", ".join(map(str, evaluations))
        raise InputError(f"No text in {names} has {ngram_words} words, so there is nothing to look for.")
    return build_set(np.unique(ngrams))


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


def _distinct(values: Hashes, offsets: Positions) -> NDArray[np.int64]:
    """How many different values each document has."""
    counts = [len(np.unique(values[start:stop])) for start, stop in itertools.pairwise(offsets)]
    return np.array(counts, np.int64)
