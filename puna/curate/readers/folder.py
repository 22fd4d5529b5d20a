"""Folders of text files, and the one that is on every machine: the Python standard library."""

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from puna.curate.document import Document, Rejected
from puna.curate.readers.bounds import Bounds, Unreadable, open_expanded
from puna.curate.readers.files import runs, walk
from puna.curate.readers.text import decode
from puna.runtime.errors import InputError

_NOT_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "encodings", "lib-dynload"}
"""Folders of the standard library that hold test suites, tables of code points, or what others installed."""

_COMPRESSED = (".gz", ".bz2", ".zst")
_BOUNDS = Bounds()


@dataclass(frozen=True)
class FolderReader:
    """Every text file below a folder; hidden files and folders are passed over."""

    kind: Literal["folder"] = "folder"
    """Every text file below a folder, whatever its name."""
    path: Path = field(kw_only=True)
    """The folder."""
    max_file_bytes: int = 2_000_000
    """Larger files are rejected unread. Counted unpacked, where the name ends in .gz, .bz2 or .zst."""
    encoding: Literal["utf-8", "detect"] = "utf-8"
    """Of the files. With "utf-8" others are rejected; "detect" looks at byte order marks and byte statistics."""

    def __post_init__(self) -> None:
        if self.max_file_bytes < 1:
            raise ValueError(f"max_file_bytes is {self.max_file_bytes}; it has to be at least 1.")

    def units(self) -> Sequence[str]:
        """Runs of files."""
        return runs(walk(self._folder()))

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        first, _, last = unit.partition("//")
        return [self._folder() / name for name, _ in walk(self._folder(), first, last)]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """One document a file, named by its path."""
        first, _, last = unit.partition("//")
        for name, stat in walk(self._folder(), first, last):
            yield read_file(self._folder() / name, name, stat, self.max_file_bytes, self.encoding)

    def _folder(self) -> Path:
        folder = self.path.expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder. Name a folder of text, or `python` for the standard library.")
        return folder


@dataclass(frozen=True)
class PythonReader:
    """The sources and documentation of the Python standard library on this machine."""

    kind: Literal["python"] = "python"
    """The Python standard library on this machine: its sources and documentation."""
    max_file_bytes: int = 2_000_000
    """Larger files are rejected unread."""

    def units(self) -> Sequence[str]:
        """Runs of files."""
        return runs(walk(self._library(), keep=_in_library))

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        return [self._library() / name for name, _ in self._walk(unit)]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """One document a file, and one for each topic of the language reference that `help()` shows."""
        for name, stat in self._walk(unit):
            if name == "pydoc_data/topics.py":
                yield from _reference_topics()
                continue
            read = read_file(self._library() / name, name, stat, self.max_file_bytes)
            if isinstance(read, Rejected) or name.endswith((".py", ".txt", ".rst", ".md")):
                yield read

    def _walk(self, unit: str) -> Iterator[tuple[str, os.stat_result]]:
        first, _, last = unit.partition("//")
        return walk(self._library(), first, last, _in_library)

    @staticmethod
    def _library() -> Path:
        return Path(sysconfig.get_path("stdlib"))


def read_folder(folder: Path, max_bytes: int) -> Iterator[Document | Rejected]:
    """All of `FolderReader` at once."""
    reader = FolderReader(path=folder, max_file_bytes=max_bytes)
    for unit in reader.units():
        yield from reader.read(unit)


def read_python_library(max_bytes: int) -> Iterator[Document | Rejected]:
    """All of `PythonReader` at once."""
    reader = PythonReader(max_file_bytes=max_bytes)
    for unit in reader.units():
        yield from reader.read(unit)


def read_file(
    path: Path, name: str, stat: os.stat_result, max_bytes: int, encoding: Literal["utf-8", "detect"] = "utf-8"
) -> Document | Rejected:
    """A text file as a document. What is text is decided by content, not by name."""
    too_large = Rejected(name, "larger than max_file_bytes")
    if stat.st_size > max_bytes:
        return too_large
    try:
        with open_expanded(path, _BOUNDS) if path.suffix in _COMPRESSED else path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except Unreadable as error:
        return Rejected(name, error.reason)
    except OSError:
        return Rejected(name, "not readable")
    return too_large if len(content) > max_bytes else text_of(content, name, encoding)


def text_of(content: bytes, name: str, encoding: Literal["utf-8", "detect"] = "utf-8") -> Document | Rejected:
    """The content of a text file as a document."""
    if encoding == "utf-8":
        if b"\0" in content:
            return Rejected(name, "binary")
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            return Rejected(name, "not UTF-8")
    else:
        text = decode(content)
        if "\0" in text:
            return Rejected(name, "binary")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Document(text, name) if text.strip() else Rejected(name, "empty")


def _in_library(name: str) -> bool:
    return name not in _NOT_LIBRARY


def _reference_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(text, f"topics/{name}.rst")
