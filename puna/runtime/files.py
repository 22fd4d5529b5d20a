"""Files that are either there and whole, or not there at all."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from puna.runtime.errors import InputError


@contextlib.contextmanager
def atomic_path(destination: Path) -> Iterator[Path]:
    """Yield a temporary path beside `destination`; rename it there when the block ends well.

    The yielded path does not exist yet: make it a file or a directory. A reader never sees a half-written
    artifact, and a failure (an exception, a full disk, a kill) leaves what was there before untouched. An
    existing directory is replaced by two renames, so for an instant it is absent, but never mixed.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}.tmp-"))
    try:
        fresh = scratch / destination.name
        yield fresh
        if destination.is_dir():
            destination.rename(scratch / "replaced")
        fresh.replace(destination)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(destination: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(destination) as path, path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(destination: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically."""
    write_text(destination, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is absent, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}). Was its writing interrupted?") from error


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
