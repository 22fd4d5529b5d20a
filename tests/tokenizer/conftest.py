"""Tokenizers to test on: tiny ones trained here, and the published ones where there is real data."""

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from puna.tokenizer.base import Tokenizer
from puna.tokenizer.convert import byte_level_ranks
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer
from puna.tokenizer.tokenizer_json import JsonTokenizer
from puna.tokenizer.train import train_byte_level_bpe, train_sentencepiece_bpe

WORDS = """the llama grazes on the high puna where thin air and cold nights are usual and its wool grows thick she's
we'll don't def return self print hello world Über café naïve 你好 世界 再见 кот 2024 3.14 1000 <b> </b> {} [] == !=
( ) ... 🦙 🏔️"""


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """300 short made-up documents, the same at every run."""
    rng = random.Random(0)
    words = WORDS.split()
    gaps = [" "] * 12 + ["  ", "\n", "\n\n", "\t", "    "]
    return ["".join(rng.choice(words) + rng.choice(gaps) for _ in range(60)) for _ in range(300)]


@pytest.fixture(scope="session")
def byte_level_directory(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("byte_level")
    train_byte_level_bpe(corpus, 500, directory)
    return directory


@pytest.fixture(scope="session")
def sentencepiece_directory(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sentencepiece")
    train_sentencepiece_bpe(corpus, 500, directory)
    return directory


@pytest.fixture(scope="session")
def byte_level(byte_level_directory: Path) -> Tokenizer:
    return load_tokenizer(byte_level_directory)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_directory: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_directory / "tokenizer.model")


@pytest.fixture(scope="session")
def sentencepiece_json(sentencepiece_directory: Path) -> Tokenizer:
    return load_tokenizer(sentencepiece_directory / "tokenizer.json")


@pytest.fixture(scope="session")
def ranks(byte_level: Tokenizer) -> TiktokenTokenizer:
    """The byte-level tokenizer once more, through tiktoken."""
    special = byte_level.special_tokens
    tokenizer = TiktokenTokenizer(byte_level_ranks(byte_level), "llama3", special)
    tokenizer.chat_template = byte_level.chat_template
    return tokenizer


@pytest.fixture(scope="session")
def metaspace(sentencepiece: Tokenizer) -> Tokenizer:
    """The SentencePiece tokenizer in the newer spelling of tokenizer.json: blank before the first piece only."""
    import json

    parts = json.loads(sentencepiece.to_library().to_str())
    parts["normalizer"] = None
    parts["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    tokenizer = JsonTokenizer(json.dumps(parts))
    tokenizer.chat_template = sentencepiece.chat_template
    return tokenizer


@pytest.fixture(scope="session", params=["byte_level", "ranks", "sentencepiece", "sentencepiece_json", "metaspace"])
def every(request: pytest.FixtureRequest) -> Tokenizer:
    """Each backend in turn, on a tiny vocabulary."""
    tokenizer: Tokenizer = request.getfixturevalue(request.param)
    return tokenizer


@cache
def _published(path: Path) -> Tokenizer:
    return load_tokenizer(path)


@pytest.fixture
def published(real_data: Path) -> Callable[[str], Tokenizer]:
    """Loads a published tokenizer by the name of its folder: llama2, llama3, qwen."""
    return lambda name: _published(real_data / "tokenizers" / name)
