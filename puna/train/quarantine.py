"""Batches that broke training: left out from then on, and kept for a look.

Layout: `quarantine/batch-00000123.json` says what happened, and which documents each row was made of. The folder is
all that a run remembers of it, so that a resumed one leaves the same batches out; to give a batch another chance,
delete its file.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from puna.batches.packing import Rows
from puna.batches.shards import TokenShards
from puna.runtime.files import read_jsonl, write_json


@runtime_checkable
class Traceable(Protocol):
    """Rows that know what they were made of."""

    def origins(self, row: int) -> list[tuple[TokenShards, int]]:
        """The documents that a row holds tokens of, with the shards that they are in."""
        ...


@dataclass(frozen=True)
class BadBatch:
    """Why a batch is left out."""

    batch: int
    """Its number, counted from 0."""
    step: int
    """The step that it would have made."""
    reason: str
    """See `puna.train.anomaly.VERDICTS`."""
    loss: str
    """Of that step; in words, for it may not be a number."""
    grad_norm: str
    """Of that step."""


class Quarantine:
    """The batches that a run leaves out.

    Args:
        directory: what holds them, or nothing yet.
        writes: whether this rank writes; one has to.
    """

    def __init__(self, directory: Path, *, writes: bool = True) -> None:
        self.directory, self._writes = directory, writes
        found = directory.glob("batch-*.json") if directory.is_dir() else ()
        numbers = [re.fullmatch(r"batch-(\d{8,})\.json", path.name) for path in found]
        self.batches = {int(match[1]) for match in numbers if match is not None}
        """Their numbers."""

    def add(self, bad: BadBatch, rows: Rows, numbers: Sequence[int]) -> Path:
        """Leave a batch out from now on; return the file that tells about it.

        Args:
            bad: which, and why.
            rows: what it was made from.
            numbers: its rows.
        """
        path = self.directory / f"batch-{bad.batch:08}.json"
        if self._writes:
            documents = trace(rows, numbers)
            write_json(path, {**asdict(bad), "rows": [numbers[0], numbers[-1]], "documents": documents})
        self.batches.add(bad.batch)
        return path


def next_good(batch: int, left_out: Collection[int]) -> int:
    """The first batch from this number on that is not left out."""
    while batch in left_out:
        batch += 1
    return batch


def trace(rows: Rows, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The documents of some rows: number of the row, shards, number and facts of each document.

    Empty where the rows do not know.
    """
    if not isinstance(rows, Traceable):
        return []
    origins = [(number, shards, document) for number in numbers for shards, document in rows.origins(number)]
    folders = {shards.directory for _, shards, _ in origins}
    facts = {
        folder: _facts(folder, {document for _, its, document in origins if its.directory == folder})
        for folder in folders
    }
    return [
        {"row": number, "shards": str(shards.directory), "document": document, **facts[shards.directory][document]}
        for number, shards, document in origins
    ]


def _facts(folder: Path, documents: Collection[int]) -> dict[int, dict[str, Any]]:
    """The lines of some documents in documents.jsonl, in one pass."""
    lines = islice(enumerate(read_jsonl(folder / "documents.jsonl")), max(documents) + 1)
    return {number: line for number, line in lines if number in documents}
