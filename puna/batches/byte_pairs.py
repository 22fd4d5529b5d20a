"""Byte-level BPE many times faster than the libraries, with the same ids: for tokenising whole corpora.

Two things make it fast. Text is cut into words by a hand-written equivalent of Llama 3's regular expression, over UTF-8
bytes; and a word that was met before is looked up instead of merged again. What cannot be told for certain (characters
that this Python's Unicode tables do not know, words of thousands of bytes) is left to the library, so the ids are those
of `puna.tokenizer.base.Tokenizer.encode` for every text.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numba import njit
from numpy.typing import NDArray

from puna.tokenizer.base import Tokenizer
from puna.tokenizer.pieces import unicode_to_byte
from puna.tokenizer.tiktoken_ranks import LLAMA3_PATTERN, QWEN_PATTERN

_OTHER, _LETTER, _NUMBER, _BLANK, _NEWLINE, _UNKNOWN = range(6)
"""Classes of characters; _BLANK is white space but for CR and LF."""

_MAX_WORD_BYTES = 2000
"""Longer words go to the library."""
_MAX_RUN_BYTES = 25_000
"""So do texts with longer stretches without a blank, which `TiktokenTokenizer` cuts."""
_MAX_CACHED_BYTES = 64
_SPARE_WORDS = 2**19
"""Words that the cache has room for besides the vocabulary; when it is full it is emptied."""

Bytes = NDArray[np.uint8]
Ids = NDArray[np.int32]
Longs = NDArray[np.int64]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class BytePairs:
    """A byte-level BPE vocabulary in arrays, cheap to send to another process."""

    byte_ids: Ids
    """The id of each single byte."""
    pairs: Hashes
    """Open-addressing table: left id * 2**32 + right id + 1, or 0."""
    merges: Longs
    """Beside it: rank of the merge * 2**32 + id of the result."""
    words: Bytes
    """The bytes of the tokens that are taken whole, without merging, one after another."""
    word_ends: Longs
    """Where each of them ends."""
    word_ids: Ids
    """Their ids."""
    max_digits: int
    """Longest run of digits in a word."""

    def save(self, path: Path) -> None:
        """Write to a .npz file, for other processes."""
        np.savez(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "BytePairs":
        """The inverse of `save`."""
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files} | {"max_digits": int(arrays["max_digits"])})


def byte_pairs(tokenizer: Tokenizer) -> BytePairs | None:
    """The tables of a tokenizer, or None if it is no byte-level BPE that cuts text as Llama 3 or Qwen does."""
    parts = json.loads(tokenizer.to_library().to_str())
    model, cut = parts["model"], parts["pre_tokenizer"] or {}
    steps = cut.get("pretokenizers", [])
    patterns = {LLAMA3_PATTERN: 3, QWEN_PATTERN: 1}
    if not (
        model["type"] == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and parts["normalizer"] is None
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and steps[0]["pattern"].get("Regex") in patterns
        and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
        and not steps[1]["add_prefix_space"]
        and not steps[1]["use_regex"]
    ):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    from_unicode = unicode_to_byte()
    single = {from_unicode[text]: i for text, i in vocabulary.items() if len(text) == 1 and text in from_unicode}
    if len(single) < 256:
        return None
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    left = np.array([vocabulary[a] for a, _ in merges], dtype=np.uint64)
    right = np.array([vocabulary[b] for _, b in merges], dtype=np.uint64)
    result = np.array([vocabulary[a + b] for a, b in merges], dtype=np.int64)
    size = 2 ** max(4, (2 * len(merges)).bit_length())
    pairs, values = np.zeros(size, np.uint64), np.zeros(size, np.int64)
    _fill_pairs(pairs, values, left << np.uint64(32) | right, result)
    whole = [text for text in vocabulary if set(text) <= from_unicode.keys()] if model.get("ignore_merges") else []
    spelled = [bytes(from_unicode[character] for character in text) for text in whole]
    return BytePairs(
        np.array([single[byte] for byte in range(256)], dtype=np.int32),
        pairs,
        values,
        np.frombuffer(b"".join(spelled), dtype=np.uint8),
        np.cumsum([len(word) for word in spelled], dtype=np.int64),
        np.array([vocabulary[text] for text in whole], dtype=np.int32),
        patterns[steps[0]["pattern"]["Regex"]],
    )


class BytePairEncoder:
    """Encodes texts by the tables of a vocabulary. It remembers words, which changes its speed and nothing else."""

    def __init__(self, tables: BytePairs) -> None:
        self._tables = tables
        base = len(tables.word_ids)
        capacity = base + _SPARE_WORDS
        self._slots = np.full(2 ** (2 * capacity).bit_length(), -1, np.int32)
        self._words = np.empty(len(tables.words) + 16 * _SPARE_WORDS, np.uint8)
        self._word_ends = np.zeros(capacity + 1, np.int64)
        self._ids = np.empty(base + 8 * _SPARE_WORDS, np.int32)
        self._id_ends = np.zeros(capacity + 1, np.int64)
        self._words[: len(tables.words)] = tables.words
        self._word_ends[1 : base + 1] = tables.word_ends
        self._ids[:base] = tables.word_ids
        self._id_ends[1 : base + 1] = np.arange(1, base + 1)
        self._used = np.array([base], np.int64)
        _index_words(self._slots, self._words, self._word_ends, base)

    def encode(self, texts: Sequence[bytes]) -> tuple[Ids, Longs]:
        """Ids of UTF-8 texts one after another, and how many each has: -1 for a text that is left to the library."""
        data = np.frombuffer(b"".join(texts), dtype=np.uint8)
        ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
        ids, lengths = np.empty(len(data), np.int32), np.empty(len(texts), np.int64)
        tables = self._tables
        used = _encode(
            data,
            ends,
            character_classes(),
            tables.max_digits,
            tables.byte_ids,
            tables.pairs,
            tables.merges,
            len(tables.word_ids),
            self._slots,
            self._words,
            self._word_ends,
            self._ids,
            self._id_ends,
            self._used,
            ids,
            lengths,
        )
        return ids[:used], lengths


@cache
def character_classes() -> Bytes:
    """The class of every code point. Categories do not change once assigned; what is not, may be in a library's."""
    classes = np.full(0x110000, _UNKNOWN, np.uint8)
    classes[0xE000:0xF900] = classes[0xF0000:] = _OTHER  # private use
    for point in (*range(0xD800), *range(0xF900, 0x34000), *range(0xE0000, 0xE0200)):
        category = unicodedata.category(chr(point))
        if category != "Cn":
            classes[point] = {"L": _LETTER, "N": _NUMBER, "Z": _BLANK}.get(category[0], _OTHER)
    classes[[0x09, 0x0B, 0x0C, 0x85]] = _BLANK
    classes[[0x0A, 0x0D]] = _NEWLINE
    classes[0x1C:0x20] = _UNKNOWN  # white space to Python, not to Unicode
    return classes


@njit(cache=True, nogil=True)
def _fill_pairs(pairs: Hashes, values: Longs, keys: Hashes, results: Longs) -> None:
    mask = np.uint64(len(pairs) - 1)
    for rank in range(len(keys)):
        key = keys[rank] + np.uint64(1)
        slot = _scatter(key) & mask
        while pairs[slot] != 0 and pairs[slot] != key:
            slot = (slot + np.uint64(1)) & mask
        if pairs[slot] == 0:  # of two merges of the same pair the first counts
            pairs[slot] = key
            values[slot] = (rank << 32) | results[rank]


@njit(cache=True, nogil=True)
def _scatter(key: np.uint64) -> np.uint64:
    mixed = key * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(29))


@njit(cache=True, nogil=True)
def _hash(data: Bytes, start: int, stop: int) -> np.uint64:
    """FNV-1a, scattered."""
    value = np.uint64(0xCBF29CE484222325)
    for at in range(start, stop):
        value = (value ^ np.uint64(data[at])) * np.uint64(0x100000001B3)
    return value ^ (value >> np.uint64(32))


@njit(cache=True, nogil=True)
def _index_words(slots: Ids, words: Bytes, word_ends: Longs, count: int) -> None:
    slots[:] = -1
    mask = np.uint64(len(slots) - 1)
    for word in range(count):
        slot = _hash(words, word_ends[word], word_ends[word + 1]) & mask
        while slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = word


@njit(cache=True, nogil=True)
def _character(data: Bytes, at: int, classes: Bytes) -> tuple[int, int]:
    """(class, end) of the character at `at`."""
    first = data[at]
    if first < 0x80:
        return classes[first], at + 1
    if first < 0xE0:
        return classes[((first & 0x1F) << 6) | (data[at + 1] & 0x3F)], at + 2
    if first < 0xF0:
        point = ((first & 0x0F) << 12) | ((data[at + 1] & 0x3F) << 6) | (data[at + 2] & 0x3F)
        return classes[point], at + 3
    point = ((first & 0x07) << 18) | ((data[at + 1] & 0x3F) << 12) | ((data[at + 2] & 0x3F) << 6)
    return classes[point | (data[at + 3] & 0x3F)], at + 4


@njit(cache=True, nogil=True)
def _run(data: Bytes, at: int, end: int, classes: Bytes, wanted: int) -> int:
    """Where the run of characters of one class that begins at `at` ends; there may be none."""
    while at < end:
        kind, after = _character(data, at, classes)
        if kind != wanted:
            break
        at = after
    return at


@njit(cache=True, nogil=True)
def _contraction(data: Bytes, at: int, end: int) -> int:
    """Where 's, 't, 're, 've, 'm, 'll or 'd, in either case, ends that begins at `at`; `at` if there is none."""
    if at + 1 >= end:
        return at
    letter = data[at + 1] | 0x20
    if letter in (ord("s"), ord("t"), ord("m"), ord("d")) and data[at + 1] < 0x80:
        return at + 2
    if at + 2 >= end:
        return at
    if data[at + 1] == 0xC5 and data[at + 2] == 0xBF:  # the long s, whose upper case is S
        return at + 3
    second = data[at + 2] | 0x20
    if (letter == ord("r") or letter == ord("v")) and second == ord("e"):
        return at + 3
    return at + 3 if letter == ord("l") and second == ord("l") else at


@njit(cache=True, nogil=True)
def _word_end(data: Bytes, at: int, end: int, classes: Bytes, max_digits: int) -> int:
    """Where the word that begins at `at` ends; -1 if an unknown character is in the way.

    The alternatives of `LLAMA3_PATTERN`, in their order.
    """
    kind, after = _character(data, at, classes)
    if data[at] == ord("'"):
        contracted = _contraction(data, at, end)
        if contracted > at:
            return contracted
    next_kind, next_after = _character(data, after, classes) if after < end else (-1, after)
    if kind == _UNKNOWN or next_kind == _UNKNOWN:
        return -1
    if kind == _LETTER:
        return _run(data, after, end, classes, _LETTER)
    if kind in (_OTHER, _BLANK) and next_kind == _LETTER:
        return _run(data, next_after, end, classes, _LETTER)
    if kind == _NUMBER:
        for _ in range(max_digits - 1):
            if after >= end:
                break
            next_kind, next_after = _character(data, after, classes)
            if next_kind != _NUMBER:
                break
            after = next_after
        return after
    if kind == _OTHER or (data[at] == ord(" ") and next_kind == _OTHER):
        after = _run(data, after, end, classes, _OTHER)
        while after < end and (data[after] == 0x0A or data[after] == 0x0D):
            after += 1
        return after
    # White space: up to its last line end; or all of it at the end of the text; or all but the last character.
    last_newline, last = -1, at
    stop = at
    while stop < end:
        kind, after = _character(data, stop, classes)
        if kind != _BLANK and kind != _NEWLINE:
            break
        if kind == _NEWLINE:
            last_newline = after
        last = stop
        stop = after
    if last_newline >= 0:
        return last_newline
    if stop < end and kind == _UNKNOWN:
        return -1
    return stop if stop == end or last == at else last


@njit(cache=True, nogil=True)
def _merge(
    data: Bytes, start: int, stop: int, byte_ids: Ids, pairs: Hashes, merges: Longs, symbols: Ids, ranks: Longs
) -> int:
    """Byte-pair encode one word into `symbols`: the lowest rank first, the leftmost of equals; return how many."""
    count = stop - start
    for place in range(count):
        symbols[place] = byte_ids[data[start + place]]
    for place in range(count - 1):
        ranks[place] = _merge_of(symbols[place], symbols[place + 1], pairs, merges)
    while count > 1:
        best = 0
        for place in range(1, count - 1):
            if ranks[place] < ranks[best]:
                best = place
        if ranks[best] == np.iinfo(np.int64).max:
            break
        symbols[best] = ranks[best] & 0xFFFFFFFF
        count -= 1
        for place in range(best + 1, count):
            symbols[place] = symbols[place + 1]
        for place in range(best + 1, count - 1):
            ranks[place] = ranks[place + 1]
        if best > 0:
            ranks[best - 1] = _merge_of(symbols[best - 1], symbols[best], pairs, merges)
        if best < count - 1:
            ranks[best] = _merge_of(symbols[best], symbols[best + 1], pairs, merges)
    return count


@njit(cache=True, nogil=True)
def _merge_of(left: int, right: int, pairs: Hashes, merges: Longs) -> int:
    """Rank * 2**32 + result of merging two symbols, or the largest number."""
    key = ((np.uint64(left) << np.uint64(32)) | np.uint64(right)) + np.uint64(1)
    mask = np.uint64(len(pairs) - 1)
    slot = _scatter(key) & mask
    while pairs[slot] != 0:
        if pairs[slot] == key:
            return int(merges[slot])
        slot = (slot + np.uint64(1)) & mask
    return np.iinfo(np.int64).max


@njit(cache=True, nogil=True)
def _is_left_to_the_library(data: Bytes, start: int, stop: int) -> bool:
    """Whether some stretch without ASCII white space is so long that a library may cut it."""
    blank = start
    for at in range(start, stop):
        if data[at] <= 0x20 and (data[at] == 0x20 or 9 <= data[at] <= 13):
            blank = at
        elif at - blank >= _MAX_RUN_BYTES:
            return True
    return False


@njit(cache=True, nogil=True)
def _encode(
    data: Bytes,
    ends: Longs,
    classes: Bytes,
    max_digits: int,
    byte_ids: Ids,
    pairs: Hashes,
    merges: Longs,
    num_base_words: int,
    slots: Ids,
    words: Bytes,
    word_ends: Longs,
    word_ids: Ids,
    id_ends: Longs,
    used: Longs,
    ids: Ids,
    lengths: Longs,
) -> int:
    """Encode every text into `ids`, and how many each has into `lengths`; return how many there are in all."""
    symbols, ranks = np.empty(_MAX_WORD_BYTES, np.int32), np.empty(_MAX_WORD_BYTES, np.int64)
    mask = np.uint64(len(slots) - 1)
    begin = written = 0
    for text in range(len(ends)):
        end = ends[text]
        first = written
        at = begin
        begin = end
        if _is_left_to_the_library(data, at, end):
            lengths[text] = -1
            continue
        while at < end:
            stop = _word_end(data, at, end, classes, max_digits)
            if stop < 0 or stop - at > _MAX_WORD_BYTES:
                break
            slot = _hash(data, at, stop) & mask
            while slots[slot] >= 0:
                word = slots[slot]
                if word_ends[word + 1] - word_ends[word] == stop - at:
                    same = 0
                    while same < stop - at and words[word_ends[word] + same] == data[at + same]:
                        same += 1
                    if same == stop - at:
                        break
                slot = (slot + np.uint64(1)) & mask
            word = slots[slot]
            if word >= 0:
                for place in range(id_ends[word], id_ends[word + 1]):
                    ids[written] = word_ids[place]
                    written += 1
            else:
                count = _merge(data, at, stop, byte_ids, pairs, merges, symbols, ranks)
                for place in range(count):
                    ids[written + place] = symbols[place]
                written += count
                if stop - at <= _MAX_CACHED_BYTES:
                    word = used[0]
                    if (
                        word + 1 >= len(word_ends)
                        or word_ends[word] + stop - at > len(words)
                        or id_ends[word] + count > len(word_ids)
                    ):
                        used[0] = num_base_words
                        _index_words(slots, words, word_ends, num_base_words)
                    else:
                        words[word_ends[word] : word_ends[word] + stop - at] = data[at:stop]
                        word_ends[word + 1] = word_ends[word] + stop - at
                        word_ids[id_ends[word] : id_ends[word] + count] = symbols[:count]
                        id_ends[word + 1] = id_ends[word] + count
                        slots[slot] = word
                        used[0] = word + 1
            at = stop
        if at < end:
            written = first
            lengths[text] = -1
        else:
            lengths[text] = written - first
    return int(written)
