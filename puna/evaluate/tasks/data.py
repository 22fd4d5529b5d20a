"""Rows of benchmark files, each knowing where it stands: local files, as they are published. `hub` has the others."""

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from puna.runtime.errors import InputError

Value = TypeVar("Value")

HUB = Path("hub:")
"""In place of the folder of benchmark data: the Hugging Face hub."""


@dataclass(frozen=True, slots=True)
class Row:
    """The values of one line, and where it stands."""

    values: Mapping[str, Any]
    where: str

    def get(self, column: str, kind: type[Value]) -> Value:
        """A value that has to be there, and to be of this type; a text must not be blank.

        Raises:
            InputError: it is not; the message names file and line.
        """
        if column not in self.values:
            raise InputError(f"{self.where}: there is no {column!r}, only {', '.join(map(repr, self.values))}.")
        value = self.values[column]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{self.where}: {column!r} is {value!r}, but has to be {_NAMES.get(kind, kind.__name__)}.")
        if isinstance(value, str) and not value.strip():
            raise InputError(f"{self.where}: {column!r} is empty.")
        return value

    def index(self, column: str, count: int) -> int:
        """The place of the right one of `count` choices, counted from 0.

        Raises:
            InputError: as `get`; or there are not so many choices.
        """
        index = self.get(column, int)
        if not 0 <= index < count:
            raise InputError(
                f"{self.where}: {column!r} says that answer {index} is right, counted from 0, but there are {count}."
            )
        return index

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of texts that has to be there.

        Raises:
            InputError: as `get`.
        """
        values = self.get(column, list)
        if wrong := [value for value in values if not isinstance(value, str)]:
            raise InputError(f"{self.where}: {column!r} holds {wrong[0]!r}, but all have to be texts.")
        return tuple(values)


_NAMES: dict[type, str] = {str: "a text", int: "a whole number", list: "a list", dict: "a table"}


def is_hub(data: Path | None) -> bool:
    """Whether questions are to be read from the hub."""
    return data == HUB


def data_file(data: Path | None, name: str) -> Path:
    """A file of the folder of benchmark data.

    Raises:
        InputError: no folder was named, or the file is not in it.
    """
    if data is None:
        raise InputError(
            f"This task reads {name} from the folder of benchmark data: set data to that folder, or to "
            f'"{HUB}" to download published questions from the Hugging Face hub.'
        )
    if is_hub(data):
        raise InputError(f"{name} is not on the Hugging Face hub in a form that this task reads: set data to a folder.")
    path = data / name
    if not path.is_file():
        here = "" if data.is_dir() else f" {data} is no folder."
        raise InputError(f"{path} does not exist; the task reads its questions from there.{here}")
    return path


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON Lines or CSV file (.jsonl, .csv or .tsv, gzipped if .gz follows); a CSV has names on top.

    Raises:
        InputError: there is no such file, it is of another kind, or a line is malformed.
    """
    text = _read_text(path)
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        yield from _json_rows(text, path.name)
    elif name.endswith((".csv", ".tsv")):
        yield from csv_rows(text, path.name, delimiter="\t" if name.endswith(".tsv") else ",")
    else:
        raise InputError(f"{path}: questions are read from .jsonl, .csv or .tsv files (or these with .gz behind).")


def read_archive(path: Path) -> dict[str, str]:
    """Name in the archive -> text, of all files of a .tar.gz, by name.

    Raises:
        InputError: it is no such archive, or breaks off.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            members = sorted((member for member in archive if member.isfile()), key=lambda member: member.name)
            found = {member.name: archive.extractfile(member) for member in members}
            return {name: file.read().decode("utf-8-sig") for name, file in found.items() if file is not None}
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a whole .tar.gz archive of texts ({error}).") from error


def csv_rows(text: str, name: str, *, columns: tuple[str, ...] = (), delimiter: str = ",") -> Iterator[Row]:
    """The rows of a CSV text.

    Args:
        name: of the file, for messages.
        columns: names of the columns; those of its first line where absent.

    Raises:
        InputError: a row has more or fewer cells than there are columns, or a quotation does not end.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names = list(columns)
    try:
        for cells in reader:
            if not cells:
                continue
            if not names:
                names = cells
                continue
            if len(cells) != len(names):
                raise InputError(
                    f"{name}, line {reader.line_num}: {len(cells)} cells, but there are {len(names)} columns "
                    f"({', '.join(names)})."
                )
            yield Row(dict(zip(names, cells, strict=True)), f"{name}, line {reader.line_num}")
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: not valid CSV ({error}).") from error


def _json_rows(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not valid JSON ({error.msg}).") from error
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected a JSON object, found {line[:40]!r}.")
        yield Row(value, where)


def _read_text(path: Path) -> str:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return file.read().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise InputError(f"{path} breaks off, or is not what its name says: {error}.") from error
