"""Which licence a text is, or stands under.

LLaMA (Touvron et al. 2023), section 2.1, GitHub: "We only kept projects that are distributed under the Apache, BSD and
MIT licenses."
"""

import functools
import re
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from puna.curate.document import Outcome, split
from puna.curate.sources import licence_texts as texts

SHINGLE_WORDS = 5
MIN_CONTAINED = 0.85
"""Share of a licence's word shingles that a text of it holds; the rest allows for wordings that drifted."""

HEAD_CHARACTERS = 8_000
"""A file says at its beginning what licence it has."""

_WORD = re.compile(r"[a-z0-9]+")
_SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+ ()-]{2,200})")
_GNU = re.compile(r"\bgnu\s+(lesser\s+|library\s+|affero\s+)?general\s+public\s+licen[sc]e", re.IGNORECASE)
_OTHER = (
    (re.compile(r"\bmozilla\s+public\s+licen[sc]e", re.IGNORECASE), "MPL"),
    (re.compile(r"\bcreative\s+commons\b", re.IGNORECASE), "CC"),
    (
        re.compile(r"\ball\s+rights\s+reserved\b[^\n]{0,200}\b(?:confidential|proprietary)\b", re.IGNORECASE),
        "proprietary",
    ),
)
_BRIEF = (
    (re.compile(r"\bapache\s+licen[sc]e,?\s+(?:version\s+)?2(?:\.0)?\b", re.IGNORECASE), "Apache-2.0"),
    (
        re.compile(r"\b(?:under|with)\s+(?:the\s+)?(?:terms\s+of\s+the\s+)?(?:an?\s+)?MIT\s+licen[sc]e", re.IGNORECASE),
        "MIT",
    ),
    (
        re.compile(
            r"\b(?:under|governed\s+by|with)\s+(?:the\s+)?(?:terms\s+of\s+the\s+)?a?\s*"
            r"(?:BSD-style|(?:(?:new|modified|simplified|[23]-clause)\s+)?BSD)\s+licen[sc]e",
            re.IGNORECASE,
        ),
        "BSD",
    ),
)
"""How the head of a file names a licence whose text stands elsewhere."""


@dataclass(frozen=True)
class CodeLicences:
    """Keeps files under permissive licences: what a file says at its head, else what its repository says."""

    kind: Literal["code_licences"] = "code_licences"
    """Keep code under some licences: by the file's head, else by its repository's licence."""
    kept: tuple[str, ...] = ("Apache-2.0", "MIT", "BSD", "BSD-2-Clause", "BSD-3-Clause")
    """SPDX identifiers; "BSD" is a BSD licence that is not told more closely."""
    licence_column: str = "licence"
    """Column with the licence of the file's repository, as the reader `git` gives it; it is set to what was found."""

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject with "no licence found" or "licence not kept"."""
        rows = documents["text"].to_pylist()
        column = self.licence_column
        given = documents[column].to_pylist() if column in documents.column_names else [None] * len(rows)
        found = [
            detect_licence(text[:HEAD_CHARACTERS], in_header=True) or licence
            for text, licence in zip(rows, given, strict=True)
        ]
        reasons = [
            "no licence found" if licence is None else None if is_kept(licence, self.kept) else "licence not kept"
            for licence in found
        ]
        values = pa.array(found, pa.string())
        position = documents.schema.get_field_index(column)
        labelled = (
            documents.append_column(column, values) if position < 0 else documents.set_column(position, column, values)
        )
        return split(labelled, pa.array(reasons, pa.string()))


def is_kept(expression: str, kept: tuple[str, ...]) -> bool:
    """Whether an SPDX expression allows use under a kept licence: one side of an OR, all of an AND."""
    plain = re.sub(r"[()]", " ", expression)
    return any(
        all(part.partition(" WITH ")[0].strip() in kept for part in side.split(" AND ")) for side in plain.split(" OR ")
    )


def detect_licence(text: str, in_header: bool = False) -> str | None:
    """The SPDX identifier of the licence that a text is, or says that it stands under; None for none that is known.

    Exact for the licences of `licence_texts`, by the share of their word shingles that the text holds. The GNU licences
    are told as "GPL", "LGPL", "AGPL"; a few others as "MPL", "CC", "proprietary".

    Args:
        text: a licence file, or the head of a source file.
        in_header: it is the head of a source file, which may also name a licence in a few words.
    """
    if spdx := _SPDX.search(text):
        return re.sub(r"\s+", " ", spdx[1]).strip()
    words = _WORD.findall(text.lower())
    held = _shingles(words)
    contained = {name: len(own & held) / len(own) for name, own in _known().items()}
    if contained["Apache-2.0"] >= MIN_CONTAINED or contained["Apache header"] >= MIN_CONTAINED:
        return "Apache-2.0"
    if contained["MIT"] >= MIN_CONTAINED:
        return "MIT"
    if contained["BSD"] >= MIN_CONTAINED:
        if contained["BSD-4 extra"] >= MIN_CONTAINED:
            return "BSD-4-Clause"
        return "BSD-3-Clause" if contained["BSD-3 extra"] >= MIN_CONTAINED else "BSD-2-Clause"
    hits = [(found.start(), name) for pattern, name in _OTHER if (found := pattern.search(text))]
    if gnu := _GNU.search(text):
        variant = (gnu[1] or "").strip().lower()
        hits.append((gnu.start(), {"": "GPL", "affero": "AGPL"}.get(variant, "LGPL")))
    if hits:
        # Licences name others further down, as Mozilla's does the GNU ones.
        return min(hits)[1]
    named = _BRIEF if in_header else ()
    return next((name for pattern, name in named if pattern.search(text)), None)


@functools.cache
def _known() -> dict[str, frozenset[tuple[str, ...]]]:
    of = {
        "MIT": texts.MIT,
        "BSD": texts.BSD_2_CLAUSE,
        "BSD-3 extra": texts.BSD_3_CLAUSE_EXTRA,
        "BSD-4 extra": texts.BSD_4_CLAUSE_EXTRA,
        "Apache-2.0": texts.APACHE_2,
        "Apache header": texts.APACHE_2_HEADER,
    }
    # Shingles stay within a paragraph: what stands between them (names, numbers of clauses) differs.
    return {
        name: frozenset().union(*(_shingles(_WORD.findall(part.lower())) for part in re.split(r"(?<=[.:])\n", text)))
        for name, text in of.items()
    }


def _shingles(words: list[str]) -> frozenset[tuple[str, ...]]:
    return frozenset(zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False))
