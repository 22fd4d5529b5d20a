"""Words of a column of texts, straight from Arrow's bytes.

A word is found as in Unicode Standard Annex 29, without dictionaries: a run of letters, marks and digits, joined over a
single apostrophe, full stop or middle dot between two letters (don't, U.S), a full stop or comma between two digits
(3.14), and underscores. Each Han, Hiragana and Katakana character is a word of its own; scripts without spaces that
need a dictionary (Thai, Lao, Khmer) give one word a run. Punctuation and symbols are no words.
"""

import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit
from numpy.typing import NDArray

# Classes of characters. Those from LETTER to IDEOGRAPH begin a word.
SPACE, SYMBOL, MARK, LETTER, DIGIT, IDEOGRAPH = range(6)
_JOINS_LETTERS, _JOINS_DIGITS, _JOINS_BOTH, _CONNECTOR = 16, 32, 48, 64
TERMINAL = 128
"""Set beside the class of a mark that may end a sentence, in any script."""
_KIND, _JOINS = 15, 112
"""Which bits hold the class, and which say what a symbol may join."""

_INNER = {_JOINS_LETTERS: "·‧՟״", _JOINS_DIGITS: ",;٫٬", _JOINS_BOTH: "'.‘’․﹒＇．"}
_IDEOGRAPHS = (
    *((0x3005, 0x3007), (0x3021, 0x3029), (0x3031, 0x3035), (0x3038, 0x303C), (0x3041, 0x3096), (0x309D, 0x309F)),
    *((0x30A1, 0x30FA), (0x30FC, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)),
    *((0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F), (0x20000, 0x3FFFD)),
)
# Unicode's property Sentence_Terminal (PropList.txt), which `unicodedata` lacks.
_SENTENCE_TERMINALS = """
21 2E 3F 589 61D-61F 6D4 700-702 7F9 837 839 83D-83E 964-965 104A-104B 1362 1367-1368 166E 1735-1736 17D4-17D5
1803 1809 1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B 1B5E-1B5F 1B7D-1B7F 1C3B-1C3C 1C7E-1C7F 2024 203C-203D
2047-2049 2CF9-2CFB 2E2E 2E3C 2E53-2E54 2E60-2E61 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F
A9C8-A9C9 AA5D-AA5F AAF0-AAF1 ABEB FE12 FE15-FE16 FE52 FE56-FE57 FF01 FF0E FF1F FF61 10A56-10A57 10F55-10F59
10F86-10F89 11047-11048 110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C 112A9
113D4-113D5 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 11946 11A42-11A43 11A9B-11A9C
11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 16B44 16D6E-16D6F 16E98 1BC9F 1DA88
"""
_UNASSIGNED = range(0x40000, 0xE0000)
_ZERO_WIDTH_SPACE = 0x200B
_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)

Bytes = NDArray[np.uint8]
Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Words:
    """Words of a column of texts: word w of document d is bytes [starts[w], ends[w]) of `data`."""

    data: Bytes
    """The Arrow column's bytes."""
    starts: Positions
    ends: Positions
    documents: Positions
    """Document d has words [documents[d], documents[d+1])."""


def text_buffers(texts: pa.Array | pa.ChunkedArray) -> tuple[Bytes, Positions]:
    """UTF-8 bytes of a string column, and where each text begins in them (one more number than texts: the end).

    Nothing is copied if the column is one chunk without nulls; a null counts as an empty text. The bytes are read-only,
    whatever their origin, so that numba compiles a kernel once.
    """
    chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
    pieces = [_chunk_buffers(chunk) for chunk in chunks if len(chunk)]
    if len(pieces) == 1:
        data, offsets = pieces[0]
    else:
        pieces.append((np.zeros(0, np.uint8), np.zeros(1, np.int64)))
        lengths = [np.diff(offsets) for _, offsets in pieces]
        data = np.concatenate([piece[offsets[0] : offsets[-1]] for piece, offsets in pieces])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
    data.flags.writeable = False
    return data, offsets


def _chunk_buffers(chunk: pa.Array) -> tuple[Bytes, Positions]:
    if chunk.type not in (pa.string(), pa.large_string()):
        chunk = chunk.cast(pa.large_string())
    if chunk.null_count:
        chunk = pc.fill_null(chunk, "")
    _, offsets, data = chunk.buffers()
    width: Any = np.int32 if chunk.type == pa.string() else np.int64
    positions = np.frombuffer(offsets, width)[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
    return np.frombuffer(data or b"", np.uint8), positions


@cache
def character_classes() -> Bytes:
    """Class of each code point in the four lower bits, and `TERMINAL`."""
    classes = np.zeros(0x110000, np.uint8)
    category = unicodedata.category
    of_category = {"L": LETTER, "N": DIGIT, "M": MARK, "P": SYMBOL, "S": SYMBOL, "Z": SPACE, "C": SPACE}
    for code in range(0x110000):
        if code in _UNASSIGNED:
            continue
        name = category(chr(code))
        classes[code] = MARK if name == "Cf" else of_category[name[0]] | (_CONNECTOR if name == "Pc" else 0)
    for first, last in _IDEOGRAPHS:
        letters = (classes[first : last + 1] == LETTER) | (classes[first : last + 1] == DIGIT)
        classes[first : last + 1][letters] = IDEOGRAPH
    for join, characters in _INNER.items():
        classes[[ord(character) for character in characters]] = SYMBOL | join
    classes[_ZERO_WIDTH_SPACE] = SPACE
    for span in _SENTENCE_TERMINALS.split():
        begin, _, end = span.partition("-")
        classes[int(begin, 16) : int(end or begin, 16) + 1] |= TERMINAL
    return classes


@cache
def folded_characters() -> NDArray[np.uint32]:
    """Each code point's simple lower case; 0 for every decimal digit of any script."""
    folded = np.arange(0x110000, dtype=np.uint32)
    for code in range(0x20000):
        character = chr(code)
        lower = character.lower()
        if len(lower) == 1 and lower != character:
            folded[code] = ord(lower)
        elif character.isdecimal():
            folded[code] = ord("0")
    return folded


@njit(cache=True, nogil=True, inline="always")
def decode(data: Bytes, at: int) -> tuple[int, int]:
    """The code point whose UTF-8 form begins at `at`, and its length in bytes."""
    first = int(data[at])
    if first < 0x80:
        return first, 1
    if first < 0xE0:
        return (first & 0x1F) << 6 | (data[at + 1] & 0x3F), 2
    if first < 0xF0:
        return (first & 0x0F) << 12 | (data[at + 1] & 0x3F) << 6 | (data[at + 2] & 0x3F), 3
    upper = (first & 0x07) << 18 | (data[at + 1] & 0x3F) << 12
    return upper | (data[at + 2] & 0x3F) << 6 | (data[at + 3] & 0x3F), 4


@njit(cache=True, nogil=True)
def next_word(data: Bytes, at: int, end: int, classes: Bytes) -> tuple[int, int]:
    """Start and end of the first word in bytes [at, end), or (end, end)."""
    while at < end:
        code, size = decode(data, at)
        kind = classes[code] & _KIND
        if LETTER <= kind <= DIGIT:
            return at, _end_of_run(data, at + size, end, classes, kind)
        if kind == IDEOGRAPH:
            stop = at + size
            while stop < end:
                code, size = decode(data, stop)
                if classes[code] & _KIND != MARK:
                    break
                stop += size
            return at, stop
        at += size
    return end, end


@njit(cache=True, nogil=True, inline="always")
def _end_of_run(data: Bytes, at: int, end: int, classes: Bytes, kind: int) -> int:
    """Where the word ends whose last character so far, before `at`, is a letter or a digit."""
    while at < end:
        code, size = decode(data, at)
        found = classes[code]
        following = found & _KIND
        if LETTER <= following <= DIGIT:
            kind = following
        elif following != MARK:
            if following != SYMBOL or not found & _JOINS:
                return at
            ahead = at + size
            next_kind = SPACE
            while ahead < end:
                code, size = decode(data, ahead)
                next_kind = classes[code] & _KIND
                if not (found & _CONNECTOR and classes[code] & _CONNECTOR):
                    break
                ahead += size
            if not LETTER <= next_kind <= DIGIT:
                return at
            join = _JOINS_LETTERS if kind == LETTER else _JOINS_DIGITS
            if not (found & _CONNECTOR or (next_kind == kind and found & join)):
                return at
            at = ahead
            kind = next_kind
        at += size
    return end


@njit(cache=True, nogil=True)
def _split(data: Bytes, offsets: Positions, classes: Bytes) -> tuple[Positions, Positions, Positions]:
    count = len(offsets) - 1
    documents = np.zeros(count + 1, np.int64)
    capacity = (offsets[count] - offsets[0]) // 5 + 16
    starts, ends = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    words = 0
    for document in range(count):
        at, end = offsets[document], offsets[document + 1]
        while True:
            start, at = next_word(data, at, end, classes)
            if start == end:
                break
            if words == capacity:
                capacity *= 2
                starts = np.concatenate((starts, np.empty(capacity - words, np.int64)))
                ends = np.concatenate((ends, np.empty(capacity - words, np.int64)))
            starts[words], ends[words] = start, at
            words += 1
        documents[document + 1] = words
    return starts[:words], ends[:words], documents


@njit(cache=True, nogil=True, inline="always")
def scramble(value: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64: every input bit moves every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@njit(cache=True, nogil=True)
def hash_bytes(data: Bytes, start: int, end: int) -> np.uint64:
    """64-bit hash of bytes [start, end), eight at a time."""
    value = np.uint64(end - start) * _MULTIPLIER
    at = start
    while at + 8 <= end:
        eight = np.uint64(0)
        for byte in range(8):
            eight |= np.uint64(data[at + byte]) << np.uint64(8 * byte)
        value = (value ^ eight) * _MULTIPLIER
        value ^= value >> np.uint64(32)
        at += 8
    rest = np.uint64(0)
    while at < end:
        rest = rest << np.uint64(8) | np.uint64(data[at])
        at += 1
    return scramble((value ^ rest) * _MULTIPLIER)


@njit(cache=True, nogil=True)
def hash_folded(data: Bytes, start: int, end: int, folded: NDArray[np.uint32]) -> np.uint64:
    """64-bit hash of the folded characters in bytes [start, end)."""
    value = _MULTIPLIER
    at = start
    while at < end:
        code, size = decode(data, at)
        value = (value ^ np.uint64(folded[code])) * _MULTIPLIER
        value ^= value >> np.uint64(32)
        at += size
    return scramble(value)


@njit(cache=True, nogil=True)
def _hash(
    data: Bytes, starts: Positions, ends: Positions, folded: NDArray[np.uint32], normalize: bool
) -> NDArray[np.uint64]:
    hashes = np.empty(len(starts), np.uint64)
    for word in range(len(starts)):
        if normalize:
            hashes[word] = hash_folded(data, starts[word], ends[word], folded)
        else:
            hashes[word] = hash_bytes(data, starts[word], ends[word])
    return hashes


def split_words(texts: pa.Array | pa.ChunkedArray) -> Words:
    """All words of a column of texts, in any chunking."""
    data, offsets = text_buffers(texts)
    starts, ends, documents = _split(data, offsets, character_classes())
    return Words(data, starts, ends, documents)


def hash_words(words: Words, *, normalize: bool = True) -> NDArray[np.uint64]:
    """64-bit hash of each word.

    Args:
        words: from `split_words`.
        normalize: hash the lower-cased characters (one to one, as Unicode's simple folding), all decimal digits as 0.
    """
    hashes: NDArray[np.uint64] = _hash(words.data, words.starts, words.ends, folded_characters(), normalize)
    return hashes
