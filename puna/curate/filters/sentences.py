"""How many sentences a text has, without a model."""

from numba import njit

from puna.batches.words import MARK, SYMBOL, TERMINAL, Bytes, decode
from puna.curate.filters.lines import last_character
from puna.curate.filters.tokens import next_token


@njit(cache=True, nogil=True)
def count_sentences(data: Bytes, first: int, end: int, classes: Bytes, marks: Bytes) -> int:
    """Sentences in bytes [first, end).

    A sentence begins with a word behind a mark that may end one (Unicode's Sentence_Terminal) and whatever other marks
    follow that. A full stop behind a single capital (an initial) ends none, nor does an ellipsis. The same rule as
    spaCy's `sentencizer`, without its list of abbreviations.
    """
    sentences, ended = 1, False
    at = first
    while True:
        start, at = next_token(data, first, at, end, classes, marks)
        if start == end:
            return sentences if first < end else 0
        code, size = decode(data, start)
        if classes[code] & 15 != SYMBOL or classes[decode(data, last_character(data, at))[0]] & 15 > MARK:
            sentences += ended
            ended = False
        elif classes[code] & TERMINAL and at == start + size:
            ended = ended or code != 0x2E or not _is_initial(data, first, start)


@njit(cache=True, nogil=True)
def _is_initial(data: Bytes, first: int, stop: int) -> bool:
    """Whether a single ASCII capital stands before a full stop at `stop`."""
    if stop == first or not 0x41 <= data[stop - 1] <= 0x5A:
        return False
    return stop - 1 == first or not 0x41 <= data[last_character(data, stop - 1)] <= 0x5A
