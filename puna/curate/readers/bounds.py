"""Bounds on what one input may cost, and streams that keep to them whatever the input holds.

Dumps come from strangers: archives cut off in transfer, lines without end, a megabyte that unpacks to a terabyte. Here
each becomes an `Unreadable` with a reason, after everything before it has been read, in memory that does not depend on
the input.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

EXPANSION_ALLOWANCE = 100_000_000
"""Bytes that any file may unpack to, whatever its own size."""

CHUNK = 1 << 16
"""Bytes read at a time. What an error takes with it is less than this."""

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}


class Unreadable(Exception):
    """An input that goes no further; its one argument is the reason, a fixed phrase."""

    @property
    def reason(self) -> str:
        """Why."""
        return str(self.args[0])


@dataclass(frozen=True)
class Bounds:
    """What one input may cost."""

    max_document_bytes: int = 20_000_000
    """Longer documents are rejected, and never held in memory whole."""
    max_expansion: int = 200
    """A compressed file may unpack to this many times its size (and 100 MB more); what would follow is rejected."""

    def __post_init__(self) -> None:
        if self.max_document_bytes < 1 or self.max_expansion < 1:
            raise ValueError("max_document_bytes and max_expansion have to be at least 1.")


class _Expanding(io.RawIOBase):
    """A decompressed stream that counts."""

    def __init__(self, packed: BinaryIO, compression: str, max_bytes: int) -> None:
        import pyarrow as pa

        # Arrow's streams read concatenated members, and say when the last one is cut off (zstandard's do not).
        self._stream = pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), compression)
        self._packed = packed
        self._left = max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        try:
            content = self._stream.read(min(len(view), CHUNK))
        except OSError as error:
            raise Unreadable("damaged or cut-off compression") from error
        self._left -= len(content)
        if self._left < 0:
            raise Unreadable("expands beyond max_expansion")
        view[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._packed.close()
        super().close()


def expand(packed: BinaryIO, packed_bytes: int, bounds: Bounds) -> IO[bytes]:
    """The bytes of a stream that may be gzip, bzip2 or Zstandard, told by its first bytes; else the stream itself.

    Reading raises `Unreadable` where the compression is damaged, cut off, or expands too far.

    Args:
        packed: a seekable stream at its start.
        packed_bytes: its length.
        bounds: how far it may expand.
    """
    start = packed.read(4)
    packed.seek(0)
    for magic, compression in _MAGIC.items():
        if start.startswith(magic):
            limit = packed_bytes * bounds.max_expansion + EXPANSION_ALLOWANCE
            return io.BufferedReader(_Expanding(packed, compression, limit), CHUNK)
    return packed


def open_expanded(path: Path, bounds: Bounds) -> IO[bytes]:
    """`expand` of a file; `Unreadable` where it is not there (any more) or may not be read."""
    try:
        return expand(path.open("rb", buffering=CHUNK), path.stat().st_size, bounds)
    except OSError as error:
        raise Unreadable("not readable") from error


def read_lines(stream: IO[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Each line with the offset that it starts at; None for one of more than `max_bytes`, which is skipped."""
    offset = 0
    while line := stream.readline(max_bytes + 1):
        start = offset
        offset += len(line)
        too_long = len(line) > max_bytes and not line.endswith(b"\n")
        rest = line
        while too_long and rest and not rest.endswith(b"\n"):
            rest = stream.readline(CHUNK)
            offset += len(rest)
        yield start, None if too_long else line
