"""Token shards: ids on disk, memory-mapped, with an index of documents.

Layout of a shard folder:
    ids-00000.bin ...    little-endian uint16 or uint32, documents one after another, none cut by a shard's end
    mask-00000.bin ...   uint8 beside it, 1 where a token is a training target; absent when every token is
    offsets.npy          int64, where document i starts in the concatenation of all shards; one more for the end
    documents.jsonl      id, source where known, and UTF-8 length of each document's text, one a line
    puna.json            manifest: number of tokens, documents and bytes, dtype, and the tokenizer's hash
"""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl
from puna.runtime.manifest import Manifest


@dataclass(frozen=True)
class WriterState:
    """How far a writer had come; `ShardWriter.resume` goes on from there."""

    shard_sizes: list[int]
    """Tokens in each file of ids."""
    num_documents: int
    num_bytes: int
    num_targets: int
    documents_file_bytes: int
    """Size of documents.jsonl."""


class ShardWriter:
    """Writes documents into an existing folder; use as a context manager, then write a manifest.

    Memory does not grow with the number of documents.

    Args:
        directory: where to; wrap in `atomic_path` to make it appear whole.
        vocab_size: decides between two and four bytes an id.
        shard_tokens: start a new file once one holds this many.
        resume: what `checkpoint` returned in a run that was interrupted; what came after is dropped.
    """

    def __init__(
        self, directory: Path, vocab_size: int, shard_tokens: int = 2**28, resume: WriterState | None = None
    ) -> None:
        self.directory, self.shard_tokens = directory, shard_tokens
        self.num_tokens = self.num_bytes = self.num_targets = self.num_documents = 0
        self._shard_sizes: list[int] = []
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._ids: BinaryIO | None = None
        self._mask: BinaryIO | None = None
        if resume is not None:
            self.num_tokens, self.num_bytes = sum(resume.shard_sizes), resume.num_bytes
            self.num_targets, self.num_documents = resume.num_targets, resume.num_documents
            self._shard_sizes = list(resume.shard_sizes)
        for path in (*directory.glob("ids-*.bin"), *directory.glob("mask-*.bin")):
            if int(path.stem.split("-")[1]) >= len(self._shard_sizes):
                path.unlink()
        self._documents = _open(directory / "documents.jsonl", 0 if resume is None else resume.documents_file_bytes)
        header = _offsets_header(0)
        kept = 0 if resume is None else len(header) + 8 * (resume.num_documents + 1)
        self._offsets = _open(directory / "offsets.npy", kept)
        if resume is None:
            self._offsets.write(header + bytes(8))
        elif self._shard_sizes:
            last = len(self._shard_sizes) - 1
            self._ids = _open(self._ids_path(last), self._shard_sizes[-1] * self._dtype.itemsize)
            if self._mask_path(last).exists():
                self._mask = _open(self._mask_path(last), self._shard_sizes[-1])

    def __enter__(self) -> "ShardWriter":
        return self

    def add(self, ids: Sequence[int], document_id: str, num_bytes: int, mask: Sequence[int] | None = None) -> None:
        """Append one document; `mask` must be given for every document or for none."""
        assert mask is None or len(mask) == len(ids)
        self.add_many(
            np.asarray(ids, dtype=self._dtype),
            np.array([len(ids)], dtype=np.int64),
            document_line({"id": document_id, "bytes": num_bytes}),
            num_bytes,
            None if mask is None else np.asarray(mask, dtype=np.uint8),
        )

    def add_many(
        self,
        ids: NDArray[np.integer],
        lengths: NDArray[np.int64],
        documents: bytes,
        num_bytes: int,
        mask: NDArray[np.uint8] | None = None,
    ) -> None:
        """Append documents.

        Args:
            ids: of all of them, one after another.
            lengths: tokens of each.
            documents: their lines of documents.jsonl, see `document_line`.
            num_bytes: UTF-8 bytes of their texts together.
            mask: as long as `ids`; given always or never.
        """
        ends = np.cumsum(lengths)
        first, begin = 0, 0
        while first < len(lengths):
            if self._ids is None or self._shard_sizes[-1] >= self.shard_tokens:
                self._next_shard(with_mask=mask is not None)
            assert self._ids is not None
            assert (mask is None) == (self._mask is None)
            # Documents belong to this file as long as it is not full where they begin.
            room = self.shard_tokens - self._shard_sizes[-1]
            first = 1 + int(np.searchsorted(ends[first:-1] - begin, room)) + first
            end = int(ends[first - 1])
            self._ids.write(ids[begin:end].astype(self._dtype, copy=False).tobytes())
            if mask is not None and self._mask is not None:
                self._mask.write(mask[begin:end].tobytes())
            self._shard_sizes[-1] += end - begin
            begin = end
        self._offsets.write((self.num_tokens + ends).astype("<i8").tobytes())
        self._documents.write(documents)
        self.num_documents += len(lengths)
        self.num_tokens += begin
        self.num_bytes += num_bytes
        self.num_targets += begin if mask is None else int(mask.sum())

    def checkpoint(self) -> WriterState:
        """Bring everything to the disk, and return what `resume` takes to go on from here."""
        for file in self._files():
            file.flush()
            os.fsync(file.fileno())
        return WriterState(
            list(self._shard_sizes), self.num_documents, self.num_bytes, self.num_targets, self._documents.tell()
        )

    def results(self, tokenizer_hash: str) -> dict[str, Any]:
        """What the manifest has to record for `TokenShards` to read the folder."""
        return {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "num_targets": self.num_targets,
            "dtype": self._dtype.str,
            "shard_sizes": self._shard_sizes,
            "tokenizer_hash": tokenizer_hash,
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._offsets.seek(0)
        self._offsets.write(_offsets_header(self.num_documents + 1))
        for file in self._files():
            file.close()

    def _files(self) -> list[BinaryIO]:
        return [file for file in (self._ids, self._mask, self._documents, self._offsets) if file is not None]

    def _next_shard(self, with_mask: bool) -> None:
        for file in (self._ids, self._mask):
            if file is not None:
                file.close()
        number = len(self._shard_sizes)
        self._ids = self._ids_path(number).open("wb")
        self._mask = self._mask_path(number).open("wb") if with_mask else None
        self._shard_sizes.append(0)

    def _ids_path(self, number: int) -> Path:
        return self.directory / f"ids-{number:05}.bin"

    def _mask_path(self, number: int) -> Path:
        return self.directory / f"mask-{number:05}.bin"


def shard_folders(directory: Path) -> dict[str, Path]:
    """The folders of token shards that `puna tokenize` wrote to `directory`, by name: several, or itself as ""."""
    folders = Manifest.read(directory).results.get("folders")
    return {"": directory} if folders is None else {name: directory / name for name in folders}


def document_line(facts: dict[str, Any]) -> bytes:
    """A document's line in documents.jsonl: its "id" and "bytes", and its "source" where it has one."""
    return (json.dumps(facts, ensure_ascii=False) + "\n").encode()


def _open(path: Path, kept_bytes: int) -> BinaryIO:
    """Open for appending behind the first `kept_bytes`; what is there after them is dropped."""
    file = path.open("r+b" if kept_bytes else "wb")
    file.truncate(kept_bytes)
    file.seek(kept_bytes)
    return file


def _offsets_header(length: int) -> bytes:
    """The head of a .npy file of that many int64: NumPy pads it, so that its size does not depend on the length."""
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (length,)})
    return header.getvalue()


class TokenShards:
    """A folder of token shards, read through memory maps.

    Args:
        directory: the folder.
        tokenizer_hash: the hash of the tokenizer that the reader means to use; None to take any.

    Raises:
        InputError: not a shard folder, a file is shorter than the manifest says, no document in it, or the
            tokens were made by another tokenizer.
    """

    def __init__(self, directory: Path, tokenizer_hash: str | None = None) -> None:
        manifest = Manifest.read(directory)
        facts = manifest.results
        if "folders" in facts:
            raise InputError(
                f"{directory} holds a folder of token shards for each {facts['split_by']} "
                f"({', '.join(facts['folders'])}). Name one of them, or mix them: `puna config pretrain` shows how."
            )
        if "shard_sizes" not in facts:
            raise InputError(f"{directory} is the output of `puna {manifest.stage}`, not a folder of token shards.")
        if tokenizer_hash is not None and facts["tokenizer_hash"] != tokenizer_hash:
            raise InputError(
                f"The tokens in {directory} were made by another tokenizer (hash {facts['tokenizer_hash'][:12]}, "
                f"this model's is {tokenizer_hash[:12]}). Tokenise the documents again with this model's tokenizer."
            )
        if not facts["num_documents"]:
            raise InputError(f"{directory} holds no document.")
        self.directory = directory
        self.num_tokens: int = facts["num_tokens"]
        self.num_bytes: int = facts["num_bytes"]
        self.num_targets: int = facts["num_targets"]
        self.tokenizer_hash: str = facts["tokenizer_hash"]
        self.offsets: NDArray[np.int64] = np.load(directory / "offsets.npy", mmap_mode="r")
        self._shard_starts = np.cumsum([0, *facts["shard_sizes"]])
        self._ids = [self._map(f"ids-{n:05}.bin", facts["dtype"], size) for n, size in enumerate(facts["shard_sizes"])]
        self._masks = None
        if (directory / "mask-00000.bin").exists():
            self._masks = [self._map(f"mask-{n:05}.bin", "u1", size) for n, size in enumerate(facts["shard_sizes"])]

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def ids(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        """Token ids [start, stop) of a document, as a view of the file."""
        return self._slice(self._ids, document, start, stop)

    def mask(self, document: int, start: int = 0, stop: int | None = None) -> NDArray[np.integer] | None:
        """1 where the token is a training target, or None where every token is."""
        return None if self._masks is None else self._slice(self._masks, document, start, stop)

    def document_ids(self) -> list[str]:
        """The id of every document, in order."""
        return [row["id"] for row in read_jsonl(self.directory / "documents.jsonl")]

    def document_facts(self, document: int) -> dict[str, Any]:
        """The "id", "bytes" and, where known, "source" of one document; reads the list up to there."""
        return next(itertools.islice(read_jsonl(self.directory / "documents.jsonl"), document, None))

    def document_of_token(self, token: int) -> tuple[int, int]:
        """The document that holds a token, counted from 0 over the whole folder, and the token's place within it.

        Raises:
            InputError: there are fewer tokens.
        """
        if not 0 <= token < self.num_tokens:
            raise InputError(f"{self.directory} has no token {token:,}; they count from 0 to {self.num_tokens - 1:,}.")
        document = int(np.searchsorted(self.offsets, token, side="right")) - 1
        return document, token - int(self.offsets[document])

    def _map(self, name: str, dtype: str, size: int) -> NDArray[np.integer]:
        path = self.directory / name
        expected = size * np.dtype(dtype).itemsize
        actual = path.stat().st_size if path.exists() else 0
        if actual != expected:
            raise InputError(
                f"{path} has {actual:,} bytes where the manifest says {expected:,}: it was cut short or changed. "
                "Make the shards again."
            )
        return np.memmap(path, dtype=dtype, mode="r", shape=(size,))

    def _slice(
        self, files: list[NDArray[np.integer]], document: int, start: int, stop: int | None
    ) -> NDArray[np.integer]:
        begin, end = int(self.offsets[document]), int(self.offsets[document + 1])
        shard = int(np.searchsorted(self._shard_starts, begin, side="right")) - 1
        base = begin - int(self._shard_starts[shard])
        length = end - begin
        return files[shard][base + start : base + (length if stop is None else min(stop, length))]
