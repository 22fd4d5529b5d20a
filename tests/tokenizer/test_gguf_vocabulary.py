"""Tokenizers through GGUF: the same ids as before, those of llama.cpp's own vectors, and broken vocabularies."""

from pathlib import Path

import numpy as np
import pytest

from puna.runtime.errors import InputError
from puna.runtime.gguf_file import read_gguf, write_gguf
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat_template import builtin_template
from puna.tokenizer.gguf import gguf_vocabulary
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.tokenizer_json import JsonTokenizer


def through_gguf(tokenizer: Tokenizer, folder: Path, vocab_size: int | None = None) -> Tokenizer:
    path = folder / "vocabulary.gguf"
    write_gguf(path, gguf_vocabulary(tokenizer, vocab_size or tokenizer.vocab_size), [], [])
    return load_tokenizer(path)


def vectors(folder: Path, name: str) -> list[tuple[str, list[int]]]:
    texts = (folder / f"{name}.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"{name}.gguf.out").read_text().split("\n")
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "sentencepiece_json"])
def test_trained_here(name, request, tmp_path, corpus):
    tokenizer = request.getfixturevalue(name)
    tokenizer.chat_template = builtin_template("llama3")
    back = through_gguf(tokenizer, tmp_path, tokenizer.vocab_size + 12)
    assert back.hash == tokenizer.hash
    assert back.special_tokens == tokenizer.special_tokens
    assert (back.bos_id, back.eos_id, back.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert back.stop_ids == tokenizer.stop_ids
    assert back.chat_template == tokenizer.chat_template
    assert back.vocab_size == tokenizer.vocab_size
    for text in [*corpus[:50], "", " ", "  a", "<s>", "<|eot_id|>"]:
        assert back.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("source", "name", "special"),
    [
        ("llama2/tokenizer.model", "ggml-vocab-llama-spm", {"<s>": 1, "</s>": 2}),
        ("llama3/tokenizer.model", "ggml-vocab-llama-bpe", {"<|begin_of_text|>": 128_000, "<|eot_id|>": 128_009}),
    ],
)
def test_published_vocabularies_give_llama_cpps_vectors(real_data, tmp_path, source, name, special):
    original = load_tokenizer(real_data / "tokenizers" / source)
    back = through_gguf(original, tmp_path)
    if "llama2" in source:  # of the other it takes long; test_trained_here has that kind
        assert back.hash == original.hash
    assert special.items() <= back.special_tokens.items()
    cases = vectors(real_data / "tokenizer_vectors", name)
    assert len(cases) == 47
    for text, ids in cases:
        assert back.encode(text) == ids


def test_llama_cpps_own_file(real_data):
    tokenizer = load_tokenizer(real_data / "tokenizers" / "gguf" / "ggml-vocab-llama-spm.gguf")
    for text, ids in vectors(real_data / "tokenizer_vectors", "ggml-vocab-llama-spm"):
        assert tokenizer.encode(text) == ids
    assert tokenizer.hash == load_tokenizer(real_data / "tokenizers" / "llama2" / "tokenizer.model").hash
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_qwen(real_data, tmp_path, corpus):
    original = load_tokenizer(real_data / "tokenizers" / "qwen" / "qwen.tiktoken")
    back = through_gguf(original, tmp_path, 151_936)
    assert (back.vocab_size, back.bos_id, back.eos_id) == (original.vocab_size, None, original.eos_id)
    for text in [*corpus[:50], "12345 678", "e\u0301"]:
        assert back.encode(text) == original.encode(text)
    assert back.stop_ids == original.stop_ids


def test_user_defined_tokens_are_found_in_text(byte_level, tmp_path):
    library = JsonTokenizer(byte_level.to_library().to_str()).to_library()
    library.add_tokens(["<note>"])
    original = JsonTokenizer(library.to_str())
    back = through_gguf(original, tmp_path)
    assert "<note>" not in back.special_tokens
    assert back.encode("a<note>b") == original.encode("a<note>b")
    assert original.vocab_size - 1 in back.encode("a<note>b")


def test_a_model_without_a_tokenizer(tmp_path):
    write_gguf(tmp_path / "x.gguf", {}, [], [])
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "bert", "of the kind 'bert'"),
        ("model", 3, "of type str"),
        ("pre", "tekken", "cuts text as 'tekken'"),
        ("tokens", ["a", "a"], "do not match"),
        ("tokens", np.array([1, 2], np.int32), "no list of tokens"),
        ("token_type", np.array([1], np.int32), "do not match"),
        ("merges", ["a"], "not of two tokens"),
        ("merges", ["qqqqqq q"], "cannot be used"),
        ("bos_token_id", 2**31, "bos_token_id is 2147483648"),
        ("eos_token_id", "x", "of type int"),
    ],
)
def test_broken_vocabularies(byte_level, tmp_path, key, value, message):
    metadata = gguf_vocabulary(byte_level, byte_level.vocab_size) | {f"tokenizer.ggml.{key}": value}
    write_gguf(tmp_path / "x.gguf", metadata, [], [])
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path / "x.gguf")


@pytest.mark.parametrize("token", ["", "x" * 5000, "<s>"])
def test_tokens_that_no_vocabulary_has(sentencepiece, tmp_path, token):
    metadata = gguf_vocabulary(sentencepiece, sentencepiece.vocab_size)
    metadata["tokenizer.ggml.tokens"][400] = token
    write_gguf(tmp_path / "x.gguf", metadata, [], [])
    with pytest.raises(InputError, match=r"empty, or longer|are equal"):
        load_tokenizer(tmp_path / "x.gguf")


def test_unequal_merges_have_no_scores(sentencepiece, tmp_path):
    import json

    parts = json.loads(sentencepiece.to_library().to_str())
    parts["model"]["merges"] = parts["model"]["merges"][::2]
    with pytest.raises(InputError, match="merges pieces otherwise than SentencePiece"):
        gguf_vocabulary(JsonTokenizer(json.dumps(parts)), sentencepiece.vocab_size)


def test_scores_are_a_sentencepiece_models(sentencepiece, tmp_path):
    """What llama.cpp merges by: better for pieces that are merged earlier."""
    write_gguf(tmp_path / "x.gguf", gguf_vocabulary(sentencepiece, sentencepiece.vocab_size), [], [])
    metadata = read_gguf(tmp_path / "x.gguf").metadata
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"].tolist(), strict=True))
    processor = sentencepiece._processor
    merged = [piece for piece in scores if len(piece) > 1 and not piece.startswith("<")]
    by_model = sorted(merged, key=lambda piece: processor.get_score(processor.piece_to_id(piece)))
    assert sorted(merged, key=scores.__getitem__) == by_model
