"""`puna tokenize`: documents to token shards."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.batches.shards import ShardWriter
from puna.config import to_plain
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import progress, say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer

_DOCUMENTS_A_BATCH = 256


@dataclass(frozen=True)
class TokenizeConfig:
    """Turn documents into token shards."""

    documents: Path
    """JSON Lines with a "text" and an "id" on each line (.jsonl, .jsonl.gz), or a folder of such files."""
    tokenizer: Path
    """Tokenizer file, or a folder that holds one."""
    output: Path
    """Folder to write the shards to; replaced when it exists."""
    shard_tokens: int = 2**28
    """Start a new file after this many tokens."""


def main(config: TokenizeConfig) -> None:
    """Write each document as BOS, its tokens, EOS."""
    tokenizer = load_tokenizer(config.tokenizer)
    inputs = {str(path): content_hash(path) for path in (config.documents, config.tokenizer)}
    with (
        atomic_path(config.output) as folder,
        progress("Tokenising documents", total=None) as advance,
    ):
        folder.mkdir()
        with ShardWriter(folder, tokenizer.vocab_size, config.shard_tokens) as writer:
            for ids, document in tokenize_documents(tokenizer, read_jsonl(config.documents)):
                writer.add(ids, document["id"], len(document["text"].encode()))
                advance()
        if not writer.num_tokens:
            raise InputError(f"{config.documents} holds no text, so there is nothing to tokenise.")
        Manifest("tokenize", to_plain(config), inputs, writer.results(tokenizer.hash)).write(folder)
    say(
        f"{writer.num_tokens:,} tokens from {writer.num_bytes:,} bytes "
        f"({writer.num_bytes / writer.num_tokens:.2f} bytes a token) in {config.output}"
    )


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
            if not (isinstance(document.get("text"), str) and isinstance(document.get("id"), str)):
                raise InputError(f'Every document needs a string "text" and "id"; one has {sorted(document)}.')
        batch = [document for document in batch if document["text"]]
        encoded = tokenizer.encode_batch([document["text"] for document in batch])
        yield from (([*before, *ids, *after], document) for ids, document in zip(encoded, batch, strict=True))
