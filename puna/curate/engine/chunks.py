"""A reader's units, put together until they are worth a worker's while; and what changes when their files do."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.config import to_plain
from puna.curate.engine.task import Chunk, Stamp
from puna.curate.step import GlobalStep, Reader, Step

_MAX_UNITS = 1000


def chunks(reader: Reader, batch_bytes: int, first: int) -> list[Chunk]:
    """Consecutive units in groups of about `batch_bytes` of files; a larger unit is a chunk of its own.

    Args:
        reader: where the units are.
        batch_bytes: of files. A unit that is no file has a chunk of its own.
        first: the number of the first chunk.

    Raises:
        InputError: the reader finds nothing.
    """
    made: list[Chunk] = []
    units: list[str] = []
    stamps: list[Stamp] = []
    size = 0

    def close() -> None:
        nonlocal size
        if units:
            made.append(Chunk(first + len(made), tuple(units), tuple(stamps), size))
        units.clear()
        stamps.clear()
        size = 0

    for unit in reader.units():
        files = _stamp(_files(reader, unit))
        size_of_unit = sum(file[1] for file in files)
        if not files or size + size_of_unit > batch_bytes or len(units) >= _MAX_UNITS:
            close()
        units.append(unit)
        stamps += files
        size += size_of_unit
        if not files:
            close()
    close()
    return made


def _files(reader: Reader, unit: str) -> Sequence[Path]:
    """What a unit is read from: as the reader says, if it does, or the file of that name, if there is one."""
    if hasattr(reader, "files"):
        files: Sequence[Path] = reader.files(unit)
        return files
    return [Path(unit)] if Path(unit).is_file() else []


def _stamp(files: Sequence[Path]) -> list[Stamp]:
    status = [(str(file), file.stat()) for file in files]
    return [(name, known.st_size, known.st_mtime_ns) for name, known in status]


def settings_of(step: Reader | Step | GlobalStep) -> Any:
    """A step's settings, with a stamp of every file or model folder that they name, as JSON."""
    plain = to_plain(step)
    files: list[Path] = []
    if not hasattr(step, "units"):
        for path in (Path(text).expanduser() for text in _strings(plain)):
            files += [path] if path.is_file() else filter(Path.is_file, path.iterdir()) if path.is_dir() else []
    kind = f"{type(step).__module__}.{type(step).__qualname__}"
    return {"kind": kind, "settings": plain, "files": _stamp(sorted(files))}


def fingerprint(*parts: Any) -> str:
    """A name for a combination of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from [value] if value else []
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _strings(part)
