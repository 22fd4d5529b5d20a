"""The published Llama and Qwen tokenizers against published vectors."""

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat import render_chat
from puna.tokenizer.chat_template import builtin_template
from puna.tokenizer.convert import byte_level_ranks, read_llama2c_tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.tiktoken_ranks import LLAMA3_SPECIALS, TiktokenTokenizer, format_ranks, parse_ranks
from puna.tokenizer.tokenizer_json import JsonTokenizer

CONVERSATION = [
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": " A llama. 🦙 "},
    {"role": "user", "content": "再见"},
]
Published = Callable[[str], Tokenizer]


def conformance_vectors(folder: Path, name: str) -> list[tuple[str, list[int]]]:
    texts = (folder / f"{name}.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"{name}.gguf.out").read_text().split("\n")
    vectors = [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]
    assert len(vectors) == 47
    return vectors


@pytest.mark.parametrize(("name", "vectors"), [("llama2", "llama-spm"), ("llama3", "llama-bpe")])
def test_conformance_vectors_in_both_formats(published: Published, real_data: Path, name: str, vectors: str) -> None:
    native = published(name)
    converted = JsonTokenizer(native.to_library().to_str())
    for text, ids in conformance_vectors(real_data / "tokenizer_vectors", f"ggml-vocab-{vectors}"):
        for tokenizer in (native, converted):
            assert tokenizer.encode(text) == ids
            assert tokenizer.decode(ids) == text
        assert native.encode(text, continuation=True) == converted.encode(text, continuation=True)
    if name == "llama3":
        original = (real_data / "tokenizers/llama3/tokenizer.model").read_bytes()
        assert format_ranks(byte_level_ranks(converted)).split() == original.split()


def test_llama2_prompts(published: Published, real_data: Path) -> None:
    tokenizer = published("llama2")
    for case in json.loads((real_data / "tokenizer_vectors" / "llama2_prompts.json").read_text())["cases"]:
        assert [tokenizer.bos_id, *tokenizer.encode(case["text"])] == case["ids"]
        assert tokenizer.decode(case["ids"], skip_special=True) == case["text"]


def test_llama2_equals_the_hugging_face_file(published: Published, real_data: Path, corpus: list[str]) -> None:
    """Published vocabulary, published merges: the same ids as from the SentencePiece model and its conversion."""
    model = published("llama2")
    hugging_face = JsonTokenizer(
        gzip.decompress((real_data / "tokenizers/llama_hf/tokenizer.json.gz").read_bytes()).decode()
    )
    converted = JsonTokenizer(model.to_library().to_str())
    texts = [*corpus, "  a" * 50, " " * 33, "aaaaaaaaaaaaa", "====-----====", "\n\n\n\n"]
    texts += [text for text, _ in conformance_vectors(real_data / "tokenizer_vectors", "ggml-vocab-llama-spm")]
    for text in texts:
        expected = model.encode(text)
        assert hugging_face.encode(text) == expected
        assert converted.encode(text) == expected
    assert hugging_face.special_tokens == model.special_tokens
    published_merges = json.loads(hugging_face.to_library().to_str())["model"]["merges"]
    our_merges = json.loads(model.to_library().to_str())["model"]["merges"]
    assert {tuple(merge) for merge in our_merges} <= {tuple(merge) for merge in published_merges}


def test_llama3_meta_cases(published: Published, real_data: Path) -> None:
    tokenizer = published("llama3")
    cases = json.loads((real_data / "tokenizer_vectors" / "llama3_meta_tests.json").read_text())
    for case in cases["encode"]:
        bos, eos = [tokenizer.bos_id] * case["bos"], [tokenizer.eos_id] * case["eos"]
        assert [*bos, *tokenizer.encode(case["text"]), *eos] == case["ids"]
    for case in cases["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"]
    for name, token_id in cases["special_tokens"].items():
        assert tokenizer.special_tokens[name] == token_id
    template = builtin_template("llama3")
    for case in cases["encode_message"]:
        assert render_chat(tokenizer, [case["message"]], template=template).ids == [tokenizer.bos_id, *case["ids"]]
    for case in cases["encode_dialog_prompt"]:
        rendered = render_chat(tokenizer, case["messages"], template=template, add_generation_prompt=True)
        assert rendered.ids == case["ids"]


def test_llama3_special_tokens(published: Published, real_data: Path) -> None:
    """Beside a tokenizer_config.json its names count (here Llama 3.0's), alone Llama 3.1's."""
    beside = published("llama3")
    ranks = parse_ranks((real_data / "tokenizers/llama3/tokenizer.model").read_bytes())
    alone = TiktokenTokenizer(ranks)
    assert len(ranks) == 128_000
    assert beside.vocab_size == alone.vocab_size == 128_256
    assert len(set(LLAMA3_SPECIALS)) == 256
    same = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    assert all(beside.special_tokens[f"<|{n}|>"] == alone.special_tokens[f"<|{n}|>"] for n in same)
    assert "<|python_tag|>" not in beside.special_tokens
    # Ids in Meta's Llama 3.1 tokenizer
    assert [alone.special_tokens[f"<|{n}|>"] for n in ("finetune_right_pad_id", "eom_id", "python_tag")] == [
        128004,
        128008,
        128010,
    ]
    assert alone.special_tokens["<|reserved_special_token_247|>"] == 128_255
    assert alone.stop_ids == {128001, 128008, 128009}


def test_qwen(published: Published) -> None:
    tokenizer = published("qwen")
    assert tokenizer.special_tokens == {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
    }
    assert tokenizer.bos_id is None
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    assert len(tokenizer.encode("12345")) == 5


def test_llama2c_tokenizer(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "weights/stories260K"
    tokenizer = read_llama2c_tokenizer(folder / "tok512.bin")
    text = json.loads((folder / "expected_greedy.json").read_text())["expected_text"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    # Published prompt of llama2.c's run.c for this model
    assert tokenizer.encode("Once upon a time") == [403, 407, 261, 378]
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(text) == ids


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_saved_directory_loads_in_transformers(
    published: Published, name: str, corpus: list[str], tmp_path: Path
) -> None:
    tokenizer = published(name)
    tokenizer.save(tmp_path)
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    special = "".join(tokenizer.special_tokens)
    for text in [*corpus[:20], special + "hi" + special, "<s>a</s> b"]:
        expected = oracle.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, allowed_special="all") == expected
    assert oracle.eos_token_id == tokenizer.eos_id
    assert oracle.bos_token_id == tokenizer.bos_id
    assert oracle.encode("hi") == [
        *([] if tokenizer.bos_id is None else [tokenizer.bos_id]),
        *tokenizer.encode("hi"),
    ]
    assert len(oracle) == tokenizer.vocab_size
    template = builtin_template(name)  # type: ignore[arg-type]
    for messages in (CONVERSATION[:1], CONVERSATION[:2], CONVERSATION):
        rendered = render_chat(tokenizer, messages, template=template)
        assert rendered.ids == oracle.apply_chat_template(messages, chat_template=template, return_dict=False)
    again = load_tokenizer(tmp_path)
    assert again.special_tokens == tokenizer.special_tokens
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
@pytest.mark.parametrize("unit", [" ", "a", "é"])
def test_pathological_texts(published: Published, name: str, unit: str) -> None:
    """Meta's tokenizer cuts such texts, or tiktoken overflows its stack; here they take linear time."""
    tokenizer = published(name)
    text = unit * (1_100_000 // len(unit))
    begin = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - begin < 20
    assert tokenizer.decode(ids) == text
