"""Words and marks of a text, about as tokenizers of the Penn Treebank's kind part them (spaCy, NLTK).

Filters whose published limits were set with such tokenizers count in these; everything else counts in
`puna.batches.words`. At the ends of what white space parts, every mark is a token of its own, but for runs of full
stops and for marks that stick to their word (-x, /usr, C++, user@). Inside, marks are part of the word but for those
that separate: hyphens, slashes, colons and the like before a letter, commas and capitals behind a full stop, operators
between digits. It's two: it, 's. Addresses with :// are one. Each Han, Hiragana and Katakana character is one.
"""

import unicodedata
from functools import cache

import numpy as np
from numba import njit

from puna.batches.words import DIGIT, LETTER, MARK, SYMBOL, Bytes, character_classes, decode
from puna.curate.filters.lines import last_character

_PLAIN, _ICON, _LINK, _DASH, _COMMA, _STOP, _OPERATOR = range(7)
_STICKY = 8
_SEPARATORS = {"…°": _ICON, ":<>=/": _LINK, "-~–—": _DASH, ",": _COMMA, ".": _STOP, "+*^": _OPERATOR}
_STICKING = "-/@\\^|~+•"


@cache
def mark_kinds() -> Bytes:
    """How each mark parts words: one of the numbers above, with `_STICKY` set or not; 0 for what is no mark."""
    kinds = np.zeros(0x110000, np.uint8)
    for code in np.flatnonzero(character_classes() & 15 == SYMBOL):
        category = unicodedata.category(chr(code))
        if category == "So":
            kinds[code] = _ICON
        elif category == "Sm" and code > 0x7F:
            kinds[code] = _STICKY
    for characters, kind in _SEPARATORS.items():
        kinds[[ord(character) for character in characters]] = kind
    kinds[[ord(character) for character in _STICKING]] |= _STICKY
    return kinds


@njit(cache=True, nogil=True)
def next_token(data: Bytes, first: int, at: int, end: int, classes: Bytes, marks: Bytes) -> tuple[int, int]:
    """Start and end of the first token in bytes [at, end) of a text that begins at `first`, or (end, end).

    `at` is `first`, or where the last token ended.
    """
    while at < end:
        code, size = decode(data, at)
        kind = classes[code] & 15
        if LETTER <= kind <= DIGIT:
            after = at + size
            while after < end and data[after] < 0x80 and LETTER <= classes[data[after]] <= DIGIT:
                after += 1
            if after == end or data[after] == 0x20:
                return at, after
            return at, _end_of_token(data, after, end, classes, marks)
        if kind >= SYMBOL and kind != MARK:
            after = at + size
            separates = at > first and kind == SYMBOL and _is_word(data, last_character(data, at), classes)
            if separates and (code == 0x27 or code == 0x2019):
                contraction = _behind_contraction(data, at, size, end, classes)
                if contraction > at:
                    return at, contraction
            if code == 0x2E or (separates and marks[code] & 7 == _DASH):
                while after < end and decode(data, after)[0] == code:
                    after += size
            if code == 0x2E and after == at + 1 and not separates:
                sticks = after < end and _is_word(data, after, classes)
            else:
                sticks = marks[code] & _STICKY and not separates
            if sticks:
                return at, _end_of_token(data, after, end, classes, marks)
            return at, _behind_marks(data, after, end, classes)
        at += size
    return end, end


@njit(cache=True, nogil=True, inline="always")
def _is_word(data: Bytes, at: int, classes: Bytes) -> bool:
    """Whether a letter or a digit begins at `at`."""
    return bool(LETTER <= classes[decode(data, at)[0]] & 15 <= DIGIT)


@njit(cache=True, nogil=True, inline="always")
def _behind_marks(data: Bytes, at: int, end: int, classes: Bytes) -> int:
    """Past combining marks and joiners."""
    while at < end:
        code, size = decode(data, at)
        if classes[code] & 15 != MARK:
            break
        at += size
    return at


@njit(cache=True, nogil=True)
def _behind_contraction(data: Bytes, at: int, size: int, end: int, classes: Bytes) -> int:
    """Where 's, 't, 'd, 'm, 'll, 've or 're ends whose apostrophe is at `at`; `at` if there is none."""
    first = at + size
    if first >= end:
        return at
    letter = data[first] | 0x20
    after = first + 1
    if letter == 0x6C or letter == 0x76 or letter == 0x72:
        if after >= end or data[after] | 0x20 != (0x6C if letter == 0x6C else 0x65):
            return at
        after += 1
    elif not (letter == 0x73 or letter == 0x74 or letter == 0x64 or letter == 0x6D):
        return at
    return at if after < end and _is_word(data, after, classes) else after


@njit(cache=True, nogil=True)
def _end_of_token(data: Bytes, at: int, end: int, classes: Bytes, marks: Bytes) -> int:
    """Where the token ends of which all before `at` is known to be part."""
    before, address = decode(data, last_character(data, at))[0], False
    while at < end:
        code, size = decode(data, at)
        kind = classes[code] & 15
        if LETTER <= kind <= DIGIT:
            before = code
        elif kind == SYMBOL:
            ahead, icons = at, False
            following, width = code, size
            while ahead < end and not LETTER <= kind <= DIGIT:
                if kind != SYMBOL and kind != MARK:
                    break
                icons = icons or marks[following] & 7 == _ICON
                ahead += width
                if ahead < end:
                    following, width = decode(data, ahead)
                    kind = classes[following] & 15
            if ahead >= end or (not LETTER <= kind <= DIGIT):
                # Marks at the end: those that stick are part of the word, up to the first that does not.
                while at < ahead and marks[code] & _STICKY:
                    at += size
                    if at < end:
                        code, size = decode(data, at)
                return at
            address = address or (code == 0x3A and ahead == at + 3 and data[at + 1] == 0x2F and data[at + 2] == 0x2F)
            if not address and (icons or _separates(data, at, size, ahead, end, classes, marks, before, following)):
                return at
            at, before, size = ahead, following, width
        elif kind != MARK:
            return at
        at += size
    return end


@njit(cache=True, nogil=True, inline="always")
def _separates(
    data: Bytes, at: int, size: int, ahead: int, end: int, classes: Bytes, marks: Bytes, before: int, following: int
) -> bool:
    """Whether marks [at, ahead) between the characters `before` and `following` part two tokens."""
    code = decode(data, at)[0]
    kind = marks[code] & 7
    count = (ahead - at) // size
    if count > 1:
        # Only a run of one dash or of full stops parts tokens.
        if kind != _DASH and kind != _STOP:
            return False
        for place in range(at, ahead, size):
            if decode(data, place)[0] != code:
                return False
        if kind == _STOP:
            return True
    is_letter, was_letter = classes[following] & 15 == LETTER, classes[before] & 15 == LETTER
    if kind == _LINK:
        return bool(is_letter and LETTER <= classes[before] & 15 <= DIGIT)
    if kind == _DASH:
        return bool(is_letter or (code == 0x2D and not was_letter))
    if kind == _COMMA:
        return bool(is_letter and was_letter)
    if kind == _STOP:
        return 0x61 <= before <= 0x7A and 0x41 <= following <= 0x5A
    if kind == _OPERATOR:
        return not is_letter and not was_letter
    return (code == 0x27 or code == 0x2019) and was_letter and _behind_contraction(data, at, size, end, classes) > at
