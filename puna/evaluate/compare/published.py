"""Tables of published results, shown beside what was measured here, and marked as published."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from puna.evaluate.compare.section import Section, Sheet
from puna.runtime.errors import InputError
from puna.runtime.files import read_json

_WHAT = ("category", "capability", "benchmark", "# shots", "metric", "language", "")
"""Columns that say what was measured, not of which model."""


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """A table in which each column from `first` on is a model."""

    source: str
    """Document, and the table's heading in it or its number."""
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    first: int

    @property
    def models(self) -> tuple[str, ...]:
        """Their names, as printed."""
        return self.columns[self.first :]


def read_published(path: Path) -> list[PublishedTable]:
    """The tables of results among all tables of model cards.

    Args:
        path: JSON: document -> list of {"heading": text, "rows": rows of cells}; a cell is a text, or a text with the
            number of rows that it spans.

    Raises:
        InputError: the file is something else.
    """
    documents = read_json(path)
    found = []
    try:
        for document, tables in documents.items():
            for number, table in enumerate(tables, start=1):
                heading = re.split(r"\*\*|\. ", table.get("heading") or "")[0] or f"table {number}"
                parsed = _parse(f"{document}: {heading}", _grid(table["rows"]))
                if parsed is not None:
                    found.append(parsed)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{path} does not hold tables of model cards: document -> list of tables with rows of cells ({error!r})."
        ) from error
    return found


def same_name(ours: str, theirs: str) -> bool:
    """Whether two spellings mean one model: llama-3.1-8b is Llama 3.1 8B, but not Llama 3.1 8B Instruct."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9.]", "", name.lower())

    return plain(ours) == plain(theirs)


def published_section(tables: Sequence[PublishedTable], models: Sequence[str]) -> Section:
    """What is published of the given models; of those that are in no table, that."""
    sheets = []
    for table in tables:
        own = [
            i for i, name in enumerate(table.columns) if i >= table.first and any(same_name(m, name) for m in models)
        ]
        if own:
            keep = [*range(table.first), *own]
            rows = [[row[i] for i in keep] for row in table.rows if any(row[i] for i in own)]
            if rows:
                sheets.append(Sheet(table.source, [table.columns[i] for i in keep], rows, terminal_columns=0))
    known = [name for table in tables for name in table.models]
    missing = [f"{m}: no published result in these tables" for m in models if not any(same_name(m, k) for k in known)]
    text = (
        "Published by the makers of the models, not measured here: prompts, shots and scoring differ from ours. Tables "
        "are as printed; some give an instruction-tuned model under the name of its base model."
    )
    return Section("Published results", text, sheets, missing=missing)


def _grid(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    """Cells as texts, those that span several rows repeated in each."""
    grid: list[list[str]] = []
    spans: dict[int, tuple[int, str]] = {}
    width = len(rows[0])
    for row in rows:
        cells, line = iter(row), []
        for column in range(width):
            left, text = spans.pop(column, (0, ""))
            if not left:
                cell = next(cells, "")
                left, text = (cell.get("rowspan", 1), cell["text"]) if isinstance(cell, dict) else (1, str(cell))
            if left > 1:
                spans[column] = (left - 1, text)
            line.append(_plain(text))
        grid.append(line)
    return grid


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\\", "").replace("*", "")).strip()


def _parse(source: str, grid: list[list[str]]) -> PublishedTable | None:
    """A table of results with a column for each model; None if it is something else."""
    header, *body = grid
    lower = [name.lower() for name in header]
    if "benchmark" in lower:
        first = next(i for i, name in enumerate(lower) if name not in _WHAT)
        for above, row in pairwise(body):
            if not row[0]:  # a category stands in its first row only
                row[0] = above[0]
        return PublishedTable(source, tuple(header), tuple(map(tuple, body)), first)
    if lower[:2] in (["model", "size"], ["", ""]) and body:
        models = [f"{row[0]} {row[1]}" for row in body]
        rows = [(name, *(row[i] for row in body)) for i, name in enumerate(header) if i >= 2]
        return PublishedTable(source, ("Benchmark", *models), tuple(rows), 1)
    return None
