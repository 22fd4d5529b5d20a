"""Sort documents by a score into parts of given size, over the whole corpus."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from puna.curate.dedup.database import keys_database, write_decisions
from puna.curate.document import REQUIRED, Outcome, split
from puna.curate.filters.reasons import first_reason
from puna.curate.filters.texts import with_column
from puna.runtime.errors import InputError

KEYS = pa.schema([("document", pa.int64()), ("part", pa.string()), ("score", pa.float64())])


@dataclass(frozen=True)
class ScoreQuantiles:
    """Sort documents into head, middle and tail by a score, smallest first, in each language apart.

    CCNet (Wenzek et al. 2020, section 3.3) parts by perplexity into thirds; Llama 1 takes the head. Documents without a
    score are in no part, and are kept only if `keep` is empty. Equal scores are in the order of the documents.
    """

    kind: Literal["score_quantiles"] = "score_quantiles"
    """This step's name."""
    score: str = "perplexity"
    """Column with a number for each document."""
    group: str = "language"
    """Column whose values are ranked apart; if empty or absent, all documents together."""
    cuts: tuple[float, ...] = (1 / 3, 2 / 3)
    """Shares of documents at which one part ends and the next begins."""
    names: tuple[str, ...] = ("head", "middle", "tail")
    """Names of the parts, one more than cuts."""
    keep: tuple[str, ...] = ()
    """Names of the parts to keep; empty keeps all."""
    column: str = "quality"
    """Column for the part's name."""

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in itertools.pairwise((0.0, *self.cuts, 1.0))):
            raise ValueError(f"cuts must rise from above 0 to below 1, not {self.cuts}.")
        if len(self.names) != len(self.cuts) + 1 or len(set(self.names)) != len(self.names):
            raise ValueError("names must hold one name more than there are cuts, all different.")
        if unknown := set(self.keep) - set(self.names):
            raise ValueError(f"keep holds {min(unknown)!r}, which is none of the names: {', '.join(self.names)}.")
        if not self.column or self.column in REQUIRED.names:
            raise ValueError(f"column must be a name of its own, not {self.column!r}.")

    def keys(self, documents: pa.Table, first: int) -> pa.Table:
        """Group and score of each document that has a score.

        Raises:
            InputError: there is no such column of numbers.
        """
        if self.score not in documents.column_names:
            raise InputError(
                f"score_quantiles finds no column {self.score!r}: put the step that adds it before this one."
            )
        numbers = pa.array(np.arange(first, first + len(documents)))
        if self.group and self.group in documents.column_names:
            groups = documents[self.group].cast(pa.string()).fill_null("")
        else:
            groups = pa.array([""] * len(documents), pa.string())
        keys = pa.table([numbers, groups, documents[self.score].cast(pa.float64())], schema=KEYS)
        scores = keys["score"]
        return keys.filter(pa.array(scores.is_valid().to_numpy() & ~np.isnan(scores.to_numpy(zero_copy_only=False))))

    def decide(self, keys: Sequence[Path], work: Path, memory_bytes: int) -> None:
        """Rank within groups: a document's part is the number of cuts at or below (rank - 1) / documents."""
        cuts = " + ".join(f"CAST(rank >= {cut!r} AS INTEGER)" for cut in self.cuts) or "0"
        with keys_database(keys, KEYS, work, memory_bytes) as connection:
            ranked = (
                "SELECT document, (row_number() OVER (PARTITION BY part ORDER BY score, document) - 1)"
                " / count(*) OVER (PARTITION BY part) AS rank FROM keys"
            )
            write_decisions(connection, f"SELECT document, {cuts} AS quantile FROM ({ranked}) ORDER BY document", work)

    def apply(self, documents: pa.Table, first: int, decisions: pa.Table) -> Outcome:
        """Name each document's part; reject those of parts that are not kept."""
        rows = decisions["document"].to_numpy() - first
        parts = np.full(len(documents), None, object)
        parts[rows] = np.array(self.names, object)[decisions["quantile"].to_numpy()]
        labelled = with_column(documents, self.column, pa.array(parts, pa.string()))
        if not self.keep:
            return split(labelled, pa.nulls(len(documents), pa.string()))
        tests = [(parts == name, f"{self.score} in the {name}") for name in self.names if name not in self.keep]
        tests.append((parts == np.array(None), f"no {self.score}"))
        return split(labelled, first_reason(len(documents), tests))
