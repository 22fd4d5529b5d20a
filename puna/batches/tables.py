"""Small tables as people keep them (JSON, JSON Lines, CSV, TSV, Parquet), row by row, each with the place it is at."""

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.runtime.errors import InputError
from puna.runtime.files import read_documents

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""What `read_table` reads; all but Parquet also with .gz behind."""

_LARGEST_FIELD = 2**27


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table."""

    where: str
    """File and line, or file and number of the row, for errors."""
    values: dict[str, Any]
    """By column. Null values are left out."""


def read_table(path: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a file, or of every file of a folder, by name.

    A .json file is one array of objects, or one object a line. A .csv file quotes with `"`; in a .tsv file quotes are
    letters like any other.

    Args:
        path: what to read.
        columns: names for the columns of .csv and .tsv files that have no header.

    Raises:
        InputError: nothing there; another kind of file; a line that is broken or not UTF-8, with its number.
    """
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if _suffix(file) in SUFFIXES]
        if not files:
            raise InputError(f"{path} holds no file of a kind that can be read: {', '.join(SUFFIXES)}.")
        for file in files:
            yield from read_table(file, columns)
        return
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    match _suffix(path):
        case ".parquet":
            for number, values in enumerate(read_documents(path), start=1):
                yield Row(f"{path}, row {number}", values)
        case ".csv" | ".tsv" as suffix:
            yield from _read_separated(path, columns, tabs=suffix == ".tsv")
        case ".jsonl":
            yield from _read_json_lines(path)
        case ".json":
            yield from _read_json(path)
        case suffix:
            raise InputError(f"{path} ends in {suffix or 'nothing'}; tables end in {', '.join(SUFFIXES)}.")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text file, gzipped if its name ends in .gz, with their numbers and line ends.

    Raises:
        InputError: the file is absent, a line is not UTF-8, or the gzip stream is broken.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{path}, line {number}: byte 0x{byte:02x} is not UTF-8, as which the lines before could be read. The file "
            "is in another encoding, or in several; convert it, for instance with iconv -f latin1 -t utf-8."
        ) from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} breaks off, or is not gzipped, after line {number}: {error}.") from error


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _read_json_lines(path: Path) -> Iterator[Row]:
    for number, line in text_lines(path):
        if line.strip():
            yield _row(f"{path}, line {number}", _parse(line, f"{path}, line {number}"))


def _read_json(path: Path) -> Iterator[Row]:
    lines = list(text_lines(path))
    text = "".join(line for _, line in lines)
    if not text.lstrip().startswith("["):
        yield from _read_json_lines(path)
        return
    for number, value in enumerate(_parse(text, str(path)), start=1):
        yield _row(f"{path}, element {number}", value)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f" at line {error.lineno}" if "\n" in text.rstrip() else ""
        raise InputError(f"{where}: not valid JSON{at} ({error.msg}).") from error


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {str(value)[:40]!r}.")
    return Row(where, {key: part for key, part in value.items() if part is not None})


def _read_separated(path: Path, columns: Sequence[str], *, tabs: bool) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_FIELD)
    lines = (line for _, line in text_lines(path))
    if tabs:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines, strict=True)
    names = list(columns)
    start = 1
    try:
        for fields in reader:
            where, start = f"{path}, line {start}", reader.line_num + 1
            if not fields:
                continue
            if not names:
                names = [name.strip() for name in fields]
                if len(set(names)) < len(names):
                    raise InputError(f"{where}: two columns of the header have the same name ({', '.join(names)}).")
                continue
            if len(fields) != len(names):
                raise InputError(
                    f"{where} has {len(fields)} fields, but there are {len(names)} columns ({', '.join(names)}). Are "
                    "there separators in a field that is not quoted?"
                )
            yield Row(where, dict(zip(names, fields, strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}, line {start}: {error}.") from error
