"""New texts for a table of documents, from numba kernels' bytes."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from puna.curate.document import Outcome, split


def texts_of(data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> pa.Array:
    """The string column whose text d is the UTF-8 bytes [offsets[d], offsets[d+1]) of `data`."""
    buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.string(), len(offsets) - 1, buffers)


def split_with_texts(documents: pa.Table, texts: pa.Array, reasons: pa.Array, counts: dict[str, int]) -> Outcome:
    """As `split`; documents that are kept get their text of `texts`, rejected ones stay as they came in."""
    outcome = split(documents, reasons, counts)
    column = documents.column_names.index("text")
    kept = outcome.kept.set_column(column, documents.schema.field("text"), texts.filter(reasons.is_null()))
    return Outcome(kept, outcome.rejected, outcome.counts)


def with_column(documents: pa.Table, name: str, values: pa.Array) -> pa.Table:
    """The table with one more column, or with this one replaced."""
    if name in documents.column_names:
        return documents.set_column(documents.column_names.index(name), name, values)
    return documents.append_column(name, values)
