"""C4's rules: keep the lines of web pages that look like sentences."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from puna.batches.words import Bytes, Positions, character_classes, decode, text_buffers
from puna.curate.document import Outcome
from puna.curate.filters.lines import count_characters, is_space, next_line, strip_left, strip_right
from puna.curate.filters.phrases import Phrases, compile_phrases, find_phrases
from puna.curate.filters.reasons import first_reason, require_not_negative
from puna.curate.filters.sentences import count_sentences
from puna.curate.filters.texts import split_with_texts, texts_of
from puna.curate.filters.tokens import mark_kinds

POLICY_PHRASES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_CITATIONS = (b"[edit]", b"[citation needed]")

_PLACEHOLDER, _CURLY, _SCRIPT, _POLICY = (np.uint64(1 << group) for group in range(4))
_KEPT, _HAS_PLACEHOLDER, _HAS_CURLY, _FEW_SENTENCES, _NO_LINES = range(5)
_LONG_WORD, _NO_PUNCTUATION, _FEW_WORDS, _ABOUT_SCRIPT, _ABOUT_POLICY = range(5)


@dataclass(frozen=True)
class C4:
    """Keep lines that look like sentences, and documents that have enough of them (Raffel et al. 2020, section 2.2).

    Decisions and texts are those of datatrove's C4QualityFilter but for where sentences begin. The list of bad words of
    the same section is the step `dirty_words`.
    """

    kind: Literal["c4"] = "c4"
    """This step's name."""
    min_sentences: int = 5
    """Fewest sentences in the lines that are left."""
    min_words_per_line: int = 3
    """Lines with fewer words are removed; white space parts them."""
    max_word_length: int = 1000
    """Lines with a word of more characters are removed."""
    terminal_punctuation: bool = True
    """Remove lines that do not end in . ? ! \" or ', or that end in three full stops."""
    citations: bool = True
    """Remove [1], [edit] and [citation needed] from the lines."""
    javascript: bool = True
    """Remove lines that mention javascript."""
    policy_phrases: tuple[str, ...] = POLICY_PHRASES
    """Remove lines in which one of these occurs, in any case."""
    lorem_ipsum: bool = True
    """Reject documents with a line that is otherwise good and says "lorem ipsum"."""
    curly_brackets: bool = True
    """Reject documents with a line that is otherwise good and holds a "{"."""

    def __post_init__(self) -> None:
        require_not_negative(self, "min_sentences", "min_words_per_line")
        if self.max_word_length < 1:
            raise ValueError(f"max_word_length must be at least 1, not {self.max_word_length}.")
        if "" in self.policy_phrases:
            raise ValueError("policy_phrases holds an empty phrase, which every line contains.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Remove lines; reject the documents that break a rule or have too little left."""
        phrases = compile_phrases(
            (
                ("lorem ipsum",) * self.lorem_ipsum,
                ("{",) * self.curly_brackets,
                ("javascript",) * self.javascript,
                self.policy_phrases,
            )
        )
        data, offsets = text_buffers(documents["text"])
        limits = (self.min_sentences, self.min_words_per_line, self.max_word_length)
        flags = (self.terminal_punctuation, self.citations)
        cleaned, ends, verdicts, removed = _clean(
            data, offsets, character_classes(), mark_kinds(), phrases, limits, flags
        )
        reasons = first_reason(
            len(documents),
            [
                (verdicts == _HAS_PLACEHOLDER, "lorem ipsum"),
                (verdicts == _HAS_CURLY, "curly bracket"),
                (verdicts == _FEW_SENTENCES, f"fewer than {self.min_sentences} sentences"),
                (verdicts == _NO_LINES, "no lines left"),
            ],
        )
        names = (
            f"lines with a word of more than {self.max_word_length} characters",
            "lines without terminal punctuation",
            f"lines with fewer than {self.min_words_per_line} words",
            "lines that mention javascript",
            "lines with a policy phrase",
        )
        counts = {name: int(count) for name, count in zip(names, removed, strict=True) if count}
        return split_with_texts(documents, texts_of(cleaned, ends), reasons, counts)


@njit(cache=True, nogil=True)
def _clean(
    data: Bytes,
    offsets: Positions,
    classes: Bytes,
    marks: Bytes,
    phrases: Phrases,
    limits: tuple[int, int, int],
    flags: tuple[bool, bool],
) -> tuple[NDArray[np.uint8], Positions, NDArray[np.int64], NDArray[np.int64]]:
    """Texts that are left, their ends (0 first), a verdict for each, and how many lines were removed for what."""
    min_sentences, min_words, max_length = limits
    terminal_punctuation, citations = flags
    documents = len(offsets) - 1
    cleaned = np.empty(offsets[documents] - offsets[0] + 1, np.uint8)
    ends, verdicts = np.zeros(documents + 1, np.int64), np.zeros(documents, np.int64)
    removed = np.zeros(5, np.int64)
    for document in range(documents):
        at, end = offsets[document], offsets[document + 1]
        begin = written = ends[document]
        sentences = lines = 0
        while at < end and verdicts[document] == _KEPT:
            line_end, following = next_line(data, at, end)
            start = strip_left(data, at, line_end)
            stop = strip_right(data, start, line_end)
            at = following
            words, longest = _count_words(data, start, stop, max_length)
            line = written + (lines > 0)
            line_stop = _copy(data, start, stop, cleaned, line, citations)
            if longest > max_length:
                removed[_LONG_WORD] += 1
            elif terminal_punctuation and not _ends_sentence(cleaned, line, line_stop):
                removed[_NO_PUNCTUATION] += 1
            elif words < min_words:
                removed[_FEW_WORDS] += 1
            else:
                said = find_phrases(cleaned, line, line_stop, phrases)
                if said & _PLACEHOLDER:
                    verdicts[document] = _HAS_PLACEHOLDER
                elif said & _SCRIPT:
                    removed[_ABOUT_SCRIPT] += 1
                elif said & _CURLY:
                    verdicts[document] = _HAS_CURLY
                elif said & _POLICY:
                    removed[_ABOUT_POLICY] += 1
                else:
                    if sentences < min_sentences:
                        sentences += count_sentences(cleaned, line, line_stop, classes, marks)
                    if lines > 0:
                        cleaned[written] = 0x0A
                    written, lines = line_stop, lines + 1
        if verdicts[document] == _KEPT:
            stop = strip_right(cleaned, begin, written)
            start = strip_left(cleaned, begin, stop)
            if sentences < min_sentences:
                verdicts[document] = _FEW_SENTENCES
            elif start == stop:
                verdicts[document] = _NO_LINES
            else:
                for byte in range(stop - start):
                    cleaned[begin + byte] = cleaned[start + byte]
                written = begin + stop - start
        ends[document + 1] = written if verdicts[document] == _KEPT else begin
    return cleaned, ends, verdicts, removed


@njit(cache=True, nogil=True)
def _count_words(data: Bytes, at: int, end: int, max_length: int) -> tuple[int, int]:
    """Words between white space, and the characters of the longest, or `max_length` if it surely is not longer."""
    words, longest = 0, max_length
    start = at
    while at < end:
        code, size = decode(data, at)
        if is_space(code):
            if at > start:
                words += 1
                if at - start > longest:
                    longest = max(longest, count_characters(data, start, at))
            start = at + size
        at += size
    if at > start:
        words += 1
        if at - start > longest:
            longest = max(longest, count_characters(data, start, at))
    return words, longest


@njit(cache=True, nogil=True)
def _copy(data: Bytes, at: int, end: int, target: NDArray[np.uint8], to: int, citations: bool) -> int:
    """Copy bytes [at, end), without citation marks if so asked; return where they end in `target`."""
    while at < end:
        if citations and data[at] == 0x5B:
            behind = _behind_citation(data, at, end)
            if behind > at:
                at = behind
                continue
        target[to] = data[at]
        to += 1
        at += 1
    return to


@njit(cache=True, nogil=True)
def _behind_citation(data: Bytes, at: int, end: int) -> int:
    """Where the citation mark ends whose bracket is at `at`; `at` if there is none."""
    after = at + 1
    while after < end and 0x30 <= data[after] <= 0x39:
        after += 1
    if after < end and data[after] == 0x5D:
        return after + 1
    for mark in _CITATIONS:
        same = 0
        while same < len(mark) and at + same < end and data[at + same] == mark[same]:
            same += 1
        if same == len(mark):
            return at + same
    return at


@njit(cache=True, nogil=True)
def _ends_sentence(data: Bytes, start: int, end: int) -> bool:
    """Whether the line ends in . ? ! \" or ', and not in three full stops."""
    if end == start:
        return False
    last = data[end - 1]
    if last == 0x2E:
        return not (end - start >= 3 and data[end - 2] == 0x2E and data[end - 3] == 0x2E)
    return last in (0x3F, 0x21, 0x22, 0x27)
