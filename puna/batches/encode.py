"""Documents to token ids, in batches; what a worker process of `puna tokenize` does. Imports nothing heavy."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from puna.batches.shards import document_line
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer, well_formed
from puna.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from puna.batches.byte_pairs import BytePairEncoder

_DOCUMENTS_A_BATCH = 256
_GIANT_CHARACTERS = 400_000
"""Longer texts are encoded in pieces. `TiktokenTokenizer` would cut them here too, but in the middle of a word."""


@dataclass(frozen=True, slots=True)
class EncodedDocuments:
    """Documents as `puna.batches.shards.ShardWriter.add_many` takes them."""

    ids: NDArray[np.integer]
    """Of all of them, one after another."""
    lengths: NDArray[np.int64]
    """Tokens of each."""
    documents: bytes
    """Their lines of documents.jsonl."""
    num_bytes: int
    """UTF-8 bytes of their texts together."""


def encode_part(
    tokenizer: Path, tables: Path | None, split_by: str, documents: Sequence[dict[str, Any]]
) -> dict[str, EncodedDocuments]:
    """Encode some documents, by the value of the column `split_by`; all under "" where that is empty.

    Args:
        tokenizer: where it is.
        tables: of `puna.batches.byte_pairs`, which make it fast, where there are any.
        split_by: a column.
        documents: with "id" and "text".

    Raises:
        InputError: a document lacks a string "text" or "id", or a value in `split_by`.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for document in documents:
        _check(document)
        group = ""
        if split_by:
            if document.get(split_by) is None:
                raise InputError(
                    f"Document {document['id']!r} has no {split_by!r}, which split_by names. Leave split_by away, or "
                    "add the column."
                )
            group = str(document[split_by])
        if document["text"]:
            groups.setdefault(group, []).append(document)
    return {group: _encode_group(tokenizer, tables, rows) for group, rows in groups.items()}


def _encode_group(path: Path, tables: Path | None, documents: Sequence[dict[str, Any]]) -> EncodedDocuments:
    tokenizer = _load(path)
    texts = [well_formed(document["text"]) for document in documents]
    if tables is None:
        encoded = [ids for ids, _ in tokenize_documents(tokenizer, documents)]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        ids = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int32)
    else:
        ids, lengths = _encode_fast(tokenizer, _load_tables(tables), texts)
    lines, num_bytes = [], 0
    for document, text in zip(documents, texts, strict=True):
        facts = {"id": document["id"], "bytes": len(text.encode())}
        if document.get("source") is not None:
            facts["source"] = document["source"]
        lines.append(document_line(facts))
        num_bytes += facts["bytes"]
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    return EncodedDocuments(ids.astype(dtype), lengths, b"".join(lines), num_bytes)


def _encode_fast(
    tokenizer: Tokenizer, encoder: "BytePairEncoder", texts: Sequence[str]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """What `tokenize_documents` gives for the texts, as arrays: all ids, and how many each text has."""
    pieces = [list(_pieces(text, _GIANT_CHARACTERS)) for text in texts]
    ids, counts = encoder.encode([piece.encode() for parts in pieces for piece in parts])
    before = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype=np.int32)
    after = np.array([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype=np.int32)
    lengths = np.zeros(len(texts), dtype=np.int64)
    joined: list[NDArray[np.int32]] = []
    at = piece_number = 0
    for number, parts in enumerate(pieces):
        joined.append(before)
        for place, piece in enumerate(parts):
            count = int(counts[piece_number])
            piece_number += 1
            if count >= 0:
                joined.append(ids[at : at + count])
                at += count
            else:
                joined.append(np.array(tokenizer.encode(piece, continuation=place > 0), dtype=np.int32))
            lengths[number] += len(joined[-1])
        joined.append(after)
        lengths[number] += len(before) + len(after)
    return np.concatenate(joined), lengths


def tokenize_documents(
    tokenizer: Tokenizer, documents: Iterable[dict[str, Any]]
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield (BOS + ids + EOS, document) for each document with text in it.

    Raises:
        InputError: a document lacks a string "text" or "id".
    """
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    rest = iter(documents)
    while batch := list(itertools.islice(rest, _DOCUMENTS_A_BATCH)):
        for document in batch:
            _check(document)
        batch = [document for document in batch if document["text"]]
        usual = [document["text"] for document in batch if len(document["text"]) <= _GIANT_CHARACTERS]
        encoded = iter(tokenizer.encode_batch(usual))
        for document in batch:
            giant = len(document["text"]) > _GIANT_CHARACTERS
            ids = encode_giant(tokenizer, document["text"]) if giant else next(encoded)
            yield [*before, *ids, *after], document


def encode_giant(tokenizer: Tokenizer, text: str, piece_characters: int = _GIANT_CHARACTERS) -> list[int]:
    """Ids of a text of any length in bounded memory: libraries take some 60 bytes and more for each character.

    The text is encoded in pieces. A cut is at the beginning of a line that starts with something visible, which no
    token of Llama's tokenizers reaches across; only where a piece holds no such place (one line of millions of
    characters) it is before a blank, or anywhere, and the tokens there may differ from those of the whole text.
    """
    pieces = enumerate(_pieces(text, piece_characters))
    return [i for number, piece in pieces for i in tokenizer.encode(piece, continuation=number > 0)]


def _pieces(text: str, piece_characters: int) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = _cut(text, start, start + piece_characters)
        yield text[start:stop]
        start = stop


def _cut(text: str, start: int, limit: int) -> int:
    """Where to end a piece that begins at `start`, no later than `limit`."""
    if limit >= len(text):
        return len(text)
    stop = limit
    while (stop := text.rfind("\n", start, stop)) > start:
        if not text[stop + 1].isspace():
            return stop + 1
    blank = text.rfind(" ", start + 1, limit)
    return blank if blank > 0 and not text[blank - 1].isspace() else limit


def _check(document: dict[str, Any]) -> None:
    if not (isinstance(document.get("text"), str) and isinstance(document.get("id"), str)):
        raise InputError(f'Every document needs a string "text" and "id"; one has {sorted(document)}.')


@cache
def _load_tables(path: Path) -> "BytePairEncoder":
    from puna.batches.byte_pairs import BytePairEncoder, BytePairs

    return BytePairEncoder(BytePairs.load(path))


@cache
def _load(tokenizer: Path) -> Tokenizer:
    return load_tokenizer(tokenizer)
