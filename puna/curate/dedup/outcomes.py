"""Decisions about whole documents, applied: what exact, address, near, book and semantic duplicates share."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from puna.curate.document import Outcome, split


def document_numbers(documents: pa.Table, first: int) -> pa.Array:
    """The column `document` of a batch's keys."""
    return pa.array(np.arange(first, first + len(documents), dtype=np.int64))


def keep_one(documents: pa.Table, first: int, decisions: pa.Table, kind: str, reason: str) -> Outcome:
    """Reject the documents of clusters that are not to be kept.

    All documents get a column `KIND_cluster`: null for those that resemble no other, else a number that is the same
    for the documents of one cluster and for no other document.

    Args:
        documents: a batch.
        first: its first document's number.
        decisions: columns document, cluster (int64) and keep (bool).
        kind: the step's name.
        reason: why the others are rejected.
    """
    rows = decisions["document"].to_numpy() - first
    clusters, alone = np.zeros(len(documents), np.int64), np.ones(len(documents), bool)
    clusters[rows], alone[rows] = decisions["cluster"].to_numpy(), False
    column = f"{kind}_cluster"
    documents = documents.drop_columns([column] if column in documents.column_names else [])
    removed = np.zeros(len(documents), bool)
    removed[rows] = ~decisions["keep"].to_numpy()
    return split(documents.append_column(column, pa.array(clusters, mask=alone)), reasons_where(removed, reason))


def reasons_where(rejected: NDArray[np.bool_], reason: str) -> pa.Array:
    """`reason` where rejected, else null, as `split` takes it."""
    return pa.array(np.where(rejected, reason, ""), mask=~rejected, type=pa.string())


def with_texts(documents: pa.Table, texts: pa.Array) -> pa.Table:
    """The documents with other texts."""
    return documents.set_column(documents.column_names.index("text"), documents.schema.field("text"), texts)
