"""Files that are either there and whole, or not there at all."""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
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


@contextlib.contextmanager
def only_process(folder: Path, command: str) -> Iterator[None]:
    """Make sure that no other process works in a folder while the block runs; it is made if it is absent.

    Args:
        folder: gets the file `lock`.
        command: what the processes are, for the message.

    Raises:
        InputError: another one is at work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"Another {command} is at work in {folder}; wait for it, or name another output."
            ) from error
        yield


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


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, gzipped if its name ends in .gz; of every such file in a folder, by name.

    Raises:
        InputError: nothing there, a line is not a JSON object (with its number), or the gzip stream is broken.
    """
    if path.is_dir():
        files = sorted(file for pattern in ("*.jsonl", "*.jsonl.gz") for file in path.glob(pattern))
        if not files:
            raise InputError(f"{path} holds no .jsonl or .jsonl.gz file.")
        for part in files:
            yield from read_jsonl(part)
        return
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise InputError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r}.")
                yield value
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not valid JSON ({error.msg}).") from error
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise InputError(f"{path} breaks off or is not what its name says, after line {number}: {error}.") from error


def document_files(path: Path) -> list[Path]:
    """The files that hold the rows of `path`: itself, or in a folder its Parquet files, else its JSON Lines, by name.

    Raises:
        InputError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise InputError(f"{path} does not exist; it should be a Parquet or .jsonl file, or a folder of such files.")
    for patterns in (("*.parquet",), ("*.jsonl", "*.jsonl.gz")):
        if files := sorted(file for pattern in patterns for file in path.glob(pattern)):
            return files
    inside = f" Did you mean {path / 'documents'}?" if (path / "documents").is_dir() else ""
    raise InputError(f"{path} holds no .parquet, .jsonl or .jsonl.gz file.{inside}")


def read_documents(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of Parquet files or JSON Lines, one file or a folder of them, one after another; null fields left out.

    Raises:
        InputError: nothing there, or a file is broken.
    """
    for file in document_files(path):
        yield from _read_parquet(file) if file.suffix == ".parquet" else read_jsonl(file)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(f"Reading {path} needs pyarrow: pip install 'puna[curate]'.") from error
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    yield {key: value for key, value in row.items() if value is not None}
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a whole Parquet file ({error}). Was its writing interrupted?") from error


def write_jsonl(destination: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, atomically; return how many."""
    count = 0
    with atomic_path(destination) as path, path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
