"""Every backend: text to ids and back, special tokens, streaming."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.runtime.errors import InputError
from puna.tokenizer import tiktoken_ranks
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.convert import byte_level_ranks
from puna.tokenizer.stream import StreamDecoder
from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer
from puna.tokenizer.tokenizer_json import JsonTokenizer

TEXTS = [
    "",
    " ",
    "hello",
    " hello",
    "  two",
    "a\n\n\tb",
    "你好 🦙🏔️",
    "é\u0301",
    "don't 12345",
    "▁",
    "\x00\x7f",
    "x" * 300,
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(every: Tokenizer, text: str) -> None:
    if "▁" in text and every.prefix != "never":
        pytest.skip("SentencePiece spells the blank by this character")
    if text.startswith(" ") and every.prefix == "first":
        pytest.skip("Metaspace puts no blank before a blank, so one is lost")
    assert every.decode(every.encode(text)) == text
    assert every.decode(every.encode(text, continuation=True)) == (
        text.removeprefix(" ") if every.prefix != "never" else text
    )


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_round_trip_of_any_text(byte_level: Tokenizer, ranks: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    assert byte_level.decode(byte_level.encode(text)) == text
    assert ranks.encode(text) == byte_level.encode(text)
    assert sentencepiece.decode(sentencepiece.encode(text)) == text.replace("▁", " ")


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ahel o\n\t12<>你🦙é")))
def test_formats_agree(
    byte_level: Tokenizer,
    ranks: Tokenizer,
    sentencepiece: Tokenizer,
    sentencepiece_json: Tokenizer,
    metaspace: Tokenizer,
    text: str,
) -> None:
    assert ranks.encode(text) == byte_level.encode(text)
    for continuation in (False, True):
        expected = sentencepiece.encode(text, continuation=continuation)
        assert sentencepiece_json.encode(text, continuation=continuation) == expected
    assert metaspace.encode(text, continuation=True) == expected


def test_batch_equals_one_by_one(every: Tokenizer, corpus: list[str]) -> None:
    texts = [*corpus[:20], *TEXTS, "lone \ud800 surrogate"]
    assert every.encode_batch(texts) == [every.encode(text) for text in texts]


def test_lone_surrogates_are_replaced_and_pairs_joined(every: Tokenizer) -> None:
    assert every.decode(every.encode("a\ud800b")) == "a\ufffdb"
    assert every.decode(every.encode("\ud83e\udd99")) == "🦙"


def test_special_tokens_only_where_allowed(every: Tokenizer) -> None:
    assert every.bos_id is not None
    assert every.eos_id is not None
    names = {i: name for name, i in every.special_tokens.items()}
    bos, eos = names[every.bos_id], names[every.eos_id]
    text = f"{bos}hello{eos} there"
    assert every.special_ids.isdisjoint(every.encode(text))
    assert every.decode(every.encode(text)) == text
    only_bos = every.encode(text, allowed_special={bos})
    assert [i for i in only_bos if i in every.special_ids] == [every.bos_id]
    both = every.encode(text, allowed_special="all")
    assert [i for i in both if i in every.special_ids] == [every.bos_id, every.eos_id]
    assert every.decode(both) == text
    assert every.decode(only_bos) == text
    assert every.decode(both, skip_special=True) in ("hello there", "hello  there")
    with pytest.raises(InputError, match="<nonsense>"):
        every.encode("x", allowed_special=["<nonsense>"])


def test_attributes(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    special = byte_level.special_tokens
    assert byte_level.vocab_size == 500
    assert sorted(special.values()) == list(range(492, 500))
    assert byte_level.bos_id == special["<|begin_of_text|>"] == 492
    assert byte_level.pad_id == special["<|finetune_right_pad_id|>"]
    assert byte_level.stop_ids == {special[name] for name in ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")}
    assert (sentencepiece.bos_id, sentencepiece.eos_id, sentencepiece.pad_id) == (1, 2, 2)
    assert sentencepiece.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert sentencepiece.stop_ids == {2}


@pytest.mark.parametrize("token_id", [-1, 500, 10**9])
def test_ids_out_of_range_are_named(every: Tokenizer, token_id: int) -> None:
    with pytest.raises(InputError, match=str(token_id)):
        every.decode([token_id])
    with pytest.raises(InputError, match=str(token_id)):
        every.token_bytes(token_id)


def test_token_bytes_spell_the_text(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    text = "hello 你好 🦙\n"
    assert b"".join(map(byte_level.token_bytes, byte_level.encode(text))) == text.encode()
    assert b"".join(map(sentencepiece.token_bytes, sentencepiece.encode(text))) == b" " + text.encode()


def test_invalid_utf8_becomes_replacement_characters(byte_level: Tokenizer) -> None:
    first_byte = byte_level.encode("🦙", continuation=True)[:1]
    assert byte_level.decode([*first_byte, *byte_level.encode("x")]).endswith("x")
    assert "\ufffd" in byte_level.decode(first_byte) or byte_level.decode(first_byte) == "🦙"


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 499), max_size=40), skip=st.booleans())
def test_stream_equals_decode_for_any_ids(every: Tokenizer, ids: list[int], skip: bool) -> None:
    """Against a slow twin: all bytes at once, the dummy blank taken off at each beginning."""
    stream = StreamDecoder(every, skip_special=skip)
    streamed = "".join(map(stream.push, ids)) + stream.flush()
    assert streamed == every.decode(ids, skip_special=skip)

    content = b""
    fresh = every.prefix != "never"
    for i in ids:
        if i in every.special_ids:
            content += b"" if skip else every.token_bytes(i)
            fresh = fresh if skip else every.prefix == "always" or (every.prefix == "first" and fresh)
        else:
            piece = every.token_bytes(i)
            content += piece[1:] if fresh and piece[:1] == b" " else piece
            fresh = False
    assert streamed == content.decode(errors="replace")


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_stream_never_shows_half_a_character(every: Tokenizer, text: str) -> None:
    stream = StreamDecoder(every)
    parts = [stream.push(i) for i in every.encode(text)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)
    assert stream.flush() == ""


def cut_as_meta_does(text: str, max_run: int) -> list[str]:
    """Character by character: a run of blanks, or of other characters, is cut after every `max_run` of them."""
    parts = [""]
    run, blank = 0, None
    for char in text:
        run = run + 1 if char.isspace() == blank else 1
        blank = char.isspace()
        if run > max_run:
            parts.append("")
            run = 1
        parts[-1] += char
    return parts


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab \n\t\u3000é"), min_size=1, max_size=40))
def test_long_texts_are_cut_as_meta_does(ranks: Tokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_ranks, "_MAX_RUN", 3)
        parts = cut_as_meta_does(text, 3)
        assert list(tiktoken_ranks._bounded(text)) == parts
        whole = ranks.encode(text)
        assert ranks.encode_batch([text, "x"])[0] == whole
    assert whole == [i for part in parts for i in ranks.encode(part)]


@pytest.mark.parametrize("unit", [" ", "a"])
def test_very_long_runs(ranks: Tokenizer, unit: str) -> None:
    text = "x" + unit * 1_000_000
    assert ranks.decode(ranks.encode(text)) == text


def test_qwen_prepares_text_otherwise(ranks: Tokenizer, byte_level: Tokenizer) -> None:
    qwen = TiktokenTokenizer(byte_level_ranks(byte_level), "qwen", {"<|endoftext|>": 492, "<|im_end|>": 493})
    converted = JsonTokenizer(qwen.to_library().to_str())
    assert qwen.encode("e\u0301") == qwen.encode("é") != ranks.encode("e\u0301")
    assert [qwen.decode([i]) for i in qwen.encode("2024")] == ["2", "0", "2", "4"]
    for text in ("2024 cafe\u0301 don't", "<|endoftext|>"):
        assert converted.encode(text) == qwen.encode(text) == qwen.encode_batch([text])[0]
    assert qwen.bos_id is None
    assert qwen.eos_id == qwen.pad_id == 492
    assert qwen.stop_ids == {492, 493}


def test_stream_waits_for_the_whole_character(byte_level: Tokenizer) -> None:
    single_bytes = {byte_level.token_bytes(i): i for i in range(256)}
    stream = StreamDecoder(byte_level)
    assert [stream.push(single_bytes[bytes([byte])]) for byte in "é你".encode()] == ["", "é", "", "", "你"]
    stream.push(single_bytes[b"\xe4"])
    assert stream.flush() == "\ufffd"
