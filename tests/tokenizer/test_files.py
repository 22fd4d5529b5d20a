"""Loading, saving, converting, training."""

import gzip
import io
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat_template import builtin_template
from puna.tokenizer.convert import byte_level_ranks, read_llama2c_tokenizer, sentencepiece_to_library
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.sentencepiece_model import SentencePieceTokenizer
from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer, format_ranks, parse_ranks
from puna.tokenizer.tokenizer_json import JsonTokenizer
from puna.tokenizer.train import (
    SPECIAL_TOKENS,
    TokenizerConfig,
    main,
    train_byte_level_bpe,
    train_sentencepiece_bpe,
)


def test_import_is_light() -> None:
    code = (
        "import sys, puna.tokenizer; assert not {'torch', 'tokenizers', 'jinja2'} & set(sys.modules);"
        "import puna.tokenizer.chat, puna.tokenizer.load, puna.tokenizer.train;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Saving, and loading what was saved


def test_saved_directory_is_the_same_tokenizer(
    every: Tokenizer, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(every, "chat_template", "{{ messages[0]['content'] }}")
    (tmp_path / "chat_template.jinja").write_text("a stale template")
    every.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in [*corpus[:30], "<s>x</s><|eot_id|>y"]:
        assert again.encode(text) == every.encode(text)
        assert again.encode(text, continuation=True) == every.encode(text, continuation=True)
        assert again.encode(text, allowed_special="all") == every.encode(text, allowed_special="all")
    assert again.hash == every.hash
    for attribute in ("vocab_size", "special_tokens", "bos_id", "eos_id", "pad_id", "stop_ids", "chat_template"):
        assert getattr(again, attribute) == getattr(every, attribute), attribute


def test_saved_directory_loads_in_transformers(every: Tokenizer, corpus: list[str], tmp_path: Path) -> None:
    every.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    special = "".join(every.special_tokens)
    for text in [*corpus[:30], special + "hi" + special, " a", "a "]:
        assert oracle.encode(text, add_special_tokens=False) == every.encode(text, allowed_special="all")
    assert (oracle.bos_token_id, oracle.eos_token_id) == (every.bos_id, every.eos_id)
    assert oracle.chat_template == every.chat_template
    assert oracle.encode("hi") == [every.bos_id, *every.encode("hi")]
    oracle.save_pretrained(tmp_path / "by_transformers")
    assert load_tokenizer(tmp_path / "by_transformers").hash == every.hash


def test_hash_tells_tokenizers_apart(
    byte_level: Tokenizer, sentencepiece: Tokenizer, ranks: TiktokenTokenizer, sentencepiece_json: Tokenizer
) -> None:
    assert byte_level.hash != sentencepiece.hash
    assert sentencepiece.hash == sentencepiece_json.hash
    renamed = {name.replace("python", "cobra"): i for name, i in ranks.special_tokens.items()}
    assert TiktokenTokenizer(byte_level_ranks(byte_level), "llama3", renamed).hash != ranks.hash


def test_directory_prefers_json_then_model_then_tiktoken(
    byte_level: Tokenizer, sentencepiece_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.tiktoken").write_bytes(format_ranks(byte_level_ranks(byte_level)))
    with pytest.raises(InputError, match="492 ranks; known are 128000"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_directory / "tokenizer.model").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    byte_level.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), JsonTokenizer)


def test_files_beside_the_vocabulary(byte_level_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level_directory / "tokenizer.json").read_bytes())
    config = {
        "bos_token": {"content": "<|begin_of_text|>"},
        "eos_token": "<|eot_id|>",
        "pad_token": None,
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 493]}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == tokenizer.special_tokens["<|begin_of_text|>"]
    assert tokenizer.eos_id == tokenizer.pad_id == tokenizer.special_tokens["<|eot_id|>"]
    assert {5, 493} < tokenizer.stop_ids
    assert tokenizer.chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_tokenizer(tmp_path).chat_template == "J"

    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 500}')
    with pytest.raises(InputError, match="not an id below 500"):
        load_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|gone|>"}')
    with pytest.raises(InputError, match=r"no token <\|gone\|>"):
        load_tokenizer(tmp_path)


def test_named_tokens_become_special(byte_level: Tokenizer) -> None:
    """Some files leave turn ends unmarked, or the BOS out of the added tokens; text must not produce them."""
    parts = json.loads(byte_level.to_library().to_str())
    for token in parts["added_tokens"]:
        token["special"] = token["content"] == "<|begin_of_text|>"
    tokenizer = JsonTokenizer(json.dumps(parts), eos="<|python_tag|>")
    text = "<|eot_id|><|python_tag|>"
    assert {"<|eot_id|>", "<|python_tag|>", "<|begin_of_text|>"} <= tokenizer.special_tokens.keys()
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text, allowed_special="all"), skip_special=True) == ""


def test_tokens_that_swallow_blanks(byte_level: Tokenizer, tmp_path: Path) -> None:
    parts = json.loads(byte_level.to_library().to_str())
    for token in parts["added_tokens"]:
        token["rstrip"] = token["content"] == "<|eot_id|>"
        token["lstrip"] = token["content"] == "<|eom_id|>"
    tokenizer = JsonTokenizer(json.dumps(parts))
    tokenizer.save(tmp_path)
    text = "a <|eot_id|> \n b  <|eom_id|> c"
    expected = AutoTokenizer.from_pretrained(tmp_path).encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, allowed_special="all") == expected


BROKEN = {
    "empty": b"",
    "binary": bytes(range(256)) * 10,
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 499723\n",
    "other JSON": b'{"a": 1}',
    "not UTF-8": b'{"a": "\xff"}',
    "ranks with a gap": b"IQ== 0\nIg== 2\n",
    "ranks that break off": b"IQ== 0\nIg",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_broken_files(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_truncated_files(sentencepiece_directory: Path, name: str, part: float, tmp_path: Path) -> None:
    content = (sentencepiece_directory / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(InputError, match="interrupted downloads"):
        load_tokenizer(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(tmp_path / "gone")


def test_word_piece_is_refused() -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(InputError, match="byte-level BPE"):
        JsonTokenizer(library.to_str())


# --- Converters


def test_ranks_round_trip(byte_level: Tokenizer) -> None:
    ranks = byte_level_ranks(byte_level)
    assert parse_ranks(format_ranks(ranks)) == ranks
    assert len(ranks) == 492
    with pytest.raises(InputError, match="cut short"):
        parse_ranks(format_ranks(ranks)[:500])


def test_special_ids_may_have_gaps(byte_level: Tokenizer) -> None:
    tokenizer = TiktokenTokenizer(byte_level_ranks(byte_level), "llama3", {"<|eot_id|>": 495})
    converted = JsonTokenizer(tokenizer.to_library().to_str())
    assert converted.encode("hi<|eot_id|>", allowed_special=["<|eot_id|>"])[-1] == 495
    with pytest.raises(InputError, match="494"):
        tokenizer.token_bytes(494)
    with pytest.raises(InputError, match="ids that the ranks use"):
        TiktokenTokenizer(byte_level_ranks(byte_level), "llama3", {"<|eot_id|>": 5})


def test_only_byte_level_has_ranks(sentencepiece: Tokenizer, byte_level: Tokenizer) -> None:
    with pytest.raises(InputError, match="Only byte-level BPE"):
        byte_level_ranks(sentencepiece)
    parts = json.loads(byte_level.to_library().to_str())
    parts["model"]["merges"].reverse()
    with pytest.raises(InputError, match="order of its merges"):
        byte_level_ranks(JsonTokenizer(json.dumps(parts)))


def test_only_llama_like_sentencepiece_is_converted(corpus: list[str]) -> None:
    def train(**options: object) -> SentencePieceTokenizer:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus[:50]), model_writer=model, minloglevel=2, vocab_size=400, **options
        )
        return SentencePieceTokenizer(model.getvalue())

    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    with pytest.raises(InputError, match="changes the text"):
        train(model_type="bpe", hard_vocab_limit=False).to_library()
    with pytest.raises(InputError, match="not a BPE model"):
        train(model_type="unigram", hard_vocab_limit=False, **identity).to_library()
    plain = train(model_type="bpe", byte_fallback=True, add_dummy_prefix=False, hard_vocab_limit=False, **identity)
    converted = JsonTokenizer(plain.to_library().to_str())
    for text in ["hello world", " the llama", "x\ny"]:
        assert converted.encode(text) == plain.encode(text) == plain.encode(text, continuation=True)
        assert converted.decode(plain.encode(text)) == plain.decode(plain.encode(text)) == text


def test_llama2c_file(sentencepiece: Tokenizer, corpus: list[str], tmp_path: Path) -> None:
    """Written as llama2.c's tokenizer.py writes it, from our SentencePiece model."""
    model = sentencepiece.to_library().to_str()
    vocabulary = sorted(json.loads(model)["model"]["vocab"].items(), key=lambda item: item[1])
    pieces = [piece.replace("▁", " ").encode() for piece, _ in vocabulary]
    pieces[1:3] = [b"\n<s>\n", b"\n</s>\n"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) - 259)]
    content = struct.pack("<i", max(map(len, pieces)))
    for piece, score in zip(pieces, scores, strict=True):
        content += struct.pack("<fi", score, len(piece)) + piece
    file = tmp_path / "tokenizer.bin"
    file.write_bytes(content)
    tokenizer = read_llama2c_tokenizer(file)
    for text in corpus[:50]:
        assert tokenizer.encode(text) == sentencepiece.encode(text)
    for broken in (b"", content[:100], content[:-1], b"\x00" * 64):
        file.write_bytes(broken)
        with pytest.raises(InputError, match="is not a tokenizer"):
            read_llama2c_tokenizer(file)


def test_sentencepiece_merges_by_hand() -> None:
    """'aab' has better ranked 'ab' inside: a + ab, never aa + b."""
    pieces = ["<unk>", "<s>", "</s>", "ab", "aab", "aa", "▁", "a", "b"]
    library = sentencepiece_to_library(pieces, [0, 0, 0, 0, -1, -2, -3, -4, -5], bos_id=None, dummy_prefix=False)
    merges = json.loads(library.to_str())["model"]["merges"]
    assert merges == [["a", "b"], ["aa", "b"], ["a", "ab"], ["a", "a"]]
    assert library.encode("aab b").tokens == ["aab", "▁", "b"]


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from(" a\n"), max_size=60))
def test_runs_of_one_character_convert_exactly(
    sentencepiece: Tokenizer, sentencepiece_json: Tokenizer, text: str
) -> None:
    assert sentencepiece_json.encode(text) == sentencepiece.encode(text)


# --- Training


def test_byte_level_training(byte_level: Tokenizer, corpus: list[str], tmp_path: Path) -> None:
    def stream() -> Iterator[str]:
        yield from corpus

    again = train_byte_level_bpe(stream(), 500, tmp_path)
    assert again.hash == byte_level.hash
    assert [byte_level.special_tokens[name] for name in SPECIAL_TOKENS] == list(range(492, 500))
    assert byte_level.chat_template == builtin_template("llama3")
    assert len(byte_level.encode(" puna")) < 5
    assert all(len(byte_level.token_bytes(i)) > 0 for i in range(500))


def test_sentencepiece_training(
    sentencepiece: Tokenizer, sentencepiece_directory: Path, corpus: list[str], tmp_path: Path
) -> None:
    train_sentencepiece_bpe(iter(corpus), 500, tmp_path)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (sentencepiece_directory / name).read_bytes()
    assert [sentencepiece.token_bytes(i) for i in range(3, 259)] == [bytes([b]) for b in range(256)]
    pieces = [sentencepiece.token_bytes(i) for i in range(259, 500)]
    assert not [piece for piece in pieces if len(piece) > 1 and any(chr(b).isdigit() for b in piece)]
    assert [sentencepiece.decode([i]) for i in sentencepiece.encode("x2024")[-4:]] == ["2", "0", "2", "4"]
    assert sentencepiece.encode("a\n  b") != sentencepiece.encode("a b")


@pytest.mark.parametrize(
    ("kind", "template"), [("byte", "chatml"), ("sentencepiece", "chatml"), ("sentencepiece", "llama3")]
)
def test_template_tokens_join_the_vocabulary(kind: str, template: str, corpus: list[str], tmp_path: Path) -> None:
    train = train_byte_level_bpe if kind == "byte" else train_sentencepiece_bpe
    tokenizer = train(corpus, 480, tmp_path, chat_template=template)  # type: ignore[arg-type]
    wanted = {"<|im_start|>", "<|im_end|>"} if template == "chatml" else set(SPECIAL_TOKENS)
    assert wanted <= tokenizer.special_tokens.keys()
    assert tokenizer.vocab_size == 480
    assert load_tokenizer(tmp_path).hash == tokenizer.hash


@pytest.mark.parametrize("train", [train_byte_level_bpe, train_sentencepiece_bpe])
@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 300, "no text|too little text"),
        (["", ""], 300, "no text|too little text"),
        (["hello hello hello"], 5000, "set vocab_size to at most 2"),
        (["hello"], 100, "too small"),
    ],
)
def test_training_that_cannot_work(
    train: object, texts: list[str], vocab_size: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(iter(texts), vocab_size, tmp_path)  # type: ignore[operator]


def test_sentencepiece_learns_from_very_long_lines(tmp_path: Path) -> None:
    tokenizer = train_sentencepiece_bpe(["llama puna " * 200_000], 270, tmp_path)
    assert len(tokenizer.encode("llama llama")) < len("llama llama")


def test_an_error_while_reading_is_passed_on(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "hello hello"
        raise InputError("line 7 is broken")

    for train in (train_byte_level_bpe, train_sentencepiece_bpe):
        with pytest.raises(InputError, match="line 7 is broken"):
            train(texts(), 300, tmp_path)


@pytest.mark.parametrize("kind", ["byte_level_bpe", "sentencepiece_bpe"])
def test_command(kind: str, corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in corpus]
    (folder / "a.jsonl").write_text("".join(lines[:150]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("".join(lines[150:]))
    output = tmp_path / "out"
    config = TokenizerConfig(
        kind=kind,  # type: ignore[arg-type]
        vocab_size=450,
        documents=folder,
        output=output,
        chat_template="llama2",
    )
    main(config)
    printed = capsys.readouterr().err
    assert "bytes a token" in printed
    assert "450 ids" in printed
    tokenizer = load_tokenizer(output)
    assert tokenizer.vocab_size == 450
    assert tokenizer.chat_template == builtin_template("llama2")


def test_command_uses_no_more_text_than_asked(corpus: list[str], tmp_path: Path) -> None:
    documents = tmp_path / "a.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    config = TokenizerConfig(vocab_size=500, documents=documents, output=tmp_path / "out", sample_bytes=300)
    with pytest.raises(InputError, match="too little text"):
        main(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ['{"txt": 1}', '{"text": 5}', "{broken"])
@pytest.mark.parametrize("kind", ["byte_level_bpe", "sentencepiece_bpe"])
def test_command_names_the_broken_line(line: str, kind: str, tmp_path: Path) -> None:
    documents = tmp_path / "a.jsonl"
    documents.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match="line 2"):
        main(TokenizerConfig(documents=documents, output=tmp_path / "out", kind=kind))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not exist"):
        main(TokenizerConfig(documents=tmp_path / "gone", output=tmp_path / "out"))
