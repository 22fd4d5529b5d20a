"""EPUB books. Books as plain text, such as Project Gutenberg's, are read by `folder`; see the step `gutenberg`."""

import posixpath
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote
from xml.parsers import expat

from puna.curate.document import Document, Rejected
from puna.curate.readers.bounds import Bounds, Unreadable
from puna.curate.readers.files import list_files, locate
from puna.curate.readers.html import decode_html, fragment_to_text
from puna.curate.readers.text import TOO_LARGE, Metadata, to_document

_MAX_FILE_BYTES = 1_000_000_000
_MAX_PACKAGE_BYTES = 5_000_000
"""Of the XML files that list a book's parts."""


@dataclass(frozen=True)
class EpubReader:
    """EPUB books, one document a book, its parts in reading order."""

    kind: Literal["epub"] = "epub"
    """EPUB books."""
    path: Path = field(kw_only=True)
    """A book, or a folder of them."""
    bounds: Bounds = field(default_factory=Bounds)
    """What one book may cost; max_document_bytes holds for its parts unpacked, markup included."""

    def units(self) -> Sequence[str]:
        """Books."""
        return list_files(self.path, (".epub",), "an EPUB book")

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        return [locate(self.path, unit)[0]]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """The book."""
        path = locate(self.path, unit)[0]
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise Unreadable(TOO_LARGE)
            with zipfile.ZipFile(path) as archive:
                yield self._book(archive, unit)
        except Unreadable as error:
            yield Rejected(unit, error.reason)
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, NotImplementedError, EOFError, OSError):
            yield Rejected(unit, "damaged archive")
        except RuntimeError:  # what zipfile raises for a password
            yield Rejected(unit, "encrypted")

    def _book(self, archive: zipfile.ZipFile, unit: str) -> Document | Rejected:
        container = _elements(_member(archive, "META-INF/container.xml", _MAX_PACKAGE_BYTES))
        package = next((attributes.get("full-path", "") for name, attributes, _ in container if name == "rootfile"), "")
        elements = _elements(_member(archive, package, _MAX_PACKAGE_BYTES))
        paths = {a.get("id", ""): a.get("href", "") for name, a, _ in elements if name == "item"}
        spine = [paths[a["idref"]] for name, a, _ in elements if name == "itemref" and a.get("idref") in paths]
        left = self.bounds.max_document_bytes
        parts = []
        for href in spine:
            place = posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(href)))
            if place not in archive.NameToInfo:
                continue
            content = _member(archive, place, left)
            left -= len(content)
            parts.append(fragment_to_text(decode_html(content)).strip())
        metadata: Metadata = {}
        for key in ("title", "creator", "language", "rights"):
            if found := next((text.strip() for name, _, text in elements if name == key and text.strip()), None):
                metadata[key] = found
        text = "\n\n".join(part for part in parts if part)
        return to_document(text, unit, self.bounds.max_document_bytes, metadata)


def _member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """A file out of an archive, however large it says it is.

    Raises:
        Unreadable: it is larger than `max_bytes`.
    """
    with archive.open(name) as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise Unreadable(TOO_LARGE)
    return content


def _elements(content: bytes) -> list[tuple[str, dict[str, str], str]]:
    """Name without prefix, attributes and own text of every element of an XML file.

    Raises:
        Unreadable: it is malformed, or declares entities.
    """
    found: list[tuple[str, dict[str, str], str]] = []
    texts: list[list[str]] = []
    open_elements: list[int] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        open_elements.append(len(found))
        found.append((name.rpartition(":")[2], attributes, ""))
        texts.append([])

    def end(_: str) -> None:
        number = open_elements.pop()
        found[number] = (*found[number][:2], "".join(texts[number]))

    def characters(text: str) -> None:
        if open_elements:
            texts[open_elements[-1]].append(text)

    def entity(*_: object) -> None:
        raise Unreadable("XML entity declaration")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = characters
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise Unreadable("malformed XML") from error
    return found
