r"""LaTeX papers as a language model reads them.

LLaMA (Touvron et al. 2023), section 2.1, ArXiv: "Following Lewkowycz et al. (2022), we removed everything before the
first section, as well as the bibliography. We also removed the comments from the .tex files, and inline-expanded
definitions and macros written by users to increase consistency across papers."

Files that include others come in one piece from the reader `arxiv`.
"""

import re
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from puna.curate.document import Outcome
from puna.curate.filters.texts import split_with_texts
from puna.curate.sources.latex_macros import TooLong, expand_macros

_VERBATIM = (
    r"\\begin\{(?P<name>verbatim\*?|Verbatim|lstlisting|minted)\}.*?(?:\\end\{(?P=name)\}|\Z)"
    r"|\\verb\*?(?P<bar>[^a-zA-Z\s*]).*?(?:(?P=bar)|$)"
)
_COMMENT = re.compile(
    rf"(?P<kept>{_VERBATIM}|\\[\\%])|(?P<line>^[ \t]*%[^\n]*(?:\n|\Z))|(?P<tail>(?<![ \t])[ \t]*+%[^\n]*)",
    re.DOTALL | re.MULTILINE,
)
_SECTION = re.compile(r"\\(?:chapter|section)\*?\s*[\[{]")
_BODY = re.compile(r"\\end\s*\{abstract\}|\\maketitle(?![a-zA-Z])|\\begin\s*\{document\}")
_END_OF_DOCUMENT = re.compile(r"\\end\s*\{document\}")
_BIBLIOGRAPHY_COMMANDS = re.compile(
    r"\\(?:bibliography|bibliographystyle|addbibresource|nobibliography)\s*(?:\[[^\[\]\n]*\])?\s*\{[^{}]*\}"
    r"|\\(?:printbibliography|printindex|tableofcontents|listoffigures|listoftables)(?![a-zA-Z])(?:\[[^\[\]\n]*\])?"
)
_REFERENCES = re.compile(
    r"\\(?:chapter|section)\*?\s*\{\s*(?:references|bibliography)\s*\}\s*(?=\Z|\\(?:chapter|section))", re.I
)
_BLANK_LINES = re.compile(r"\n{3,}")


@dataclass(frozen=True)
class Latex:
    """Makes a paper's LaTeX uniform: no comments, head or bibliography, and the author's macros expanded."""

    kind: Literal["latex"] = "latex"
    """LaTeX papers: comments, head and bibliography removed, macros expanded."""
    expand_macros: bool = True
    r"""Put what \newcommand, \def, \let and \DeclareMathOperator define in place of its uses."""
    max_growth: int = 10
    """Papers that macros make longer than this many times, and a megabyte, are rejected."""

    def __post_init__(self) -> None:
        if self.max_growth < 1:
            raise ValueError(f"max_growth is {self.max_growth}; it has to be at least 1.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject with "macros expand too far", "not LaTeX" or "no text after the first section"."""
        texts: list[str] = []
        reasons: list[str | None] = []
        for text in documents["text"].to_pylist():
            cleaned: str | None = ""
            try:
                cleaned = self._clean(text)
                reason = "not LaTeX" if cleaned is None else None if cleaned else "no text after the first section"
            except TooLong:
                reason = "macros expand too far"
            texts.append(cleaned or "")
            reasons.append(reason)
        return split_with_texts(documents, pa.array(texts, pa.string()), pa.array(reasons, pa.string()), {})

    def _clean(self, text: str) -> str | None:
        limit = len(text) * self.max_growth + 1_000_000
        text = remove_comments(text)
        if self.expand_macros:
            text = expand_macros(text, limit)
        start = _SECTION.search(text)
        if start:
            text = text[start.start() :]
        else:
            starts = [found.end() for found in _BODY.finditer(text)]
            if not starts:
                return None
            text = text[starts[-1] :]
        return remove_bibliography(text)


def remove_comments(text: str) -> str:
    r"""A text without comments; \% and what stands in verbatim is none. Parts put out of action go too."""
    kept: list[str] = []
    position = 0
    for found in _COMMENT.finditer(text):
        kept.append(text[position : found.start()] + (found["kept"] or ""))
        position = found.end()
    text = "".join(kept) + text[position:]
    return _without(_without(text, r"\begin{comment}", r"\end{comment}"), r"\iffalse", r"\fi")


def remove_bibliography(text: str) -> str:
    """A text without its list of references, and without what follows the end of the document."""
    if end := _END_OF_DOCUMENT.search(text):
        text = text[: end.start()]
    text = _without(text, r"\begin{thebibliography}", r"\end{thebibliography}")
    text = _BIBLIOGRAPHY_COMMANDS.sub("", text)
    text = _REFERENCES.sub("", text)
    return _BLANK_LINES.sub("\n\n", text).strip()


def _without(text: str, start: str, end: str) -> str:
    """Everything from a `start` to the next `end` removed; a start that nothing ends stays."""
    first, *rest = text.split(start)
    parts = [first]
    for part in rest:
        _, found, after = part.partition(end)
        parts.append(after if found else start + part)
    return "".join(parts)
