"""Small tables as people keep them (JSON, JSON Lines, CSV, TSV, Parquet, or a text file for each column), row by row,
each with the place it is at."""

import csv
import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
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


def parallel_files(prefix: Path, columns: Sequence[str]) -> dict[str, Path]:
    """Text files beside each other with one column each, by column: PREFIX.en and PREFIX.de, as parallel corpora are
    kept, or the same with .gz behind. Empty where there is none, or where `prefix` itself exists."""
    if prefix.exists():
        return {}
    candidates = {
        name: [prefix.with_name(f"{prefix.name}.{name}{packed}") for packed in ("", ".gz")] for name in columns
    }
    found = {name: [path for path in paths if path.exists()] for name, paths in candidates.items()}
    if not any(found.values()):
        return {}
    if missing := [name for name, paths in found.items() if not paths]:
        raise InputError(f"{candidates[missing[0]][0]} does not exist, while {prefix} has files of other columns.")
    return {name: paths[0] for name, paths in found.items()}


def read_parallel(files: Mapping[str, Path]) -> Iterator[Row]:
    """The rows that lines of the same number make; see `parallel_files`.

    Raises:
        InputError: a file is longer than another; or see `text_lines`.
    """
    for lines in zip_longest(*map(text_lines, files.values())):
        if None in lines:
            ended = [path for path, line in zip(files.values(), lines, strict=True) if line is None]
            number = next(line[0] for line in lines if line is not None)
            raise InputError(f"{ended[0]} ends before line {number}, which other files beside it have.")
        where = f"{' and '.join(map(str, files.values()))}, line {lines[0][0]}"
        yield Row(where, {name: text.rstrip("\r\n") for name, (_, text) in zip(files, lines, strict=True)})


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
        before = ", as which the lines before could be read" if number > 1 else ""
        raise InputError(
            f"{path}, line {number}: byte 0x{byte:02x} is not UTF-8{before}. The file is in another encoding, or in "
            "several; convert it, for instance with iconv -f latin1 -t utf-8."
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
                if not tabs and len(names) == 1 and (mark := re.search(r"[;\t|]", names[0])):
                    raise InputError(
                        f"{where}: the columns of the header are parted by {mark[0]!r}, but in a .csv file by commas. "
                        "Export it with commas, or with tabs as a .tsv file."
                    )
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
