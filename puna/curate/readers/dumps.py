"""XML dumps: Wikipedia's pages, and the elements of any dump, one at a time.

A dump is a long row of elements of one name. Each is cut out of the bytes and parsed by itself. So a malformed one
costs itself and no more, a large one is passed over without being held, and the head of the file, where a document
type could declare entities that expand without end, is not parsed at all.
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, Literal, cast
from xml.etree import ElementTree

from puna.curate.document import Document, Rejected
from puna.curate.readers.bounds import CHUNK, Bounds, Unreadable, expand, open_expanded
from puna.curate.readers.files import byte_ranges, list_files, locate, parse_range
from puna.curate.readers.text import TOO_LARGE, Metadata, to_document
from puna.runtime.errors import InputError

BYTES_PER_UNIT = 64 << 20
"""Of the bzip2 streams that are read apart from one another."""

_BZIP2_STREAM = re.compile(rb"BZh[1-9]1AY&SY")
_HEAD_LANGUAGE = re.compile(rb'<mediawiki[^>]{0,2000}xml:lang="([a-z-]{2,20})"')


@dataclass(frozen=True)
class WikipediaReader:
    """The articles of a Wikipedia `pages-articles` dump, as wikitext; the step `wikitext` makes text of it."""

    kind: Literal["wikipedia"] = "wikipedia"
    """Articles of Wikipedia's pages-articles dumps, as wikitext."""
    path: Path = field(kw_only=True)
    """A dump, or a folder of them. Of a `multistream` dump, parts are read apart from one another."""
    languages: tuple[str, ...] = ()
    """Languages to read, by the beginning of the files' names as in dewiki-20240101; all where empty."""
    bounds: Bounds = field(default_factory=Bounds)
    """What one file may cost."""

    def units(self) -> Sequence[str]:
        """Files; multistream ones in ranges of bytes."""
        names = list_files(self.path, (".xml", ".xml.bz2", ".xml.gz", ".xml.zst"), "a Wikipedia dump")
        wanted = [name for name in names if not self.languages or _language_of(name) in self.languages]
        if not wanted:
            found = ", ".join(sorted({_language_of(name) for name in names}))
            raise InputError(f"{self.path} holds none of the languages that `languages` lists. It holds {found}.")
        units: list[str] = []
        for name in wanted:
            parts = byte_ranges(locate(self.path, name)[0], name, BYTES_PER_UNIT)
            units += parts if "multistream" in name and name.endswith(".bz2") else [name]
        return units

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        return [locate(self.path, unit)[0]]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """One document a page of the main namespace that is not a redirect."""
        path, part = locate(self.path, unit)
        name = unit.partition("//")[0]
        try:
            language = self._language(path)
            with self._open(path, part) as stream:
                for number, element in enumerate(
                    read_elements(stream, b"<page>", b"</page>", self.bounds.max_document_bytes)
                ):
                    yield self._page(element, f"{name}#{part}{number}", language)
        except Unreadable as error:
            yield Rejected(unit, error.reason)

    def _page(self, element: bytes | None, place: str, language: str) -> Document | Rejected:
        if element is None:
            return Rejected(place, TOO_LARGE)
        try:
            page = ElementTree.fromstring(element)
        except ElementTree.ParseError:
            return Rejected(place, "malformed XML")
        title = page.findtext("title", "")
        name = f"{language}/{page.findtext('id', place)}"
        if page.findtext("ns", "0") != "0":
            return Rejected(name, "not an article")
        if page.find("redirect") is not None:
            return Rejected(name, "redirect")
        metadata: Metadata = {
            "title": title,
            "language": language,
            "url": f"https://{language}.wikipedia.org/wiki/{title.replace(' ', '_')}",
            "date": page.findtext("revision/timestamp", ""),
        }
        text = page.findtext("revision/text", "")
        return to_document(text, name, self.bounds.max_document_bytes, metadata)

    def _language(self, path: Path) -> str:
        """What the dump says, else the beginning of its name, as in enwiki-20240101."""
        with open_expanded(path, self.bounds) as stream:
            found = _HEAD_LANGUAGE.search(stream.read(4096))
        return found[1].decode() if found else _language_of(path.name)

    def _open(self, path: Path, part: str) -> IO[bytes]:
        if not part:
            return open_expanded(path, self.bounds)
        packed = cast(BinaryIO, io.BufferedReader(_Streams(path, *parse_range(part)), CHUNK))
        return expand(packed, path.stat().st_size, self.bounds)


def _language_of(name: str) -> str:
    return name.rpartition("/")[2].partition("wiki")[0].replace("_", "-")


class _Streams(io.RawIOBase):
    """The concatenated bzip2 streams of a file that begin in a range of its bytes."""

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self._file = path.open("rb")
        self._start, self._stop = self._begin(start), self._begin(stop)
        self._file.seek(self._start)

    def _begin(self, position: int) -> int:
        """Where the first stream at or after a position begins."""
        self._file.seek(position)
        window = self._file.read(CHUNK)
        while window:
            if found := _BZIP2_STREAM.search(window):
                return position + found.start()
            following = self._file.read(CHUNK)
            position += max(len(window) - 9, 0)
            window = window[-9:] + following if following else b""
        return self._file.seek(0, io.SEEK_END)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        return self._file.seek(self._start + offset) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        content = self._file.read(min(len(view), self._stop - self._file.tell()))
        view[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def read_elements(stream: IO[bytes], start: bytes, end: bytes, max_bytes: int) -> Iterator[bytes | None]:
    """The stretches of a stream from `start` to the next `end`, both included; None for one that is too long.

    Raises:
        Unreadable: the stream is damaged, or ends within an element.
    """
    buffer = bytearray()
    inside, searched = False, 0
    while True:
        if inside and (at := buffer.find(end, searched)) >= 0:
            yield bytes(buffer[: at + len(end)])
            del buffer[: at + len(end)]
            inside = False
        elif inside and len(buffer) > max_bytes:
            yield None
            del buffer[: len(start)]
            inside = False
        elif not inside and (at := buffer.find(start)) >= 0:
            del buffer[:at]
            inside, searched = True, len(start)
        else:
            if inside:
                searched = max(len(start), len(buffer) - len(end) + 1)
            else:
                del buffer[: max(len(buffer) - len(start) + 1, 0)]
            more = stream.read(CHUNK)
            if not more:
                break
            buffer += more
    if inside:
        raise Unreadable("cut-off file")
