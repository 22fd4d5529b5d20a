"""Git repositories, checked out or as tar archives: their text files, and under what licence they are."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from puna.curate.document import Document, Rejected
from puna.curate.readers.archives import read_tar
from puna.curate.readers.bounds import Bounds, Unreadable, open_expanded
from puna.curate.readers.files import runs, walk
from puna.curate.readers.folder import read_file, text_of
from puna.curate.sources.licences import detect_licence
from puna.runtime.errors import InputError

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.zst")
_LICENCE_NAMES = ("license", "licence", "copying", "unlicense", "license-mit", "license-apache")
_MAX_LICENCE_BYTES = 200_000


@dataclass(frozen=True)
class GitReader:
    """The text files of repositories, each with its repository's name and licence."""

    kind: Literal["git"] = "git"
    """Git repositories: checkouts, or tar archives of them."""
    path: Path = field(kw_only=True)
    """A checkout (it holds .git), an archive, or a folder of either."""
    max_file_bytes: int = 1_000_000
    """Larger files are rejected unread."""
    extensions: tuple[str, ...] = ()
    """Ends of file names to read, such as ".py"; all where empty."""
    bounds: Bounds = field(default_factory=Bounds)
    """What one archive may cost."""

    def __post_init__(self) -> None:
        if self.max_file_bytes < 1:
            raise ValueError(f"max_file_bytes is {self.max_file_bytes}; it has to be at least 1.")

    def units(self) -> Sequence[str]:
        """Archives, and runs of files of checkouts: `REPOSITORY//FIRST//LAST`."""
        path = self.path.expanduser()
        if path.is_file() or (path / ".git").exists():
            places = [path]
        elif path.is_dir():
            places = sorted(p for p in path.iterdir() if p.name.endswith(_ARCHIVES) or (p / ".git").exists())
        else:
            places = []
        units: list[str] = []
        for place in places:
            name = "" if place == path else place.name
            units += [name] if place.is_file() else [f"{name}//{run}" for run in runs(walk(place))]
        if not units:
            raise InputError(
                f"{path} is neither a git checkout nor a folder of checkouts or tar archives. "
                "Read a folder without .git with the reader `folder`."
            )
        return units

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        place, first, last = self._parts(unit)
        if place.is_file():
            return [place]
        return [*_licence_files(place), *(place / name for name, _ in walk(place, first, last))]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """One document a file, named by its repository and its path."""
        place, first, last = self._parts(unit)
        if place.is_file():
            yield from self._archive(place)
            return
        repository = place.absolute().name
        licence = next(
            (found for path in _licence_files(place) if (found := detect_licence(_head(path)))),
            None,
        )
        for name, stat in walk(place, first, last):
            if self._wanted(name):
                read = read_file(place / name, name, stat, self.max_file_bytes)
                yield _belonging(read, repository, name, licence)

    def _archive(self, path: Path) -> Iterator[Document | Rejected]:
        repository = path.name.split(".tar")[0].removesuffix(".tgz")
        bounds = replace(self.bounds, max_document_bytes=min(self.max_file_bytes, self.bounds.max_document_bytes))
        licence = None
        try:
            # The licence may come after the files that it is for, and all of them do not fit into memory.
            with open_expanded(path, bounds) as stream:
                for member in read_tar(stream, bounds):
                    if member.content and _at_root(member.name) and _is_licence(member.name.rpartition("/")[2]):
                        licence = licence or detect_licence(member.content.decode("utf-8", "replace"))
        except Unreadable:
            pass  # said below, where it takes documents with it
        try:
            with open_expanded(path, bounds) as stream:
                for member in read_tar(stream, bounds):
                    hidden = any(part.startswith(".") for part in member.name.split("/"))
                    if hidden or not self._wanted(member.name):
                        continue
                    if member.content is None:
                        yield Rejected(f"{repository}/{member.name}", "larger than max_file_bytes")
                        continue
                    yield _belonging(text_of(member.content, member.name), repository, member.name, licence)
        except Unreadable as error:
            yield Rejected(path.name, error.reason)

    def _wanted(self, name: str) -> bool:
        return not self.extensions or name.endswith(self.extensions)

    def _parts(self, unit: str) -> tuple[Path, str, str]:
        name, _, run = unit.partition("//")
        first, _, last = run.partition("//")
        path = self.path.expanduser()
        return (path / name if name else path), first, last


def _belonging(read: Document | Rejected, repository: str, name: str, licence: str | None) -> Document | Rejected:
    if isinstance(read, Rejected):
        return replace(read, id=f"{repository}/{name}")
    metadata: dict[str, str | int | float | bool] = {"repository": repository, "path": name}
    if licence:
        metadata["licence"] = licence
    return replace(read, id=f"{repository}/{name}", metadata=metadata)


def _licence_files(root: Path) -> list[Path]:
    return sorted(Path(entry) for entry in os.scandir(root) if entry.is_file() and _is_licence(entry.name))


def _is_licence(name: str) -> bool:
    return name.lower().split(".")[0] in _LICENCE_NAMES


def _at_root(name: str) -> bool:
    """At the top of an archive, or of the one folder that archives of repositories have at their top."""
    return name.count("/") <= 1


def _head(path: Path) -> str:
    with path.open("rb") as stream:
        return stream.read(_MAX_LICENCE_BYTES).decode("utf-8", "replace")
