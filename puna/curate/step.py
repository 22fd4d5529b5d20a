"""What a reader and a step are. Everything in `curate` that a recipe can name is one of these three.

Each is a frozen dataclass whose fields are its settings (validated, each with an attribute docstring) and whose first
field, `kind`, is the name that a recipe calls it by. It is a pure function of its settings and its input: no state
between calls, so that any executor may call it anywhere, in any order, again after a crash, and get the same bytes.
What is costly to make (a language model, compiled patterns) is made once a process by a cached function of its file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from puna.curate.document import Document, Outcome, Rejected


class Reader(Protocol):
    """Where documents come from."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        ...

    def units(self) -> Sequence[str]:
        """What can be read apart from the rest, mostly files, in a fixed order.

        Raises:
            InputError: nothing is there.
        """
        ...

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """The documents of one unit, in a fixed order.

        Whatever is broken inside becomes a `Rejected` with a reason; reading goes on where it can, in bounded memory.
        """
        ...


class Step(Protocol):
    """Looks at documents one by one: a filter, an editor, a labeller."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        ...

    def __call__(self, documents: pa.Table) -> Outcome:
        """Keep, change, label or reject the documents of one batch (tens of megabytes of text at most)."""
        ...


class GlobalStep(Protocol):
    """Looks at all documents at once, through small keys: deduplication of every kind, quantile cuts.

    Done in three moves: `keys` of every batch, in parallel; one `decide` over all of them, on disk and in bounded
    memory; `apply` to every batch, in parallel.
    """

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        ...

    def keys(self, documents: pa.Table, first: int) -> pa.Table:
        """Small rows about a batch's documents. The column `document` (int64) is `first` + the row in the batch."""
        ...

    def decide(self, keys: Sequence[Path], work: Path, memory_bytes: int) -> None:
        """Read the Parquet files of keys, in their order, and write `work`/decisions.parquet, sorted by `document`.

        A document without a row there is kept as it is. Spill into `work`; hold no more than about `memory_bytes`.
        The answer may not depend on how documents were spread over files.
        """
        ...

    def apply(self, documents: pa.Table, first: int, decisions: pa.Table) -> Outcome:
        """Do to a batch what was decided; `decisions` holds the rows of this batch's documents."""
        ...
