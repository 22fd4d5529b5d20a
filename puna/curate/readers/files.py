"""Which files a reader reads, and how they are dealt out in units.

A unit is the path of a file, below the reader's `path`. Where a unit is a part of a file, or a run of files, `//` and
what part of it follow: `posts.jsonl//0-268435456`, `a/first.txt//c/last.txt`. No path holds `//` by itself.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from puna.runtime.errors import InputError

MAX_FILES = 1000
MAX_BYTES = 64_000_000
"""A run of small files ends at either."""


def list_files(path: Path, suffixes: tuple[str, ...], what: str) -> list[str]:
    """The files that a reader's `path` names: itself, or all below it whose names end like that, in order.

    A file that is named itself need not end so. Hidden files and folders are passed over.

    Raises:
        InputError: there is none.
    """
    path = path.expanduser()
    if path.is_file():
        return [path.name]
    if not path.exists():
        raise InputError(f"There is nothing at {path}; it should be {what}, or a folder of them.")
    names = [name for name, _ in walk(path) if name.lower().endswith(suffixes)]
    if not names:
        raise InputError(f"{path} holds no file that ends in {', '.join(suffixes)}, as {what} does.")
    return names


def locate(path: Path, unit: str) -> tuple[Path, str]:
    """The file of a unit, and what part of it: "" for all."""
    name, _, part = unit.partition("//")
    path = path.expanduser()
    return (path if path.is_file() else path / name), part


def walk(
    folder: Path, first: str = "", last: str = "", keep: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, os.stat_result]]:
    """The regular files below a folder from `first` to `last` (both included), in the order of their paths' parts.

    Args:
        folder: where to look.
        first: path below it to begin with; empty for the beginning.
        last: path to end with; empty for the end.
        keep: whether a file's or folder's own name is looked at at all. Hidden ones never are.
    """
    low, high = (tuple(name.split("/")) if name else () for name in (first, last))

    def visit(place: Path, parts: tuple[str, ...]) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(place) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            here = (*parts, entry.name)
            if entry.name.startswith(".") or not keep(entry.name) or here[: len(low)] < low[: len(here)]:
                continue
            if high and here > high:
                return
            if entry.is_dir(follow_symlinks=False):
                yield from visit(place / entry.name, here)
            elif entry.is_file():
                yield "/".join(here), entry.stat()

    return visit(folder, ())


def runs(files: Iterator[tuple[str, os.stat_result]]) -> Sequence[str]:
    """Deal out files in runs of bounded number and size, as units."""
    units: list[str] = []
    first, last, count, size = "", "", 0, 0
    for name, stat in files:
        if count == MAX_FILES or (count and size + stat.st_size > MAX_BYTES):
            units.append(f"{first}//{last}")
            count = size = 0
        if not count:
            first = name
        last, count, size = name, count + 1, size + stat.st_size
    return [*units, f"{first}//{last}"] if count else units


def byte_ranges(path: Path, name: str, bytes_per_unit: int) -> list[str]:
    """Units that together cover an uncompressed file."""
    size = path.stat().st_size
    if size <= bytes_per_unit:
        return [name]
    return [f"{name}//{start}-{min(start + bytes_per_unit, size)}" for start in range(0, size, bytes_per_unit)]


def parse_range(part: str) -> tuple[int, int]:
    """The two numbers of a part such as `0-268435456`."""
    start, _, stop = part.partition("-")
    return int(start), int(stop)
