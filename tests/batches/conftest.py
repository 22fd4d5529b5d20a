"""A byte tokenizer's worth of shards, without a tokenizer."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from puna.batches.shards import ShardWriter, TokenShards
from puna.runtime.manifest import Manifest

MakeShards = Callable[..., TokenShards]


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    def make(
        documents: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int]] | None = None,
        vocab_size: int = 1000,
        shard_tokens: int = 2**28,
    ) -> TokenShards:
        folder = tmp_path / f"shards{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        with ShardWriter(folder, vocab_size, shard_tokens) as writer:
            for number, ids in enumerate(documents):
                writer.add(ids, f"doc{number}", len(ids), None if masks is None else masks[number])
        Manifest("tokenize", {}, {}, writer.results("hash")).write(folder)
        return TokenShards(folder, "hash")

    return make
