"""The fast encoder gives the ids of the libraries, for every text; and where it cannot tell, it says so."""

import gzip
import json
import unicodedata
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from puna.batches import byte_pairs as module
from puna.batches.byte_pairs import BytePairEncoder, BytePairs, byte_pairs, character_classes
from puna.batches.encode import encode_part
from puna.runtime.files import write_jsonl
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.tiktoken_ranks import QWEN_PATTERN
from puna.tokenizer.tokenizer_json import JsonTokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer

SAMPLE = "The llama's wool isn't sold; we'll see THEY'RE\n\n  \tit — 12345 Lamas, à Ñandú 高原に住む\r\n x=f(y)  # ok\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte_pairs")
    write_jsonl(folder / "d.jsonl", [{"id": str(n), "text": SAMPLE * (1 + n % 3)} for n in range(60)])
    train_tokenizer(TokenizerConfig(documents=folder / "d.jsonl", output=folder / "tokenizer", vocab_size=336))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "tokenizer")


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> BytePairEncoder:
    return make_encoder(tokenizer)


def make_encoder(tokenizer: Tokenizer) -> BytePairEncoder:
    tables = byte_pairs(tokenizer)
    assert tables is not None
    return BytePairEncoder(tables)


def check(encoder: BytePairEncoder, tokenizer: Tokenizer, texts: list[str]) -> int:
    """Compare; return how many texts were left to the library."""
    ids, lengths = encoder.encode([text.encode() for text in texts])
    at = 0
    for text, length in zip(texts, lengths, strict=True):
        if length >= 0:
            assert ids[at : at + length].tolist() == tokenizer.encode(text), repr(text)
            at += length
    assert at == len(ids)
    return int((lengths < 0).sum())


CUT = ["'", "s", "S", "'ll", "'RE", "'ſ", "ſ", "t", "ab", "Zé", "é", "e\u0301", "高", "に", "ไทย", "0", "12", "9999"]
CUT += ["١٢٣", "½", "Ⅷ", " ", "  ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u3000", "\u2028", "\x85", "\x0b", "\x1f"]
CUT += [
    "\x00",
    "!",
    "--",
    "# ",
    ".\n",
    "🦙",
    "👩\u200d🌾",
    "\u200b",
    "\ufeff",
    "\ue000",
    "\U0010ffff",
    "\u0378",
    "_",
    "(x)",
]
"""What the regular expression tells apart."""


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from(CUT), max_size=14).map("".join))
@example("don'T DON'ſ 'ſa ''s '")
@example("a  \n b\t\tc   d \n\n ")
def test_ids_are_the_library_s(encoder: BytePairEncoder, tokenizer: Tokenizer, text: str) -> None:
    left = check(encoder, tokenizer, [text])
    if left:
        assert any(unicodedata.category(c) == "Cn" or c in "\x1c\x1d\x1e\x1f" for c in text)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(max_size=20), max_size=5))
def test_many_texts_of_any_characters(encoder: BytePairEncoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    check(encoder, tokenizer, texts)


def test_every_assigned_character_is_cut_as_the_library_cuts_it(encoder: BytePairEncoder, tokenizer: Tokenizer) -> None:
    classes = character_classes()
    assert classes[ord("a")] == classes[ord("高")] == module._LETTER
    public = classes != module._UNKNOWN
    public[0xE000:0xF900] = public[0xF0000:] = False
    known = [chr(point) for point in np.flatnonzero(public).tolist()]
    assert len(known) > 130_000
    texts = [" ".join(f"a{c}b1{c}{c}" for c in known[start : start + 500]) for start in range(0, len(known), 500)]
    assert check(encoder, tokenizer, texts) == 0


def test_the_cache_may_run_full(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SPARE_WORDS", 8)
    encoder = make_encoder(tokenizer)
    texts = [f"{SAMPLE} word{n} {'x' * n}{n * 'y'} end{n // 3}" for n in range(90)]
    check(encoder, tokenizer, texts)
    check(encoder, tokenizer, texts[::-1])


def test_what_takes_too_long_is_left_to_the_library(encoder: BytePairEncoder, tokenizer: Tokenizer) -> None:
    assert check(encoder, tokenizer, ["x" * 2001, "fine", " " * 3000 + "a", "x" * 2000]) == 2
    assert check(encoder, tokenizer, ["x1" * 13_000, "x1 " * 13_000]) == 1


def test_tables_can_be_sent(encoder: BytePairEncoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tables = byte_pairs(tokenizer)
    assert tables is not None
    tables.save(tmp_path / "tables.npz")
    again = BytePairs.load(tmp_path / "tables.npz")
    for field in fields(tables):
        assert np.array_equal(getattr(tables, field.name), getattr(again, field.name))
    check(BytePairEncoder(again), tokenizer, [SAMPLE])


def test_documents_come_out_the_same_either_way(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = byte_pairs(tokenizer)
    assert tables is not None
    tables.save(folder / "tables.npz")
    monkeypatch.setattr("puna.batches.encode._GIANT_CHARACTERS", 300)
    texts = [SAMPLE * (n % 5) + "\u0378" * (n % 2) + str(n) for n in range(20)] + ["", "\ud800 x", "y" * 2500]
    documents = [{"id": str(n), "text": text, "source": "ab"[n % 2]} for n, text in enumerate(texts)]
    slow = encode_part(folder / "tokenizer", None, "source", documents)
    fast = encode_part(folder / "tokenizer", folder / "tables.npz", "source", documents)
    assert slow.keys() == fast.keys() == {"a", "b"}
    for group in slow:
        assert np.array_equal(slow[group].ids, fast[group].ids)
        assert np.array_equal(slow[group].lengths, fast[group].lengths)
        assert slow[group].documents == fast[group].documents
        assert slow[group].num_bytes == fast[group].num_bytes
        assert fast[group].ids.dtype == np.uint16


def test_other_tokenizers_have_no_tables(tokenizer: Tokenizer) -> None:
    parts = json.loads(tokenizer.to_library().to_str())

    def changed(**values: object) -> Tokenizer:
        return JsonTokenizer(json.dumps(parts | values))

    assert byte_pairs(changed(normalizer={"type": "NFC"})) is None
    split, spell = parts["pre_tokenizer"]["pretokenizers"]
    for steps in (
        [spell],
        [split | {"pattern": {"Regex": r"\w+|\W+"}}, spell],
        [split, spell | {"add_prefix_space": True}],
        [split | {"behavior": "Removed"}, spell],
    ):
        assert byte_pairs(changed(pre_tokenizer=parts["pre_tokenizer"] | {"pretokenizers": steps})) is None
    qwen = [split | {"pattern": {"Regex": QWEN_PATTERN}}, spell]
    one_digit = changed(pre_tokenizer=parts["pre_tokenizer"] | {"pretokenizers": qwen})
    check(make_encoder(one_digit), one_digit, [SAMPLE, "1 12 123 1234 x12345"])
    merging = changed(model=parts["model"] | {"ignore_merges": False})
    check(make_encoder(merging), merging, [SAMPLE])


def test_published_vocabularies_on_75_languages(real_data: Path) -> None:
    with gzip.open(real_data / "langid" / "lingua_sentences.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    assert len(texts) == 7500
    llama3 = load_tokenizer(real_data / "tokenizers" / "llama3")
    assert check(make_encoder(llama3), llama3, texts) == 0
    assert byte_pairs(load_tokenizer(real_data / "tokenizers" / "llama2")) is None
