"""Token shards: ids on disk, memory-mapped, with an index of documents.

Layout of a shard folder:
    ids-00000.bin ...    little-endian uint16 or uint32, documents one after another, none cut by a shard's end
    mask-00000.bin ...   uint8 beside it, 1 where a token is a training target; absent when every token is
    offsets.npy          int64, where document i starts in the concatenation of all shards; one more for the end
    documents.jsonl      id and UTF-8 length of each document's text, one a line
    puna.json            manifest: number of tokens, documents and bytes, dtype, and the tokenizer's hash
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl
from puna.runtime.manifest import Manifest


@dataclass
class ShardWriter:
    """Writes documents into an existing empty folder; use as a context manager, then write a manifest.

    Args:
        directory: where to; wrap in `atomic_path` to make it appear whole.
        vocab_size: decides between two and four bytes an id.
        shard_tokens: start a new file once one holds this many.
    """

    directory: Path
    vocab_size: int
    shard_tokens: int = 2**28
    num_tokens: int = field(default=0, init=False)
    num_bytes: int = field(default=0, init=False)
    num_targets: int = field(default=0, init=False)
    _offsets: list[int] = field(default_factory=lambda: [0], init=False)
    _shard_sizes: list[int] = field(default_factory=list, init=False)

    def __enter__(self) -> "ShardWriter":
        self._dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        self._documents = (self.directory / "documents.jsonl").open("w", encoding="utf-8")
        self._ids: BinaryIO | None = None
        self._mask: BinaryIO | None = None
        return self

    def add(self, ids: Sequence[int], document_id: str, num_bytes: int, mask: Sequence[int] | None = None) -> None:
        """Append one document; `mask` must be given for every document or for none."""
        if self._ids is None or self._shard_sizes[-1] >= self.shard_tokens:
            self._next_shard(with_mask=mask is not None)
        assert self._ids is not None
        assert (mask is None) == (self._mask is None)
        self._ids.write(np.asarray(ids, dtype=self._dtype).tobytes())
        if mask is not None and self._mask is not None:
            assert len(mask) == len(ids)
            self._mask.write(np.asarray(mask, dtype=np.uint8).tobytes())
        self._documents.write(json.dumps({"id": document_id, "bytes": num_bytes}, ensure_ascii=False) + "\n")
        self._shard_sizes[-1] += len(ids)
        self.num_tokens += len(ids)
        self.num_bytes += num_bytes
        self.num_targets += len(ids) if mask is None else sum(mask)
        self._offsets.append(self.num_tokens)

    def results(self, tokenizer_hash: str) -> dict[str, Any]:
        """What the manifest has to record for `TokenShards` to read the folder."""
        return {
            "num_tokens": self.num_tokens,
            "num_documents": len(self._offsets) - 1,
            "num_bytes": self.num_bytes,
            "num_targets": self.num_targets,
            "dtype": self._dtype.str,
            "shard_sizes": self._shard_sizes,
            "tokenizer_hash": tokenizer_hash,
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._ids, self._mask, self._documents):
            if file is not None:
                file.close()
        np.save(self.directory / "offsets.npy", np.asarray(self._offsets, dtype=np.int64))

    def _next_shard(self, with_mask: bool) -> None:
        for file in (self._ids, self._mask):
            if file is not None:
                file.close()
        number = len(self._shard_sizes)
        self._ids = (self.directory / f"ids-{number:05}.bin").open("wb")
        self._mask = (self.directory / f"mask-{number:05}.bin").open("wb") if with_mask else None
        self._shard_sizes.append(0)


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
