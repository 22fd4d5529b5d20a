"""The one noun of curation: one at a time where it is read, in columns from there on.

A table of documents has the columns of `REQUIRED`, never null; every further column is metadata (a language, an
address, a score), and may be null. Steps take such a table and return an `Outcome`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

REQUIRED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
    ]
)
"""`id` is unique within its source, `source` is the name that the recipe gives it."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name."""

    text: str
    """Unicode text, line ends as \\n."""
    id: str
    """Unique within its source, and telling: a path, an address."""
    metadata: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    """Whatever else is known: language, licence, score. Each key becomes a column."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """What a reader kept out, and why."""

    id: str
    """The document's name."""
    reason: str
    """One of a few fixed phrases, so that rejections can be counted by reason."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step made of a table of documents."""

    kept: pa.Table
    """Documents that go on, in their order; a step may have changed texts or added columns."""
    rejected: pa.Table
    """Documents that do not, as they came in, with one more column: `reason`."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What else is worth counting, such as {"lines without terminal punctuation": 120}."""


def table_of(documents: Iterable[Document], source: str) -> pa.Table:
    """Documents in columns; a metadata key that some lack is null there."""
    rows = list(documents)
    columns: dict[str, list[object]] = {
        "id": [row.id for row in rows],
        "source": [source] * len(rows),
        "text": [row.text for row in rows],
    }
    for key in dict.fromkeys(key for row in rows for key in row.metadata):
        columns[key] = [row.metadata.get(key) for row in rows]
    metadata = pa.table({key: values for key, values in columns.items() if key not in REQUIRED.names})
    table = pa.table({key: columns[key] for key in REQUIRED.names}, schema=REQUIRED)
    for name in metadata.column_names:
        table = table.append_column(name, metadata[name])
    return table


def split(documents: pa.Table, reasons: pa.Array | pa.ChunkedArray, counts: Mapping[str, int] | None = None) -> Outcome:
    """Keep the documents whose reason is null, reject the others with theirs.

    Args:
        documents: a table of documents.
        reasons: one string or null for each.
        counts: for `Outcome.counts`.
    """
    keep = pc.is_null(reasons)
    rejected = documents.append_column("reason", reasons).filter(pc.invert(keep))
    return Outcome(documents.filter(keep), rejected, counts or {})
