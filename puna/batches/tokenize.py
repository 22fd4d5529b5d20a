"""`puna tokenize`: documents to token shards, on all cores.

This process reads documents and writes tokens; worker processes encode, a few megabytes of text at a time. Tokens are
written in the order of the documents, so the result does not depend on how many workers there are, and a run that was
killed goes on where it last made sure of what it had written.
"""

import itertools
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

from puna.batches.encode import EncodedDocuments, encode_part
from puna.batches.shards import ShardWriter, WriterState
from puna.config import to_plain
from puna.runtime.devices import available_cores
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_documents, read_json, write_json
from puna.runtime.manifest import Manifest, code_version, content_hash
from puna.runtime.progress import progress, say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer

_PART_CHARACTERS = 2_000_000
_SECONDS_BETWEEN_CHECKPOINTS = 20.0
_STATE = "state.json"
_TABLES = "tables.npz"

Documents = list[dict[str, Any]]


@dataclass(frozen=True)
class TokenizeConfig:
    """Turn documents into token shards."""

    documents: Path
    """Documents with a "text" and an "id": a file or a folder of Parquet or JSON Lines."""
    tokenizer: Path
    """Tokenizer file, or a folder that holds one."""
    output: Path
    """Folder to write the shards to; replaced when it exists."""
    split_by: str = ""
    """Make a folder of shards for each value of this column, such as source or language; one for all where empty."""
    shard_tokens: int = 2**28
    """Start a new file after this many tokens."""
    workers: int = 0
    """Processes that encode; 0 is one for every core. The result is the same for any number."""

    def __post_init__(self) -> None:
        if self.workers < 0 or self.shard_tokens < 1:
            raise ValueError("workers has to be 0 or more, and shard_tokens at least 1.")


def main(config: TokenizeConfig) -> None:
    """Write each document as BOS, its tokens, EOS."""
    tokenizer = load_tokenizer(config.tokenizer)
    inputs = {str(path): content_hash(path) for path in (config.documents, config.tokenizer)}
    started = time.monotonic()
    unfinished = config.output.with_name(f".{config.output.name}.unfinished")
    with _Output(unfinished, config, tokenizer, inputs) as output:
        if output.documents_read:
            say(f"Going on after {output.documents_read:,} documents.")
        documents = itertools.islice(read_documents(config.documents), output.documents_read, None)
        with progress("Tokenising documents", total=None) as advance:
            for read, encoded in _encode_in_order(documents, config, tokenizer, unfinished / _TABLES):
                output.add(read, encoded)
                advance(read, f"{output.num_tokens:,} tokens")
        if not output.num_tokens:
            shutil.rmtree(unfinished)
            raise InputError(f"{config.documents} holds no text, so there is nothing to tokenise.")
    output.write_manifests(Manifest("tokenize", to_plain(config), inputs), tokenizer.hash)
    with atomic_path(config.output) as folder:
        unfinished.rename(folder)
    say(
        f"{output.num_tokens:,} tokens from {output.num_bytes:,} bytes "
        f"({output.num_bytes / output.num_tokens:.2f} bytes a token) in {config.output}, "
        f"{output.num_bytes / 1e6 / (time.monotonic() - started):.1f} MB/s"
    )


class _Output:
    """A folder of shards in the making, or several by `split_by`, and how far it has come."""

    def __init__(self, folder: Path, config: TokenizeConfig, tokenizer: Tokenizer, inputs: dict[str, str]) -> None:
        self._folder, self._config, self._vocab_size = folder, config, tokenizer.vocab_size
        self._run = {
            "inputs": inputs,
            "split_by": config.split_by,
            "shard_tokens": config.shard_tokens,
            "code": code_version(),
        }
        self._writers: dict[str, ShardWriter] = {}
        self.documents_read = 0
        """Documents of the input that were dealt with, in their order."""
        state = read_json(folder / _STATE) if (folder / _STATE).exists() else {}
        if state.get("run") == self._run:
            self.documents_read = state["documents_read"]
            for group, values in state["writers"].items():
                self._open(group, WriterState(**values))
        elif folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._saved = time.monotonic()

    @property
    def num_tokens(self) -> int:
        return sum(writer.num_tokens for writer in self._writers.values())

    @property
    def num_bytes(self) -> int:
        return sum(writer.num_bytes for writer in self._writers.values())

    def __enter__(self) -> "_Output":
        return self

    def add(self, read: int, encoded: dict[str, EncodedDocuments]) -> None:
        for group, part in encoded.items():
            if group not in self._writers:
                self._open(group)
            self._writers[group].add_many(part.ids, part.lengths, part.documents, part.num_bytes)
        self.documents_read += read
        if time.monotonic() - self._saved >= _SECONDS_BETWEEN_CHECKPOINTS:
            writers = {group: asdict(writer.checkpoint()) for group, writer in self._writers.items()}
            state = {"run": self._run, "documents_read": self.documents_read, "writers": writers}
            write_json(self._folder / _STATE, state)
            self._saved = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.__exit__(kind, error, trace)

    def write_manifests(self, manifest: Manifest, tokenizer_hash: str) -> None:
        for scratch in (_STATE, _TABLES):
            (self._folder / scratch).unlink(missing_ok=True)
        results = {group: writer.results(tokenizer_hash) for group, writer in sorted(self._writers.items())}
        for group, values in results.items():
            manifest_of_group = Manifest(manifest.stage, manifest.config, manifest.inputs, values)
            manifest_of_group.write(self._folder / group)
        if self._config.split_by:
            totals = {
                key: sum(values[key] for values in results.values())
                for key in ("num_tokens", "num_documents", "num_bytes")
            }
            whole = {**totals, "split_by": self._config.split_by, "folders": list(results)}
            Manifest(manifest.stage, manifest.config, manifest.inputs, whole).write(self._folder)

    def _open(self, group: str, resume: WriterState | None = None) -> None:
        if self._config.split_by and not re.fullmatch(r"\w[\w.+ -]*", group):
            raise InputError(
                f"{self._config.split_by} is {group!r} for some document, which cannot be the name of a folder: use "
                "letters, digits, and . + - _ only."
            )
        (self._folder / group).mkdir(parents=True, exist_ok=True)
        self._writers[group] = ShardWriter(self._folder / group, self._vocab_size, self._config.shard_tokens, resume)


def _encode_in_order(
    documents: Iterable[dict[str, Any]], config: TokenizeConfig, tokenizer: Tokenizer, tables: Path
) -> Iterator[tuple[int, dict[str, EncodedDocuments]]]:
    """(number of documents, what they became), part after part.

    Workers are started, and tables made that make them fast, once there is a second part.
    """
    parts = _parts(documents)
    first = next(parts, [])
    second = next(parts, None)
    fast = second is not None and _save_tables(tokenizer, tables)
    encode = partial(encode_part, config.tokenizer.resolve(), tables if fast else None, config.split_by)
    workers = config.workers or available_cores()
    if second is None or workers == 1:
        for part in itertools.chain([first], [second] if second else [], parts):
            yield len(part), encode(part)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)
    waiting: deque[tuple[int, Future[dict[str, EncodedDocuments]]]] = deque()
    try:
        for part in itertools.chain([first, second], parts):
            waiting.append((len(part), pool.submit(encode, part)))
            if len(waiting) > 2 * workers:
                read, future = waiting.popleft()
                yield read, future.result()
        for read, future in waiting:
            yield read, future.result()
    except BrokenProcessPool as error:
        raise InputError(
            "A worker process was killed, most likely because the memory was used up. The same command goes on from "
            "where this one came; give it fewer workers with --set workers=N."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _parts(documents: Iterable[dict[str, Any]]) -> Iterator[Documents]:
    """Documents in groups of about `_PART_CHARACTERS`."""
    part: Documents = []
    characters = 0
    for document in documents:
        part.append(document)
        text = document.get("text")
        characters += len(text) if isinstance(text, str) else 0
        if characters >= _PART_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _save_tables(tokenizer: Tokenizer, path: Path) -> bool:
    """Write the tables of `puna.batches.byte_pairs`; return whether the tokenizer has any, and numba is there."""
    try:
        from puna.batches.byte_pairs import byte_pairs
    except ImportError:
        return False
    tables = byte_pairs(tokenizer)
    if tables is not None:
        tables.save(path)
    return tables is not None


def _one_thread() -> None:
    """Each worker is one core's worth."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
