"""Source code: heuristics of quality, and the headers that every file repeats.

LLaMA (Touvron et al. 2023), section 2.1, GitHub: "we filtered low quality files with heuristics based on the line
length or proportion of alphanumeric characters, and removed boilerplate, such as headers, with regular expressions". It
gives no numbers; the defaults are RedPajama's (Together 2023, data_prep/github).
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from puna.batches.words import DIGIT, IDEOGRAPH, LETTER, Bytes, Positions, character_classes, decode, text_buffers
from puna.curate.document import Outcome, split
from puna.curate.filters.reasons import first_reason, ratio, require_shares
from puna.curate.filters.texts import split_with_texts

_KIND = 15
_PREAMBLE = re.compile(r"(?:#![^\n]*\n)?(?:[ \t]*#[^\n]*coding[:=][^\n]*\n)?(?:<\?(?:php|xml)\b[^\n]*\n)?\s*")
_COMMENTS = re.compile(
    r"/\*.*?\*/|<!--.*?-->|\(\*.*?\*\)|\{-.*?-\}"
    r"|(?:[ \t]*//[^\n]*(?:\n|\Z))+|(?:[ \t]*#(?!include\b|define\b|if|pragma\b|import\b)[^\n]*(?:\n|\Z))+"
    r"|(?:[ \t]*--[^\n]*(?:\n|\Z))+|(?:[ \t]*;[^\n]*(?:\n|\Z))+|(?:[ \t]*%[^\n]*(?:\n|\Z))+",
    re.DOTALL,
)
_BOILERPLATE = re.compile(
    r"copyright|\(c\)\s*(?:19|20)\d\d|licen[sc]ed?\b|all rights reserved|spdx-|permission is hereby"
    r"|redistribution and use|without warranty",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class CodeQuality:
    """Rejects files that are data, minified or generated rather than written."""

    kind: Literal["code_quality"] = "code_quality"
    """Reject code with long lines or few letters and digits."""
    max_line_characters: int = 1000
    """Of the longest line."""
    max_mean_line_characters: int = 100
    """Of the lines on average."""
    min_alphanumeric_share: float = 0.25
    """Letters and digits of any script among all characters, line ends not counted."""

    def __post_init__(self) -> None:
        require_shares(self, "min_alphanumeric_share")
        if self.max_line_characters < 1 or self.max_mean_line_characters < 1:
            raise ValueError("max_line_characters and max_mean_line_characters have to be at least 1.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject with the reason of the first measure that is beyond its bound."""
        longest, lines, characters, alphanumeric = measure_code(*text_buffers(documents["text"]), character_classes())
        tests = (
            (longest > self.max_line_characters, f"a line of more than {self.max_line_characters} characters"),
            (
                characters > self.max_mean_line_characters * lines,
                f"lines of more than {self.max_mean_line_characters} characters on average",
            ),
            (
                ratio(alphanumeric, characters) < self.min_alphanumeric_share,
                f"less than {self.min_alphanumeric_share:g} letters and digits",
            ),
        )
        return split(documents, first_reason(documents.num_rows, tests))


@njit(cache=True, nogil=True)
def measure_code(
    data: Bytes, documents: Positions, classes: Bytes
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of each text: characters of its longest line, its lines, its characters without line ends, letters and digits."""
    n = len(documents) - 1
    longest = np.zeros(n, np.int64)
    lines = np.zeros(n, np.int64)
    characters = np.zeros(n, np.int64)
    alphanumeric = np.zeros(n, np.int64)
    for d in range(n):
        at, end, length = documents[d], documents[d + 1], 0
        while at < end:
            code, size = decode(data, at)
            at += size
            if code == 10:
                lines[d] += 1
                longest[d] = max(longest[d], length)
                length = 0
                continue
            length += 1
            characters[d] += 1
            kind = classes[code] & _KIND
            if kind in (LETTER, DIGIT, IDEOGRAPH):
                alphanumeric[d] += 1
        if length:
            lines[d] += 1
            longest[d] = max(longest[d], length)
    return longest, lines, characters, alphanumeric


@dataclass(frozen=True)
class CodeHeaders:
    """Removes comments about copyright and licence from the head of files, after `code_licences` has read them."""

    kind: Literal["code_headers"] = "code_headers"
    """Remove copyright and licence comments at the head of code."""

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject, with "nothing but a header", files that hold no more than that."""
        before = documents["text"].to_pylist()
        after = [without_header(text) for text in before]
        counts = {"headers removed": sum(old != new for old, new in zip(before, after, strict=True))}
        reasons = pa.array([None if text.strip() else "nothing but a header" for text in after], pa.string())
        return split_with_texts(documents, pa.array(after, pa.string()), reasons, counts)


def without_header(text: str) -> str:
    """A file without the comments at its head that are about copyright or licence."""
    preamble = _PREAMBLE.match(text)
    start = position = preamble.end() if preamble else 0
    kept: list[str] = []
    removed = False
    while comment := _COMMENTS.match(text, position):
        if _BOILERPLATE.search(comment[0]):
            removed = True
        else:
            kept.append(comment[0])
        position = comment.end()
        blank = re.compile(r"\s*\n|\s*\Z").match(text, position)
        position = blank.end() if blank else position
    if not removed:
        return text
    return text[:start] + "".join(part.rstrip("\n") + "\n" for part in kept) + text[position:]
