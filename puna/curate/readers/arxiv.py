r"""arXiv's source archives: the files of each paper put together into one LaTeX text.

arXiv ships tars of papers; a paper is a gzip file, either of one .tex file or of a tar of its files. The step `latex`
makes the text that a language model reads (LLaMA, Touvron et al. 2023, section 2.1).
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from puna.curate.document import Document, Rejected
from puna.curate.readers.archives import Member, read_tar
from puna.curate.readers.bounds import Bounds, Unreadable, expand, open_expanded
from puna.curate.readers.files import list_files, locate
from puna.curate.readers.text import TOO_LARGE, decode, to_document

MAX_DEPTH = 20
MAX_INPUTS = 10_000
"""How deep files may include each other, and how often in all."""

_SOURCES = (".tex", ".ltx", ".latex", ".txt", ".sty", ".cls", ".def", ".tikz", ".pgf", ".bbl", ".inc")
_INCLUSION = re.compile(
    r"(?P<skip>\\[\\%]|%[^\n]*"
    r"|\\begin\{(?P<environment>verbatim\*?|lstlisting|minted|comment)\}.*?(?:\\end\{(?P=environment)\}|\Z))"
    r"|\\(?:input|include|subfile|@input)(?![a-zA-Z@])\s*(?:\{\s*(?P<braced>[^{}\n]{1,300}?)\s*\}|(?P<bare>[\w./-]{1,300}))"
    r"|\\(?:import|subimport)\*?\s*\{\s*(?P<folder>[^{}\n]{0,300}?)\s*\}\s*\{\s*(?P<file>[^{}\n]{1,300}?)\s*\}",
    re.DOTALL,
)
_START = re.compile(r"\\(?:documentclass|documentstyle)(?![a-zA-Z])|\\begin\s*\{document\}")


@dataclass(frozen=True)
class ArxivReader:
    r"""Papers out of arXiv's source archives, each as one LaTeX text with its \input files in place."""

    kind: Literal["arxiv"] = "arxiv"
    """arXiv's source archives: each paper as one LaTeX text."""
    path: Path = field(kw_only=True)
    """A tar of papers, a paper (.tar.gz or .gz), or a folder of either."""
    bounds: Bounds = field(default_factory=Bounds)
    """What one archive may cost, and one paper: all its sources together have to fit into max_document_bytes."""

    def units(self) -> Sequence[str]:
        """Archives."""
        return list_files(self.path, (".tar", ".gz", ".tgz", ".tex"), "an arXiv source archive")

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        return [locate(self.path, unit)[0]]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """One document a paper."""
        path = locate(self.path, unit)[0]
        own = _Sources(self.bounds.max_document_bytes)
        try:
            with open_expanded(path, self.bounds) as stream:
                start = stream.peek(512) if isinstance(stream, io.BufferedReader) else b""
                if start[257:262] != b"ustar":
                    yield self._single(stream.read(self.bounds.max_document_bytes + 1), unit)
                    return
                for member in read_tar(stream, self.bounds):
                    if member.name.endswith((".gz", ".pdf")) and not own.files:
                        yield self._paper(member)
                    else:
                        own.add(member)
        except Unreadable as error:
            yield Rejected(unit, error.reason)
        else:
            if own.files:
                yield self._assemble(own.files, unit)

    def _paper(self, member: Member) -> Document | Rejected:
        name = PurePosixPath(member.name).name.removesuffix(".gz").removesuffix(".pdf")
        if member.name.endswith(".pdf"):
            return Rejected(name, "no LaTeX source")
        if member.content is None:
            return Rejected(name, TOO_LARGE)
        sources = _Sources(self.bounds.max_document_bytes)
        try:
            with expand(io.BytesIO(member.content), member.size, self.bounds) as stream:
                content = stream.read(self.bounds.max_document_bytes + 1)
                if content[257:262] != b"ustar":
                    return self._single(content, name)
            with expand(io.BytesIO(member.content), member.size, self.bounds) as stream:
                for inner in read_tar(stream, self.bounds):
                    sources.add(inner)
        except Unreadable as error:
            return Rejected(name, error.reason)
        return self._assemble(sources.files, name)

    def _single(self, content: bytes, name: str) -> Document | Rejected:
        if len(content) > self.bounds.max_document_bytes:
            return Rejected(name, TOO_LARGE)
        return self._assemble({"main.tex": decode(content)}, name)

    def _assemble(self, sources: Mapping[str, str], name: str) -> Document | Rejected:
        try:
            text = flatten(sources, self.bounds.max_document_bytes)
        except Unreadable as error:
            return Rejected(name, error.reason)
        return to_document(text, name, self.bounds.max_document_bytes, {})


class _Sources:
    """The text files of a paper, up to a number of bytes in all."""

    def __init__(self, max_bytes: int) -> None:
        self.files: dict[str, str] = {}
        self._left = max_bytes

    def add(self, member: Member) -> None:
        if member.content is not None and member.name.lower().endswith(_SOURCES) and b"\0" not in member.content:
            # The number of files is bounded along: each costs something, even when it is empty.
            self._left -= len(member.content) + 100
            if self._left < 0:
                raise Unreadable(TOO_LARGE)
            self.files[member.name] = decode(member.content).replace("\r\n", "\n").replace("\r", "\n")


def flatten(sources: Mapping[str, str], max_characters: int) -> str:
    r"""The main file of a LaTeX project, with the files that it includes in their places.

    The main file is, among those that no other includes, the one whose whole text begins a document; the longest of
    several. Commands that include a file which is not there (a package's, mostly) are left as they are.

    Args:
        sources: path to content.
        max_characters: of the result.

    Raises:
        Unreadable: no file begins a document; files include each other in a circle, or make too long a text.
    """
    included = {
        target
        for name, content in sources.items()
        for found in _INCLUSION.finditer(content)
        if (target := _target(sources, name, found)) and target != name
    }
    mains = [name for name in sources if name not in included]
    if not mains and sources:
        raise Unreadable("cyclic \\input")
    best = ""
    left = 2 * max_characters
    for name in mains:
        text = _flatten(sources, name, min(left, max_characters))
        left -= len(text)
        if len(text) > len(best) and _START.search(text):
            best = text
    if not best:
        raise Unreadable("no LaTeX source")
    return best


def _flatten(sources: Mapping[str, str], main: str, max_characters: int) -> str:
    parts: list[str] = []
    length = inputs = 0

    def put(text: str) -> None:
        nonlocal length
        length += len(text)
        if length > max_characters:
            raise Unreadable(TOO_LARGE)
        parts.append(text)

    def visit(name: str, above: tuple[str, ...]) -> None:
        nonlocal inputs
        inputs += 1
        if name in above:
            raise Unreadable("cyclic \\input")
        if len(above) > MAX_DEPTH or inputs > MAX_INPUTS:
            raise Unreadable("too many \\input")
        content = sources[name]
        position = 0
        for found in _INCLUSION.finditer(content):
            if target := _target(sources, name, found):
                put(content[position : found.start()])
                position = found.end()
                visit(target, (*above, name))
        put(content[position:])

    visit(main, ())
    return "".join(parts)


def _target(sources: Mapping[str, str], name: str, found: re.Match[str]) -> str | None:
    """The file that an inclusion in the file `name` means, if it is there."""
    if found["skip"]:
        return None
    wanted = found["braced"] or found["bare"] or f"{found['folder'].rstrip('/')}/{found['file']}"
    plain = str(PurePosixPath(wanted))
    beside = str(PurePosixPath(name).parent / wanted)
    candidates = [base + ending for base in (plain, beside) for ending in ("", ".tex")]
    return next((candidate for candidate in candidates if candidate in sources), None)
