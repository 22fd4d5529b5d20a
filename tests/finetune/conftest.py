"""A tiny base model with a tokenizer, trained once for all tests of the folder."""

from pathlib import Path

import pytest

from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.files import write_jsonl
from puna.tokenizer.chat_template import builtin_template
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer
from puna.weights.load import save_model


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with random weights, a byte-level BPE of 300 ids, and a chat template."""
    folder = tmp_path_factory.mktemp("base")
    words = "the llama walks to a good bad city in Peru and sleeps while the herd of Lima eats hay"
    write_jsonl(folder / "docs.jsonl", ({"id": str(n), "text": f"{n} {words} " * 4} for n in range(20)))
    train_tokenizer(TokenizerConfig(documents=folder / "docs.jsonl", output=folder / "tok", vocab_size=300))
    tokenizer = load_tokenizer(folder / "tok")
    tokenizer.chat_template = builtin_template("llama3")
    model = Transformer(
        LlamaConfig(
            vocab_size=320,
            dim=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            hidden_dim=64,
            context_length=128,
        )
    )
    initialize(model, seed=0)
    save_model(model, folder / "model", tokenizer=tokenizer)
    return folder / "model"
