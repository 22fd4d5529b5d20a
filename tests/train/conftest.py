"""A model and data small enough to train in a second."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from puna.batches.packing import PackedRows
from puna.batches.shards import ShardWriter, TokenShards
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.manifest import Manifest

VOCAB = 61


@pytest.fixture
def tiny_model() -> Callable[[int], Transformer]:
    def build(seed: int = 0) -> Transformer:
        model = Transformer(
            LlamaConfig(
                vocab_size=VOCAB,
                dim=32,
                num_layers=2,
                num_heads=4,
                num_kv_heads=2,
                head_dim=8,
                hidden_dim=48,
                context_length=32,
            )
        )
        initialize(model, seed)
        return model

    return build


@pytest.fixture
def tiny_rows(tmp_path: Path) -> PackedRows:
    folder = tmp_path / "tokens"
    folder.mkdir()
    generator = np.random.default_rng(0)
    with ShardWriter(folder, VOCAB) as writer:
        for number in range(40):
            start, step = generator.integers(VOCAB), generator.integers(1, 4)
            ids = [int((start + step * t) % VOCAB) for t in range(generator.integers(5, 40))]
            writer.add(ids, str(number), len(ids))
    Manifest("tokenize", {}, {}, writer.results("hash")).write(folder)
    return PackedRows(TokenShards(folder), 16, 0, "cut")


@pytest.fixture(autouse=True)
def deterministic() -> None:
    torch.manual_seed(0)
