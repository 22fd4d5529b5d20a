"""Tokens as people read them: pieces of characters put together, pieces of words too if wanted."""

import codecs
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puna.tokenizer.base import Tokenizer

Join = Literal["words", "pieces"]

_ZERO_WIDTH_JOINER = "\u200d"


@dataclass(frozen=True, slots=True)
class Unit:
    """Neighbouring tokens that are shown as one."""

    text: str
    """What is read; the name of a special token."""
    start: int
    """The first of its tokens; `stop` is the one after the last."""
    stop: int
    special: bool
    """Whether it is a special token, which no reader wrote."""


def readable_units(tokenizer: Tokenizer, ids: Sequence[int], join: Join) -> list[Unit]:
    """All tokens in order, put together where that is needed to read them.

    Args:
        join: "pieces" puts together only tokens that share a character; "words" also letters and digits that stand
            side by side, other than Chinese, Japanese and Korean ones, and the blank before a word.
    """
    units: list[Unit] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, start = "", 0
    for at, token_id in enumerate(ids):
        special = token_id in tokenizer.special_ids
        if special:
            text += decoder.decode(b"", final=True)
            if text:
                units.append(Unit(text, start, at, special=False))
            units.append(Unit(tokenizer.token_bytes(token_id).decode("utf-8", "replace"), at, at + 1, special=True))
            text, start = "", at + 1
            continue
        text += decoder.decode(tokenizer.token_bytes(token_id))
        if not decoder.getstate()[0]:
            units.append(Unit(text, start, at + 1, special=False))
            text, start = "", at + 1
    text += decoder.decode(b"", final=True)
    if start < len(ids):
        units.append(Unit(text, start, len(ids), special=False))
    return _words(units) if join == "words" else units


def _words(units: Sequence[Unit]) -> list[Unit]:
    words: list[Unit] = []
    for unit in units:
        if words and not words[-1].special and not unit.special and _belong(words[-1].text, unit.text):
            before = words.pop()
            unit = Unit(before.text + unit.text, before.start, unit.stop, special=False)
        words.append(unit)
    return words


def _belong(before: str, after: str) -> bool:
    if not before or not after:
        return True
    left, right = before[-1], after[0]
    if before.isspace():
        return not right.isspace()
    if unicodedata.category(right).startswith("M") or _ZERO_WIDTH_JOINER in (left, right):
        return True
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in (left, right))
    return left.isalnum() and right.isalnum() and not wide
