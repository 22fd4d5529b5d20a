"""Project Gutenberg books: the licence around the text, and the line breaks in it, taken out."""

import re
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from puna.curate.document import Outcome
from puna.curate.filters.texts import split_with_texts

_START = re.compile(
    r"^\*{1,3}[ \t]*START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*(?:\n[^\n]+)?\*\*\*[^\n]*\n"
    r"|^\*END[ *]*THE SMALL PRINT![^\n]*\n"
    r"|^\*{3} ?START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\n",
    re.MULTILINE | re.IGNORECASE,
)
_END = re.compile(
    r"^\*{1,3}[ \t]*END OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*"
    r"|^[ \t]*(?:\*+ ?)?(?:This is the )?End of (?:the |this )?Project Gutenberg[^\n]*"
    r"|^[ \t]*\*+[ \t]*START: FULL LICENSE[^\n]*",
    re.MULTILINE | re.IGNORECASE,
)
_CREDITS = re.compile(
    r"\s*(?:(?:E-?text |This e-?(?:text|book) was |Transcribed |HTML version )?"
    r"(?:produced|prepared|transcribed|created|scanned|from images)\b[^\n]*(?:\n[^\n]+)*\n\s*\n"
    r"|\[?Transcriber'?s? notes?:[^\n]*(?:\n[^\n]+)*\n\s*\n)",
    re.IGNORECASE,
)
_LISTED = re.compile(r"[ \t]|[-*•] |\d+[.)] ")

SLACK = 12
"""Characters by which the lines of a hand-wrapped text fall short of its width."""


@dataclass(frozen=True)
class Gutenberg:
    """Removes what Project Gutenberg puts around a book, and joins the lines of its paragraphs."""

    kind: Literal["gutenberg"] = "gutenberg"
    """Remove Project Gutenberg's licence and notes around a book, and unwrap its lines."""
    unwrap: bool = True
    """Join the lines of a paragraph. Verse, lists, headings and indented lines keep theirs."""

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject, with "no text between header and footer", books of which nothing is left."""
        before = documents["text"].to_pylist()
        after = [self._clean(text) for text in before]
        counts = {"books with boilerplate": sum(len(strip_boilerplate(text)) < len(text) for text in before)}
        reasons = pa.array([None if text else "no text between header and footer" for text in after], pa.string())
        return split_with_texts(documents, pa.array(after, pa.string()), reasons, counts)

    def _clean(self, text: str) -> str:
        text = strip_boilerplate(text).strip("\n")
        return unwrap(text) if self.unwrap else text.strip()


def strip_boilerplate(text: str) -> str:
    """A book without what stands before its beginning and after its end, in any of the forms used since the 1990s."""
    # Some old files have the small print at their end.
    begin = 0
    for found in _START.finditer(text[: max(len(text) // 2, 50_000)]):
        begin = found.end()
    end = _END.search(text, begin)
    body = text[begin : end.start() if end else len(text)]
    if begin and (credit := _CREDITS.match(body)):
        body = body[credit.end() :]
    return body


def unwrap(text: str) -> str:
    """Join lines that end where they do only because the next word did not fit.

    A line is joined to the next if, together with the next one's first word, it would be wider than the text is (the
    90th percentile of its lines' lengths, less a slack). Lines that are broken for another reason are shorter.
    """
    lines = [line.rstrip() for line in text.split("\n")]
    lengths = sorted(len(line) for line in lines if line)
    if not lengths:
        return ""
    width = lengths[min(len(lengths) - 1, len(lengths) * 9 // 10)] - SLACK
    parts: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        parts.append(line)
        if not following:
            parts.append("\n")
            continue
        first_word = len(following) if " " not in following else following.index(" ")
        if line and len(line) + 1 + first_word > width and not _LISTED.match(following):
            parts.append("" if re.search(r"\w-$", line) else " ")
        else:
            parts.append("\n")
    return re.sub(r"\n{3,}", "\n\n", "".join(parts)).strip()
