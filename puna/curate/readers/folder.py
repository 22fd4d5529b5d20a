"""Readers: where documents come from."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from puna.curate.document import Document, Rejected
from puna.runtime.errors import InputError

_NOT_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "__pycache__", "encodings", "lib-dynload"}
"""Folders of the standard library that hold test suites, tables of code points, or what others installed."""


def read_folder(folder: Path, max_bytes: int, leave_out: frozenset[str] = frozenset()) -> Iterator[Document | Rejected]:
    """Every text file below `folder`, in the order of their paths.

    What is text is decided by content, not by name: UTF-8 without NUL bytes.

    Args:
        folder: where to look; hidden files and folders are passed over.
        max_bytes: larger files are rejected unread.
        leave_out: names of sub-folders to pass over.

    Raises:
        InputError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Name a folder of text, or `python` for the standard library.")
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        parts = relative.parts
        if any(part.startswith(".") for part in parts) or leave_out.intersection(parts) or not path.is_file():
            continue
        yield _read_file(path, relative.as_posix(), max_bytes)


def read_python_library(max_bytes: int) -> Iterator[Document | Rejected]:
    """The sources and documentation of the Python standard library on this machine."""
    for read in read_folder(Path(sysconfig.get_path("stdlib")), max_bytes, frozenset(_NOT_LIBRARY)):
        if isinstance(read, Document) and read.id == "pydoc_data/topics.py":
            yield from _reference_topics()
        elif isinstance(read, Rejected) or read.id.endswith((".py", ".txt", ".rst", ".md")):
            yield read


def _reference_topics() -> Iterator[Document]:
    """The language reference that `help()` shows, one document a topic."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Document(text, f"topics/{name}.rst")


def _read_file(path: Path, name: str, max_bytes: int) -> Document | Rejected:
    if path.stat().st_size > max_bytes:
        return Rejected(name, "larger than max_file_bytes")
    content = path.read_bytes()
    if b"\0" in content:
        return Rejected(name, "binary")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Rejected(name, "not UTF-8")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Document(text, name) if text.strip() else Rejected(name, "empty")
