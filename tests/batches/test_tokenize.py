"""`puna tokenize`: the same shards for any number of workers, after any kill, for documents of any size."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.batches import encode, tokenize
from puna.batches.encode import encode_giant, tokenize_documents
from puna.batches.shards import TokenShards
from puna.batches.tokenize import TokenizeConfig, main
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_jsonl
from puna.runtime.manifest import content_hash
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer

WORDS = [
    "llama",
    "alpaca",
    "über",
    "高原",
    "climbs",
    "the",
    "12",
    "345",
    "steep,",
    "steep",
    "path\n\n",
    "",
    "again",
    "",
]


def text_of(number: int) -> str:
    return " ".join(WORDS[(number * 7 + at * at) % len(WORDS)] for at in range(20 + number % 50))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_jsonl(folder / "d.jsonl", [{"id": str(n), "text": text_of(n)} for n in range(300)])
    train_tokenizer(TokenizerConfig(documents=folder / "d.jsonl", output=folder / "llama3", vocab_size=290))
    return folder / "llama3"


@pytest.fixture
def config(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> TokenizeConfig:
    """1000 documents of three sources, in parts of a few dozen."""
    monkeypatch.setattr(tokenize, "_PART_CHARACTERS", 6000)
    rows = [{"id": f"d{n}", "source": "abc"[n * n % 3], "text": text_of(n)} for n in range(1000)]
    rows[500]["text"] = ""
    write_jsonl(tmp_path / "documents.jsonl", rows)
    return TokenizeConfig(
        tmp_path / "documents.jsonl", tokenizer_folder, tmp_path / "out", workers=1, shard_tokens=5000
    )


def rows_of(config: TokenizeConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in config.documents.read_text().splitlines()]


def test_shards_hold_what_a_plain_loop_encodes(config: TokenizeConfig) -> None:
    main(config)
    shards = TokenShards(config.output)
    tokenizer = load_tokenizer(config.tokenizer)
    rows = [row for row in rows_of(config) if row["text"]]
    assert len(shards) == len(rows) == 999
    for number, row in enumerate(rows):
        assert shards.ids(number).tolist() == [tokenizer.bos_id, *tokenizer.encode(row["text"]), tokenizer.eos_id]
    assert shards.document_facts(500) == {
        "id": "d501",
        "bytes": len(rows[500]["text"].encode()),
        "source": rows[500]["source"],
    }
    assert shards.num_bytes == sum(len(row["text"].encode()) for row in rows)
    assert len(list(config.output.glob("ids-*.bin"))) > 2
    third = int(shards.offsets[3])
    assert shards.document_of_token(third) == (3, 0)
    assert shards.document_of_token(third - 1) == (2, third - 1 - int(shards.offsets[2]))
    with pytest.raises(InputError, match="count from 0"):
        shards.document_of_token(shards.num_tokens)


def test_any_number_of_workers_gives_the_same_bytes(config: TokenizeConfig, tmp_path: Path) -> None:
    config = replace(config, split_by="source")
    main(config)
    main(replace(config, workers=2, output=tmp_path / "two"))
    assert content_hash(tmp_path / "two" / "a") == content_hash(config.output / "a")
    facts = read_json(tmp_path / "two" / "puna.json")["results"]
    assert facts["folders"] == ["a", "b"]  # squares are never 2 modulo 3
    assert facts["num_documents"] == sum(len(TokenShards(config.output / name)) for name in "ab") == 999
    assert {TokenShards(config.output / "b").document_facts(n)["source"] for n in (0, 100)} == {"b"}


def test_parquet_gives_the_same_shards(config: TokenizeConfig, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "parquet").mkdir()
    table = pa.Table.from_pylist(rows_of(config))
    pq.write_table(table[:600], tmp_path / "parquet" / "part-00000.parquet")
    pq.write_table(table[600:], tmp_path / "parquet" / "part-00001.parquet")
    main(config)
    main(replace(config, documents=tmp_path / "parquet", output=tmp_path / "again"))
    assert content_hash(tmp_path / "again") == content_hash(config.output)


@pytest.mark.parametrize("split_by", ["", "source"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split_by: str
) -> None:
    config = replace(config, split_by=split_by)
    main(config)
    monkeypatch.setattr(tokenize, "_SECONDS_BETWEEN_CHECKPOINTS", 0)
    for stop in (2, 7):
        seen = []

        def failing(*arguments: Any, seen: list[int] = seen, stop: int = stop) -> Any:
            seen.append(len(arguments[-1]))
            if len(seen) == stop:
                raise KeyboardInterrupt
            return encode.encode_part(*arguments)

        monkeypatch.setattr(tokenize, "encode_part", failing)
        with pytest.raises(KeyboardInterrupt):
            main(replace(config, output=tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    seen = []
    monkeypatch.setattr(tokenize, "encode_part", lambda *a: seen.append(len(a[-1])) or encode.encode_part(*a))
    main(replace(config, output=tmp_path / "again"))
    assert sum(seen) < 900, "what was done before was done again"
    for name in "ab" if split_by else ".":
        assert content_hash(tmp_path / "again" / name) == content_hash(config.output / name)
    assert not list(tmp_path.glob(".again*"))


SCRIPT = """
import sys, time
from pathlib import Path
from puna.batches import tokenize, encode
tokenize._PART_CHARACTERS, tokenize._SECONDS_BETWEEN_CHECKPOINTS = 6000, 0
calls = []

def encode_some(*arguments):
    calls.append(1)
    if len(calls) > 12:
        time.sleep(600)
    return encode.encode_part(*arguments)

tokenize.encode_part = encode_some
documents, tokenizer, output = map(Path, sys.argv[1:])
tokenize.main(tokenize.TokenizeConfig(documents, tokenizer, output, workers=1, shard_tokens=5000))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(
    config: TokenizeConfig, tmp_path: Path, wait_until: Callable[[Callable[[], object]], None]
) -> None:
    main(config)
    again = tmp_path / "again"
    command = [sys.executable, "-c", SCRIPT, str(config.documents), str(config.tokenizer), str(again)]
    victim = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    state = tmp_path / ".again.unfinished" / "state.json"
    wait_until(lambda: victim.poll() is not None or (state.exists() and read_json(state)["documents_read"] > 200))
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    assert not again.exists()
    main(replace(config, output=again))
    assert content_hash(again) == content_hash(config.output)


def test_another_configuration_starts_over(
    config: TokenizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "_SECONDS_BETWEEN_CHECKPOINTS", 0)
    calls = []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode.encode_part(*arguments)

    monkeypatch.setattr(tokenize, "encode_part", failing)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    monkeypatch.setattr(tokenize, "encode_part", encode.encode_part)
    main(replace(config, split_by="source"))
    assert sum(len(TokenShards(config.output / name)) for name in "ab") == 999


@pytest.mark.parametrize(
    ("row", "split_by", "message"),
    [
        ({"id": "x", "text": 3}, "", "needs a string"),
        ({"id": "x", "text": "words"}, "language", "'x' has no 'language'"),
        ({"id": "x", "text": "words", "language": "../up"}, "language", "cannot be the name of a folder"),
        ({"id": "x", "text": ""}, "", "holds no text"),
    ],
)
def test_bad_documents_are_named(
    config: TokenizeConfig, tmp_path: Path, row: dict[str, Any], split_by: str, message: str
) -> None:
    write_jsonl(tmp_path / "bad.jsonl", [row])
    with pytest.raises(InputError, match=message):
        main(replace(config, documents=tmp_path / "bad.jsonl", split_by=split_by))
    assert not config.output.exists()


def test_lone_surrogates_are_counted_as_they_are_encoded(config: TokenizeConfig, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "x", "text": "a\\ud800b"}\n')
    main(replace(config, documents=tmp_path / "bad.jsonl"))
    assert TokenShards(config.output).num_bytes == len("a\ufffdb".encode())


LINES = st.lists(st.text(st.sampled_from("ab 1.,é\n\t'高"), max_size=12), max_size=12).map("\n".join)


@settings(max_examples=150, deadline=None)
@given(text=LINES, piece=st.integers(20, 60))
def test_giant_texts_encode_like_short_ones(tokenizer_folder: Path, text: str, piece: int) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = encode_giant(tokenizer, text, piece)
    assert tokenizer.decode(ids) == text
    if all(len(line) < piece and line and not line[0].isspace() for line in text.split("\n")):
        assert ids == tokenizer.encode(text)


def test_giant_texts_with_published_tokenizers(real_data: Path) -> None:
    text = "\n".join(f"{text_of(n)}\n    indented {n}" for n in range(200))
    for name in ("llama2", "llama3"):
        tokenizer: Tokenizer = load_tokenizer(real_data / "tokenizers" / name)
        assert encode_giant(tokenizer, text, 1000) == tokenizer.encode(text)


def test_a_giant_document_takes_its_place(config: TokenizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(config)[:30]
    tokenizer = load_tokenizer(config.tokenizer)
    usual = [ids for ids, _ in tokenize_documents(tokenizer, rows)]
    monkeypatch.setattr(encode, "_GIANT_CHARACTERS", 200)
    assert [ids for ids, _ in tokenize_documents(tokenizer, rows)] == usual
