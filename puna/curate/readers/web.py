"""Web crawls: WARC files with the pages as they were served, WET files with their text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from puna.curate.document import Document, Rejected
from puna.curate.readers.bounds import CHUNK, Bounds
from puna.curate.readers.files import list_files, locate
from puna.curate.readers.html import HtmlToText, decode_html, language_of
from puna.curate.readers.text import TOO_LARGE, Metadata, decode, to_document

if TYPE_CHECKING:
    from fastwarc.warc import WarcRecord

MAX_DAMAGED_PLACES = 1000
"""Where a file is damaged more often than this, the rest of it is given up."""

_STARTS = (b"\x1f\x8b\x08", b"WARC/1.")
"""What a record begins with: a gzip member of its own, or its version."""


@dataclass(frozen=True)
class WarcReader:
    """WARC files: HTML and plain text among the responses."""

    kind: Literal["warc"] = "warc"
    """WARC files, such as Common Crawl's: pages as they were served."""
    path: Path = field(kw_only=True)
    """A file, or a folder of them."""
    html: HtmlToText = field(default_factory=HtmlToText)
    """How text is taken out of HTML."""
    bounds: Bounds = field(default_factory=Bounds)
    """What one file may cost."""

    def units(self) -> Sequence[str]:
        """Files."""
        return list_files(self.path, (".warc", ".warc.gz", ".warc.zst"), "a WARC file")

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        return [locate(self.path, unit)[0]]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """One document a response; requests and the like are not documents, and not counted."""
        from fastwarc.warc import WarcRecordType

        for record in _records(locate(self.path, unit)[0], unit):
            if isinstance(record, Rejected):
                yield record
            elif record.record_type in (WarcRecordType.response, WarcRecordType.resource):
                yield self._document(record, unit)

    def _document(self, record: "WarcRecord", unit: str) -> Document | Rejected:
        name = _name(record, unit)
        if reason := _load(record, self.bounds):
            return Rejected(name, reason)
        headers = record.http_headers if record.is_http else None
        if headers is not None and headers.status_code != 200:
            return Rejected(name, "HTTP error or redirect")
        content_type = (record.http_content_type if headers is not None else record.headers.get("Content-Type")) or ""
        mime = content_type.partition(";")[0].strip().lower()
        if mime not in ("text/html", "application/xhtml+xml", "text/plain"):
            return Rejected(name, "neither HTML nor plain text")
        content = _payload(record, self.bounds)
        if isinstance(content, str):
            return Rejected(name, content)
        declared = record.http_charset if headers is not None else None
        metadata = _metadata(record)
        language = headers.get("Content-Language") if headers is not None else None
        if mime == "text/plain":
            text = decode(content, declared)
        else:
            page = decode_html(content, declared)
            language = language or language_of(page)
            text = self.html(page)
        if language:
            metadata["declared_language"] = language.partition(",")[0].strip().lower()
        return to_document(text, name, self.bounds.max_document_bytes, metadata)


@dataclass(frozen=True)
class WetReader:
    """WET files: the text of pages, taken out by the crawler."""

    kind: Literal["wet"] = "wet"
    """WET files, such as Common Crawl's: text already taken out of the pages."""
    path: Path = field(kw_only=True)
    """A file, or a folder of them."""
    bounds: Bounds = field(default_factory=Bounds)
    """What one file may cost."""

    def units(self) -> Sequence[str]:
        """Files."""
        return list_files(self.path, (".wet", ".wet.gz", ".wet.zst"), "a WET file")

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        return [locate(self.path, unit)[0]]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """One document a page."""
        from fastwarc.warc import WarcRecordType

        for record in _records(locate(self.path, unit)[0], unit):
            if isinstance(record, Rejected):
                yield record
            elif record.record_type == WarcRecordType.conversion:
                name = _name(record, unit)
                if reason := _load(record, self.bounds):
                    yield Rejected(name, reason)
                    continue
                content = record.reader.read()
                metadata = _metadata(record)
                if language := record.headers.get("WARC-Identified-Content-Language"):
                    metadata["declared_language"] = language.partition(",")[0]
                yield to_document(decode(content), name, self.bounds.max_document_bytes, metadata)


def _records(path: Path, unit: str) -> "Iterator[WarcRecord | Rejected]":
    """Every record that can be read; after a damaged place, from the next thing that looks like one."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    position, damaged, found = 0, 0, False
    with path.open("rb", buffering=CHUNK) as stream:
        while True:
            good = False
            stream.seek(position)
            try:
                for record in ArchiveIterator(
                    stream, record_types=WarcRecordType.any_type, parse_http=False, quirks_mode=True
                ):
                    position = max(position, record.stream_pos)
                    good = found = True
                    yield record
                break
            except OSError:
                if good or not damaged:
                    damaged += 1
                    yield Rejected(f"{unit}@{position}", "damaged record")
            following = _next_start(stream, position + 1)
            if following is None:
                return
            if damaged > MAX_DAMAGED_PLACES:
                yield Rejected(f"{unit}@{position}", "too many damaged records")
                return
            position = following
    if not found:
        yield Rejected(unit, "no WARC record")


def _next_start(stream: IO[bytes], position: int) -> int | None:
    stream.seek(position)
    overlap = max(map(len, _STARTS)) - 1
    window = stream.read(CHUNK)
    while window:
        hits = [hit for hit in (window.find(start) for start in _STARTS) if hit >= 0]
        if hits:
            return position + min(hits)
        following = stream.read(CHUNK)
        position += max(len(window) - overlap, 0)
        window = window[-overlap:] + following if following else b""
    return None


def _load(record: "WarcRecord", bounds: Bounds) -> str | None:
    """Take a record's block into memory and parse the HTTP message in it, or say why not."""
    try:
        block = record.reader.read(bounds.max_document_bytes + 1)
        if len(block) > bounds.max_document_bytes:
            return TOO_LARGE
        if len(block) < record.content_length:
            return "cut-off record"
        record.set_bytes_content(block)
        if record.is_http:
            record.parse_http(auto_decode="all")
    except OSError:
        return "damaged record"
    return None


def _payload(record: "WarcRecord", bounds: Bounds) -> bytes | str:
    """What the server sent, with its compression undone, or why there is none."""
    try:
        content = record.reader.read(bounds.max_document_bytes + 1)
    except OSError:
        return "damaged record"
    return TOO_LARGE if len(content) > bounds.max_document_bytes else content


def _name(record: "WarcRecord", unit: str) -> str:
    named = (record.record_id or "").strip("<> ").removeprefix("urn:uuid:")
    return named or f"{unit}@{record.stream_pos}"


def _metadata(record: "WarcRecord") -> Metadata:
    found: Metadata = {}
    for key, header in (("url", "WARC-Target-URI"), ("date", "WARC-Date")):
        if value := record.headers.get(header):
            found[key] = value.strip("<> ")
    return found
