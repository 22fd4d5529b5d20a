"""Small models and a tokenizer whose tokens are bytes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.model.config import LlamaConfig
from puna.model.depths import Depths, gate_layers
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat_template import builtin_template
from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer
from puna.weights.load import save_model

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
TINY = LlamaConfig(
    vocab_size=260,
    dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    context_length=256,
)


def byte_tokenizer() -> Tokenizer:
    ranks = {bytes([i]): i for i in range(256)}
    tokenizer = TiktokenTokenizer(ranks, "llama3", {name: 256 + i for i, name in enumerate(SPECIAL)})
    tokenizer.chat_template = builtin_template("chatml")
    return tokenizer


class Reciter(Transformer):
    """Goes on from a prompt of one token with `script`, whatever its weights are."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(TINY)
        initialize(self, seed=0)
        self.script = torch.tensor(script)

    def forward(self, ids_BT: Any, positions_BT: Any = None, attend: Any = None, head: Any = None) -> Any:
        next_BT = self.script[positions_BT.clamp(max=len(self.script) - 1)]
        logits_BTV = torch.nn.functional.one_hot(next_BT, self.config.vocab_size).float() * 50
        return logits_BTV if head is None else head(logits_BTV, torch.nn.Identity())


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model() -> Transformer:
    """Grouped-query attention, random weights."""
    model = Transformer(TINY)
    initialize(model, seed=1)
    # Spread the logits, so that greedy choices are no near-ties.
    model.output.weight.data *= 4
    return model.eval()


@pytest.fixture(scope="session")
def gated_model() -> Transformer:
    """A mixture of depths with a plain layer between two gated ones."""
    model = Transformer(replace(TINY, num_layers=3))
    initialize(model, seed=1)
    gate_layers(model, Depths((0, 2), 0.5), seed=0)
    return model.eval()


@pytest.fixture
def engine(model: Transformer, tokenizer: Tokenizer) -> Engine:
    return Engine(model, tokenizer, EngineConfig(max_rows=3, max_context=64))


@pytest.fixture
def reciting(tokenizer: Tokenizer) -> Callable[[bytes | list[int]], Engine]:
    return lambda script: Engine(Reciter(list(script)), tokenizer, EngineConfig(max_rows=2))


@pytest.fixture(scope="session")
def model_directory(model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, directory, tokenizer=tokenizer)
    return directory
