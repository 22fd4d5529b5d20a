"""Files of rows: JSON lines, CSV, Parquet. One document a row."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from puna.curate.document import Document, Rejected
from puna.curate.readers.bounds import EXPANSION_ALLOWANCE, Bounds, Unreadable, open_expanded, read_lines
from puna.curate.readers.files import byte_ranges, list_files, locate, parse_range
from puna.curate.readers.text import TOO_LARGE, MetadataOf, decode, to_document, valid_unicode

BYTES_PER_UNIT = 256 << 20
"""Larger files are read in parts, apart from one another, where their format allows."""


@dataclass(frozen=True)
class JsonlReader:
    """JSON lines: one object a line, plain or compressed (gzip, bzip2, Zstandard)."""

    kind: Literal["jsonl"] = "jsonl"
    """JSON lines, also .gz, .bz2 and .zst."""
    path: Path = field(kw_only=True)
    """A file, or a folder of them."""
    text_field: str = "text"
    """Key that holds the text."""
    id_field: str = "id"
    """Key that names the document; where it is absent, the file's name and the line's byte offset do."""
    metadata: tuple[str, ...] = ()
    """Keys to keep beside the text."""
    bounds: Bounds = field(default_factory=Bounds)
    """What one file may cost."""

    def units(self) -> Sequence[str]:
        """Files; large uncompressed ones in ranges of bytes."""
        names = list_files(self.path, (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.zst", ".ndjson"), "a JSONL file")
        return [
            unit
            for name in names
            for unit in (
                byte_ranges(locate(self.path, name)[0], name, BYTES_PER_UNIT) if name.endswith("l") else [name]
            )
        ]

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        return [locate(self.path, unit)[0]]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """The lines that begin in the unit's range."""
        path, part = locate(self.path, unit)
        name = unit.partition("//")[0]
        start, stop = parse_range(part) if part else (0, None)
        # The line that holds the byte before the range belongs to the range before.
        first = max(start - 1, 0)
        metadata = MetadataOf(self.metadata)
        try:
            with open_expanded(path, self.bounds) as stream:
                if first:
                    stream.seek(first)
                for offset, line in read_lines(stream, self.bounds.max_document_bytes):
                    if stop is not None and first + offset >= stop:
                        return
                    if first + offset >= start:
                        yield from self._row(line, f"{name}:{first + offset}", metadata)
        except Unreadable as error:
            yield Rejected(unit, error.reason)

    def _row(self, line: bytes | None, name: str, metadata: MetadataOf) -> Iterator[Document | Rejected]:
        if line is None:
            yield Rejected(name, TOO_LARGE)
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield Rejected(name, "not JSON")
                return
            if not isinstance(row, dict):
                yield Rejected(name, "not a JSON object")
                return
            yield _document(row, self.text_field, self.id_field, name, metadata, self.bounds)


@dataclass(frozen=True)
class CsvReader:
    """CSV files with a header line, plain or compressed, in any encoding."""

    kind: Literal["csv"] = "csv"
    """CSV (or TSV) files with a header line, also .gz, .bz2 and .zst."""
    path: Path = field(kw_only=True)
    """A file, or a folder of them."""
    text_field: str = "text"
    """Column that holds the text."""
    id_field: str = "id"
    """Column that names the document; where it is absent, the file's name and the row's number do."""
    metadata: tuple[str, ...] = ()
    """Columns to keep beside the text, as text."""
    delimiter: str = ","
    """What stands between values."""
    bounds: Bounds = field(default_factory=Bounds)
    """What one file may cost."""

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1:
            raise ValueError(f"delimiter is {self.delimiter!r}; it has to be one character.")

    def units(self) -> Sequence[str]:
        """Files."""
        endings = tuple(f".{kind}{packed}" for kind in ("csv", "tsv") for packed in ("", ".gz", ".bz2", ".zst"))
        return list_files(self.path, endings, "a CSV file")

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        return [locate(self.path, unit)[0]]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """One document a row."""
        # The module's limit on a value, which holds for the process, is what bounds a quote that is never closed.
        csv.field_size_limit(self.bounds.max_document_bytes)
        metadata = MetadataOf(self.metadata)
        long_lines: list[int] = []
        header: list[str] | None = None
        number = 0
        try:
            with open_expanded(locate(self.path, unit)[0], self.bounds) as stream:
                lines = self._lines(stream, long_lines)
                rows = csv.reader(lines, delimiter=self.delimiter)
                while True:
                    try:
                        values = next(rows, None)
                    except csv.Error:
                        number += 1
                        yield Rejected(f"{unit}:{number}", "not CSV")
                        rows = csv.reader(lines, delimiter=self.delimiter)
                        continue
                    while long_lines:
                        yield Rejected(f"{unit}@{long_lines.pop()}", TOO_LARGE)
                    if values is None:
                        return
                    if header is None:
                        header = values
                        continue
                    number += 1
                    row = dict(zip(header, values, strict=False))
                    yield _document(row, self.text_field, self.id_field, f"{unit}:{number}", metadata, self.bounds)
        except Unreadable as error:
            yield Rejected(unit, error.reason)

    def _lines(self, stream: Any, long_lines: list[int]) -> Iterator[str]:
        for offset, line in read_lines(stream, self.bounds.max_document_bytes):
            if line is None:
                long_lines.append(offset)
            else:
                yield decode(line)


@dataclass(frozen=True)
class ParquetReader:
    """Parquet files, in runs of row groups."""

    kind: Literal["parquet"] = "parquet"
    """Parquet files."""
    path: Path = field(kw_only=True)
    """A file, or a folder of them."""
    text_field: str = "text"
    """Column that holds the text."""
    id_field: str = "id"
    """Column that names the document; where it is absent, the file's name and the row's number do."""
    metadata: tuple[str, ...] = ()
    """Columns to keep beside the text."""
    bounds: Bounds = field(default_factory=Bounds)
    """What one file may cost."""

    def units(self) -> Sequence[str]:
        """Runs of row groups of about the same size."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        units: list[str] = []
        for name in list_files(self.path, (".parquet",), "a Parquet file"):
            try:
                footer = pq.read_metadata(locate(self.path, name)[0])
            except (OSError, pa.ArrowException):
                units.append(name)
                continue
            sizes = [footer.row_group(number).total_byte_size for number in range(footer.num_row_groups)]
            first = size = 0
            for number, more in enumerate(sizes):
                if number > first and size + more > BYTES_PER_UNIT:
                    units.append(f"{name}//{first}-{number}")
                    first, size = number, 0
                size += more
            units.append(f"{name}//{first}-{len(sizes)}" if first else name)
        return units

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        return [locate(self.path, unit)[0]]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """One document a row.

        Raises:
            InputError: there is no column `text_field`.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        from puna.runtime.errors import InputError

        path, part = locate(self.path, unit)
        name = unit.partition("//")[0]
        metadata = MetadataOf(self.metadata)
        try:
            # Read as a dictionary, a text that a file repeats a million times is in memory once.
            columns = pq.read_schema(path).names
            if self.text_field not in columns:
                raise InputError(
                    f"{path} has no column {self.text_field!r} (it has {', '.join(columns)}); name the column that "
                    "holds the text as text_field."
                )
            with pq.ParquetFile(path, read_dictionary=[self.text_field]) as file:
                first, stop = parse_range(part) if part else (0, file.metadata.num_row_groups)
                number = sum(file.metadata.row_group(group).num_rows for group in range(first))
                left = path.stat().st_size * self.bounds.max_expansion + EXPANSION_ALLOWANCE
                others = [key for key in dict.fromkeys((self.id_field, *self.metadata)) if key in columns]
                wanted = dict.fromkeys([self.text_field, *others])
                for batch in file.iter_batches(256, row_groups=list(range(first, stop)), columns=list(wanted)):
                    texts, sizes = batch.column(self.text_field), _sizes(batch.column(self.text_field))
                    rows = batch.select(others).to_pylist() if others else [{}] * batch.num_rows
                    for text, size, row in zip(texts, sizes, rows, strict=True):
                        left -= size
                        if left < 0:
                            raise Unreadable("expands beyond max_expansion")
                        name_here = f"{name}:{number}"
                        number += 1
                        if size > self.bounds.max_document_bytes:
                            yield Rejected(_name(row, self.id_field, name_here), TOO_LARGE)
                            continue
                        row[self.text_field] = text.as_py()
                        yield _document(row, self.text_field, self.id_field, name_here, metadata, self.bounds)
        except Unreadable as error:
            yield Rejected(unit, error.reason)
        except (OSError, pa.ArrowException, UnicodeDecodeError):
            yield Rejected(unit, "damaged Parquet file")


def _sizes(texts: Any) -> list[int]:
    """Bytes of each text of a column, dictionary-encoded or not, without decoding any; 0 where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(texts.type):
        return [0] * len(texts)
    if not (pa.types.is_string(texts.type.value_type) or pa.types.is_large_string(texts.type.value_type)):
        return [0] * len(texts)
    sizes: list[int] = pc.fill_null(pc.binary_length(texts.dictionary).take(texts.indices), 0).to_pylist()
    return sizes


def _name(row: Mapping[str, object], id_field: str, fallback: str) -> str:
    named = row.get(id_field)
    return valid_unicode(str(named)) if isinstance(named, (str, int)) and str(named).strip() else fallback


def _document(
    row: Mapping[str, object], text_field: str, id_field: str, fallback: str, metadata: MetadataOf, bounds: Bounds
) -> Document | Rejected:
    """A row as a document; the row's own name, where it has one, may be a number."""
    name = _name(row, id_field, fallback)
    text = row.get(text_field)
    if not isinstance(text, str):
        return Rejected(name, "no text")
    return to_document(text, name, bounds.max_document_bytes, metadata(row))
