"""How surprised a language model is by a text: low for what reads like its training text."""

import csv
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from puna.curate.document import REQUIRED, Outcome, split
from puna.curate.filters.ngram_model import load_ngram_model
from puna.curate.filters.reasons import first_reason, require_not_negative
from puna.curate.filters.texts import with_column
from puna.runtime.errors import InputError

_KENLM_SUFFIXES = (".arpa", ".bin", ".binary", ".klm")


@dataclass(frozen=True)
class Perplexity:
    """Score texts by the perplexity of an n-gram language model, CCNet's measure of quality (Wenzek et al. 2020).

    Follow it by `score_quantiles` to sort documents into head, middle and tail by the corpus's own quantiles, or give
    limits here. Texts in which there is no token are rejected.
    """

    kind: Literal["perplexity"] = "perplexity"
    """This step's name."""
    model: Path = Path()
    """Folder of an n-gram model of Puna's, or a KenLM file (.arpa, .bin) where the package kenlm is installed."""
    min_perplexity: float = 0.0
    """Texts with a smaller one are rejected: boilerplate that the model has seen."""
    max_perplexity: float = 1e12
    """Texts with a larger one are rejected."""
    column: str = "perplexity"
    """Column for the perplexity of a token."""

    def __post_init__(self) -> None:
        require_not_negative(self, "min_perplexity", "max_perplexity")
        if self.model == Path():
            raise ValueError("model must name the folder of an n-gram model, or a KenLM file.")
        if self.min_perplexity > self.max_perplexity:
            raise ValueError(f"min_perplexity ({self.min_perplexity}) is larger than max_perplexity.")
        if not self.column or self.column in REQUIRED.names:
            raise ValueError(f"column must be a name of its own, not {self.column!r}.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Add the perplexity; reject what is out of bounds.

        Raises:
            InputError: there is no such model, it is broken, or kenlm is not installed.
        """
        if self.model.suffix in _KENLM_SUFFIXES:
            found = kenlm_perplexities(documents["text"], self.model)
        else:
            found = load_ngram_model(self.model).perplexities(documents["text"])
        tests = [
            (np.isnan(found), "empty"),
            (found < self.min_perplexity, f"perplexity under {self.min_perplexity:g}"),
            (found > self.max_perplexity, f"perplexity over {self.max_perplexity:g}"),
        ]
        scored = with_column(documents, self.column, pa.array(found))
        return split(scored, first_reason(len(documents), tests))


def kenlm_perplexities(texts: pa.ChunkedArray, path: Path) -> NDArray[np.float64]:
    """CCNet's perplexity: 10 ^ -(sum of log10 of all lines / (words + 1 for each line's end)).

    Raises:
        InputError: kenlm is not installed, or cannot read the file.
    """
    model = _kenlm(path)
    found = np.full(len(texts), np.nan)
    for row, text in enumerate(texts.to_pylist()):
        lines = [line for line in text.splitlines() if line.strip()]
        if lines:
            length = sum(len(line.split()) + 1 for line in lines)
            found[row] = 10 ** -(sum(model.score(line) for line in lines) / length)
    return found


@cache
def _kenlm(path: Path) -> Any:
    try:
        kenlm = importlib.import_module("kenlm")
    except ImportError as error:
        raise InputError(
            f"{path} is a KenLM file, but the package kenlm is not installed (it is compiled when it is installed: "
            "pip install kenlm). Or train an n-gram model of Puna's instead, and give its folder."
        ) from error
    try:
        return kenlm.Model(str(path))
    except OSError as error:
        raise InputError(f"KenLM cannot read {path}: {error}.") from error


def read_cut_offs(path: Path, language: str, head: int = 30, tail: int = 60) -> tuple[float, float]:
    """Perplexities that part head from middle and middle from tail, from a table like CCNet's.

    Args:
        path: CSV with a row for each percentile, in the first column, and a column for each language.
        language: ISO 639-1 code.
        head: percentile up to which documents are head.
        tail: percentile from which they are tail.

    Raises:
        InputError: the file, the language or a percentile is missing.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        column = rows[0].index(language)
        of_percentile = {int(row[0]): float(row[column]) for row in rows[1:]}
        return of_percentile[head], of_percentile[tail]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"{path} gives no cut-offs for language {language!r} at percentiles {head} and {tail}: {error}."
        ) from error
