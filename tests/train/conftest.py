"""A model and data small enough to train in a second."""

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

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


@pytest.fixture(scope="session")
def elastic() -> ModuleType:
    """The module elastic.py, under the name that pickles know it by."""
    spec = importlib.util.spec_from_file_location("elastic", Path(__file__).with_name("elastic.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["elastic"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def survive(elastic: ModuleType) -> Iterator[Callable[[Any], Any]]:
    """Run an `elastic.Job` on processes of its own; what comes back is an `elastic.Outcome`."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    command = [sys.executable, "-c", "import elastic; elastic.serve()"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert server.stdin is not None
    assert server.stdout is not None
    jobs, outcomes = server.stdin, server.stdout

    def run(job: Any) -> Any:
        pickle.dump(job, jobs)
        jobs.flush()
        return pickle.load(outcomes)

    yield run
    jobs.close()
    server.wait()
    outcomes.close()


@pytest.fixture(autouse=True)
def deterministic() -> None:
    torch.manual_seed(0)
