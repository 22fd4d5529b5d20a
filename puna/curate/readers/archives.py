"""Members of tar archives from strangers."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from puna.curate.readers.bounds import Bounds, Unreadable

_MAX_HEADER_BYTES = 1 << 20
"""Of a name or an extended header; they are held in memory before anything about them is known."""

_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive."""

    name: str
    """Its path there, without a leading ./ or /."""
    size: int
    """In bytes."""
    content: bytes | None
    """None where it is larger than what is read."""


class _Header(tarfile.TarInfo):
    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS and self.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header of more than a megabyte")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]


def read_tar(stream: IO[bytes], bounds: Bounds) -> Iterator[Member]:
    """The regular files of a tar stream that is already expanded, in their order.

    Raises:
        Unreadable: it is damaged or cut off; after the members before that.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
            for entry in archive:
                # What was read is remembered by the archive, which of a long one takes too much memory.
                archive.members = []  # type: ignore[attr-defined]
                # A sparse member's size is what it claims, not what is there.
                if not entry.isreg() or entry.issparse():
                    continue
                name = entry.name.removeprefix("./").lstrip("/")
                if entry.size > bounds.max_document_bytes:
                    yield Member(name, entry.size, None)
                    continue
                extracted = archive.extractfile(entry)
                yield Member(name, entry.size, extracted.read() if extracted else b"")
    except (tarfile.TarError, EOFError, RecursionError, UnicodeError, ValueError) as error:
        raise Unreadable("damaged or cut-off archive") from error
