"""A training of a second: two folders of token shards and a model of a few thousand parameters."""

from pathlib import Path

import numpy as np
import pytest

from puna.batches.shards import ShardWriter
from puna.model.config import LlamaConfig
from puna.pretrain.main import PretrainConfig
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer
from puna.train.config import ScheduleConfig, TrainConfig


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    write_jsonl(tmp_path / "d.jsonl", [{"id": str(n), "text": f"llama {n} alpaca {n * 7} " * 9} for n in range(50)])
    train_tokenizer(TokenizerConfig(documents=tmp_path / "d.jsonl", output=tmp_path / "tokenizer", vocab_size=270))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    generator = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name, tokenizer.vocab_size) as writer:
            for number in range(60):
                writer.add(generator.integers(0, 256, 30).tolist(), f"{name}{number}", 30)
        Manifest("tokenize", {}, {}, writer.results(tokenizer.hash)).write(tmp_path / name)
    return PretrainConfig(
        tokens=tmp_path / "a",
        tokenizer=tmp_path / "tokenizer",
        output=tmp_path / "out",
        model=LlamaConfig(vocab_size=320, dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, hidden_dim=24),
        train=TrainConfig(
            steps=8,
            batch_rows=4,
            micro_batch_rows=4,
            row_length=32,
            log_every=1,
            checkpoint_every=2,
            device="cpu",
            num_threads=1,
            tensorboard=False,
            schedule=ScheduleConfig(warmup_steps=1),
        ),
    )
