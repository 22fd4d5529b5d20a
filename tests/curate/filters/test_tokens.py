"""Tokens as tokenizers of the Penn Treebank's kind see them, against a slow twin and spaCy."""

import re
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

STICKING = "-/@\\^|~+•"
CONTRACTION = re.compile(r"['’](?:ll|ve|re|[stdm])", re.IGNORECASE)

Split = Callable[[str], list[str]]


def kind(character: str) -> str:
    category = unicodedata.category(character)
    scripts = ("CJK", "IDEOGRAPHIC", "HANGZHOU", "VERTICAL KANA", "BOPOMOFO")
    kana = ("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "HENTAIGANA")
    name = unicodedata.name(character, "")
    if category in ("Lo", "Lm", "Nl") and (name.startswith(scripts + kana) or character in "〻〼ー"):
        return "ideograph"
    if character == "\u200b" or (category[0] in "ZC" and category != "Cf"):
        return "space"
    return {"L": "word", "N": "word", "M": "mark", "C": "mark"}.get(category[0], "symbol")


def is_word(text: str, at: int) -> bool:
    return 0 <= at < len(text) and kind(text[at]) == "word"


def is_letter(text: str, at: int) -> bool:
    return is_word(text, at) and unicodedata.category(text[at])[0] == "L"


def contraction(text: str, at: int) -> int:
    match = CONTRACTION.match(text, at)
    return match.end() if match and not is_word(text, match.end()) else at


def sticks(character: str) -> bool:
    return character in STICKING or (ord(character) > 0x7F and unicodedata.category(character) == "Sm")


def separates(text: str, at: int, ahead: int) -> bool:
    """Whether the marks [at, ahead), between two words, part them."""
    marks = text[at:ahead]
    if any(mark in "…°" or unicodedata.category(mark) == "So" for mark in marks):
        return True
    if len(marks) > 1:
        if set(marks) == {"."}:
            return True
        return (
            len(set(marks)) == 1
            and marks[0] in "-~–—"
            and (is_letter(text, ahead) or (marks[0] == "-" and not is_letter(text, at - 1)))
        )
    before, after = is_letter(text, at - 1), is_letter(text, ahead)
    if marks in ":<>=/":
        return after and is_word(text, at - 1)
    if marks in "-~–—":
        return after or (marks == "-" and not before)
    if marks == ",":
        return before and after
    if marks == ".":
        return text[at - 1] in "abcdefghijklmnopqrstuvwxyz" and text[ahead] in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    if marks in "+*^":
        return not before and not after
    return marks in "'’" and before and contraction(text, at) > at


def slow_tokens(text: str) -> list[str]:
    """For texts without combining marks inside words, where what "before" means is plain."""
    tokens, at = [], 0
    while at < len(text):
        start, found = at, kind(text[at])
        at += 1
        if found in ("space", "mark"):
            continue
        if found == "symbol":
            between = is_word(text, start - 1)
            if between and contraction(text, start) > start:
                at = contraction(text, start)
                tokens.append(text[start:at])
                continue
            if text[start] == "." or (between and text[start] in "-~–—"):
                while at < len(text) and text[at] == text[start]:
                    at += 1
            single = at == start + 1
            inside = is_word(text, at) if text[start] == "." and single else sticks(text[start])
            found = "word" if inside and not between else found
        if found != "word":
            while at < len(text) and kind(text[at]) == "mark":
                at += 1
            tokens.append(text[start:at])
            continue
        address = False
        while at < len(text):
            if kind(text[at]) == "word":
                at += 1
                continue
            if kind(text[at]) != "symbol":
                break
            ahead = at
            while ahead < len(text) and kind(text[ahead]) == "symbol":
                ahead += 1
            if not is_word(text, ahead):
                while at < ahead and sticks(text[at]):
                    at += 1
                break
            address = address or text[at:ahead] == "://"
            if not address and separates(text, at, ahead):
                break
            at = ahead
        tokens.append(text[start:at])
    return tokens


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_same_tokens_as_the_slow_twin(data: st.DataObject, tokens_of: Split) -> None:
    alphabet = st.one_of(
        st.sampled_from("aBcst'’.,:;/-–—~=<>+*^@_#()\"…•°😀 \n19é語の"),
        st.characters(exclude_categories=["Mn", "Mc", "Me", "Cf", "Cs"]),
    )
    text = data.draw(st.text(alphabet, max_size=40))
    assert tokens_of(text) == slow_tokens(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "It's a well-known dog, isn't it?",
            ["It", "'s", "a", "well", "-", "known", "dog", ",", "isn", "'t", "it", "?"],
        ),
        ("(See https://a.org/b-c?d=e.) Done.", ["(", "See", "https://a.org/b-c?d=e", ".", ")", "Done", "."]),
        (
            "C++ /usr/bin -v 3.5-4 end.Next a,b",
            ["C++", "/usr", "/", "bin", "-v", "3.5", "-", "4", "end", ".", "Next", "a", ",", "b"],
        ),
        ("wait... what -- no", ["wait", "...", "what", "--", "no"]),
        ("日本語。 cafe\u0301 👩🏽‍💻", ["日", "本", "語", "。", "cafe\u0301", "👩", "🏽‍", "💻"]),
        ("", []),
    ],
)
def test_tokens(text: str, expected: list[str], tokens_of: Split) -> None:
    assert tokens_of(text) == expected


def test_nearly_spacys_tokens_on_prose(real_data: object, tokens_of: Split) -> None:
    spacy = pytest.importorskip("spacy")
    import gzip
    import json
    from pathlib import Path

    parse = spacy.blank("en")
    assert isinstance(real_data, Path)
    with gzip.open(real_data / "corpora" / "c4_demo.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][:60]
    ours = sum(len(tokens_of(text)) for text in texts)
    theirs = sum(sum(not token.is_space for token in parse(text)) for text in texts)
    assert abs(ours - theirs) / theirs < 0.005
