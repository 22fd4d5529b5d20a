"""The word kernel against a slow twin that asks Python about every character."""

import unicodedata
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.batches.words import (
    DIGIT,
    IDEOGRAPH,
    LETTER,
    MARK,
    SPACE,
    SYMBOL,
    Words,
    character_classes,
    hash_words,
    split_words,
    text_buffers,
)

LETTERS_ONLY, DIGITS_ONLY, EITHER = "·‧՟״", ",;٫٬", "'.‘’․﹒＇．"
INTERESTING = "aZé'’.,;·_-…!#•  \n\t\u200b\u200d\u0301\ufe0f0१½本語のテーㇰ〇々ไทยि한😀👩🏽𠀀𝟙ß İ\u0000\u00ad"
TEXTS = st.lists(
    st.text(st.one_of(st.sampled_from(INTERESTING), st.characters(exclude_categories=["Cs"])), max_size=40), max_size=6
)


def is_ideograph(character: str) -> bool:
    scripts = ("CJK", "IDEOGRAPHIC", "HANGZHOU", "VERTICAL KANA", "BOPOMOFO")
    kana = ("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "HENTAIGANA")
    wordlike = unicodedata.category(character) in ("Lo", "Lm", "Nl")
    return wordlike and (unicodedata.name(character, "").startswith(scripts + kana) or character in "〻〼ー")


def kind(character: str) -> str:
    if character == "\u200b":
        return "space"
    category = unicodedata.category(character)
    if category == "Cf" or category[0] == "M":
        return "mark"
    if category[0] in "ZC":
        return "space"
    if category[0] in "PS":
        return "symbol"
    if is_ideograph(character):
        return "ideograph"
    return "letter" if category[0] == "L" else "digit"


def slow_words(text: str) -> list[str]:
    words, at = [], 0
    while at < len(text):
        start, found = at, kind(text[at])
        at += 1
        if found in ("letter", "digit"):
            while at < len(text):
                following, ahead = kind(text[at]), at + 1
                if following == "mark":
                    at += 1
                    continue
                if following == "symbol":
                    connector = unicodedata.category(text[at]) == "Pc"
                    allowed = connector or text[at] in EITHER + (LETTERS_ONLY if found == "letter" else DIGITS_ONLY)
                    while connector and ahead < len(text) and unicodedata.category(text[ahead]) == "Pc":
                        ahead += 1
                    following = kind(text[ahead]) if allowed and ahead < len(text) else "space"
                    ahead += 1
                    if not connector and following != found:
                        break
                if following not in ("letter", "digit"):
                    break
                at, found = ahead, following
        elif found == "ideograph":
            while at < len(text) and kind(text[at]) == "mark":
                at += 1
        else:
            continue
        words.append(text[start:at])
    return words


def words_of(words: Words) -> list[list[str]]:
    spans = [bytes(words.data[start:end]).decode() for start, end in zip(words.starts, words.ends, strict=True)]
    return [spans[first:last] for first, last in zip(words.documents[:-1], words.documents[1:], strict=True)]


@given(TEXTS)
@settings(deadline=None, max_examples=400)
def test_same_words_as_the_slow_twin(texts: list[str]) -> None:
    found = words_of(split_words(pa.array(texts, pa.string())))
    assert found == [slow_words(text) for text in texts]


def test_class_of_every_character() -> None:
    kinds = {"space": SPACE, "symbol": SYMBOL, "mark": MARK, "letter": LETTER, "digit": DIGIT, "ideograph": IDEOGRAPH}
    codes = [*range(0x3FFFE), *range(0xE0000, 0xE01F0)]
    expected = np.array([kinds[kind(chr(code))] for code in codes])
    assert np.flatnonzero(character_classes()[codes] & 15 != expected).tolist() == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't say U.S.A., 3.14 or 1,000!", ["Don't", "say", "U.S.A", "3.14", "or", "1,000"]),
        ("foo__bar __init__ a-b", ["foo__bar", "init", "a", "b"]),
        ("日本語 한국어 ไทย", ["日", "本", "語", "한국어", "ไทย"]),
        ("cafe\u0301 naïve पानी", ["cafe\u0301", "naïve", "पानी"]),
        ("😀 👩🏽‍💻 …", []),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words_of(split_words(pa.array([text]))) == [expected]


def test_any_chunking_slice_null_and_type_gives_the_same_buffers() -> None:
    texts = ["one", "", "zwei drei", "四", None, "five"]
    plain = pa.array(texts)
    for column in (
        plain,
        pa.array([*["front"], *texts, "back"]).slice(1, 6),
        pa.chunked_array([plain.slice(0, 2), plain.slice(2, 0), plain.slice(2)]),
        plain.cast(pa.large_string()),
        plain.cast(pa.string_view()),
    ):
        data, offsets = text_buffers(column)
        found = [bytes(data[a:b]).decode() for a, b in pairwise(offsets)]
        assert found == [text or "" for text in texts]
    assert text_buffers(pa.chunked_array([], pa.string()))[1].tolist() == [0]


def test_normalized_hashes_ignore_case_and_digits() -> None:
    column = pa.array(["Straße ÉTÉ 2024 x", "straße été 1999 y"])
    words = split_words(column)
    first, second = np.split(hash_words(words), 2)
    assert (first == second).tolist() == [True, True, True, False]
    first, second = np.split(hash_words(words, normalize=False), 2)
    assert not (first == second).any()


@given(st.lists(st.text(max_size=12), unique=True, min_size=1, max_size=30))
@settings(deadline=None)
def test_different_words_have_different_hashes(texts: list[str]) -> None:
    data, offsets = text_buffers(pa.array(texts, pa.string()))
    words = Words(data, offsets[:-1], offsets[1:], np.array([0, len(texts)]))
    assert len(set(hash_words(words, normalize=False).tolist())) == len(texts)
