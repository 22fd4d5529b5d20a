"""GGUF's container: typed metadata, and where in the file each tensor lies (ggml, docs/gguf.md, versions 2 and 3).

What the metadata means for a tokenizer is in `puna.tokenizer.gguf`, for a model in `puna.weights.gguf`.

A file comes from strangers. Everything in it that says how much there is of something is compared with the file's own
size before anything is done with it, so time and memory stay in proportion to the file.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from puna.runtime.errors import InputError

Value = TypeVar("Value", bool, int, float, str)

SUFFIX = ".gguf"

_MAGIC = b"GGUF"
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4


class Encoding(NamedTuple):
    """A tensor's type: its number in the file, and how many bytes hold how many elements."""

    name: str
    number: int
    block_elements: int
    block_bytes: int


ENCODINGS = {
    encoding.number: encoding
    for encoding in (
        Encoding("F32", 0, 1, 4),
        Encoding("F16", 1, 1, 2),
        Encoding("Q4_0", 2, 32, 18),
        Encoding("Q4_1", 3, 32, 20),
        Encoding("Q5_0", 6, 32, 22),
        Encoding("Q5_1", 7, 32, 24),
        Encoding("Q8_0", 8, 32, 34),
        Encoding("Q4_K", 12, 256, 144),
        Encoding("Q5_K", 13, 256, 176),
        Encoding("Q6_K", 14, 256, 210),
        Encoding("BF16", 30, 1, 2),
    )
}
"""What Puna reads, by the number in the file."""

BY_NAME = {encoding.name: encoding for encoding in ENCODINGS.values()}


class _Kind(IntEnum):
    """Type of a metadata value."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_DTYPE: dict[_Kind, np.dtype[Any]] = {
    _Kind.UINT8: np.dtype("<u1"),
    _Kind.INT8: np.dtype("<i1"),
    _Kind.UINT16: np.dtype("<u2"),
    _Kind.INT16: np.dtype("<i2"),
    _Kind.UINT32: np.dtype("<u4"),
    _Kind.INT32: np.dtype("<i4"),
    _Kind.FLOAT32: np.dtype("<f4"),
    _Kind.BOOL: np.dtype("<u1"),
    _Kind.UINT64: np.dtype("<u8"),
    _Kind.INT64: np.dtype("<i8"),
    _Kind.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the file."""

    shape: tuple[int, ...]
    """Outermost dimension first, as torch counts; the file counts the other way round."""
    encoding: Encoding
    start: int
    """Where its bytes begin, counted from the beginning of the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """An opened file; its tensors stay on the disk until they are looked at."""

    path: Path
    metadata: Mapping[str, Any]
    """Numbers, booleans and strings as Python's; lists of strings as lists; lists of numbers as arrays."""
    tensors: Mapping[str, StoredTensor]
    content: NDArray[np.uint8]
    """The file, memory-mapped."""

    def get(self, key: str, kind: type[Value]) -> Value | None:
        """The metadata under `key`, None where there is none.

        Raises:
            InputError: it is of another kind (a whole number is a float as well).
        """
        value = self.metadata.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if value is None or (isinstance(value, kind) and type(value) is kind):
            return value
        shown = value if isinstance(value, bool | int | float | str) else f"a list of {len(value)}"
        raise InputError(f"{self.path}: {key} has to be of type {kind.__name__}, not {_short(str(shown))}.")

    def blocks(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, shape [blocks, bytes of a block]."""
        tensor = self.tensors[name]
        return self.content[tensor.start : tensor.start + tensor.num_bytes].reshape(-1, tensor.encoding.block_bytes)


def gguf_path(path: Path) -> Path | None:
    """The GGUF file at `path`: itself, or the only one in a folder; None where there is none."""
    if path.is_dir():
        inside = sorted(path.glob(f"*{SUFFIX}"))
        if len(inside) > 1:
            raise InputError(f"{path} holds {len(inside)} GGUF files; name the one that is meant.")
        return inside[0] if inside else None
    return path if path.suffix == SUFFIX else None


class _Broken(ValueError):
    """What is wrong with the file, as the end of a sentence."""


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file.

    Raises:
        InputError: it is none, is cut short, contradicts itself, or its tensors are of types that Puna does not read.
    """
    if path.stat().st_size < len(_MAGIC):
        raise InputError(f"{path} is not a GGUF file: it has {path.stat().st_size} bytes.")
    # "c" because torch wants memory that may be written; what is written never reaches the file.
    content: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="c")
    try:
        return _parse(path, content)
    except _Broken as error:
        raise InputError(
            f"{path} is not a whole GGUF file that Puna reads: {error}. Interrupted downloads and Git LFS pointers "
            "look like this; fetch it again."
        ) from error


class _Reader:
    """Takes values from the front of a file, never beyond its end."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self._content = content.data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self._content) - self.position

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > self.left:
            raise _Broken("it ends in the middle of its header")
        part = self._content[self.position : self.position + num_bytes]
        self.position += num_bytes
        return part

    def unsigned(self, num_bytes: int) -> int:
        return int.from_bytes(self.take(num_bytes), "little")

    def text(self) -> str:
        try:
            return str(self.take(self.unsigned(8)), "utf-8")
        except UnicodeDecodeError as error:
            raise _Broken("a text in it is not UTF-8") from error

    def kind(self) -> _Kind:
        number = self.unsigned(4)
        try:
            return _Kind(number)
        except ValueError as error:
            raise _Broken(f"a value in its metadata is of an unknown type ({number})") from error

    def value(self, kind: _Kind) -> Any:
        if kind is _Kind.STRING:
            return self.text()
        if kind is not _Kind.ARRAY:
            dtype = _DTYPE[kind]
            number = np.frombuffer(self.take(dtype.itemsize), dtype)[0]
            if kind is _Kind.FLOAT32:
                return float(str(number))  # 1e-05, which somebody wrote, in place of its nearest 32-bit neighbour
            return bool(number) if kind is _Kind.BOOL else number.item()
        inner, count = self.kind(), self.unsigned(8)
        if inner is _Kind.ARRAY:
            raise _Broken("its metadata holds lists of lists")
        if inner is _Kind.STRING:
            if count * 8 > self.left:  # each begins with its length
                raise _Broken("it ends in the middle of its header")
            return [self.text() for _ in range(count)]
        values = np.frombuffer(self.take(count * _DTYPE[inner].itemsize), _DTYPE[inner])
        return values.astype(np.bool_) if inner is _Kind.BOOL else values.copy()


def _parse(path: Path, content: NDArray[np.uint8]) -> GgufFile:
    reader = _Reader(content)
    if bytes(reader.take(len(_MAGIC))) != _MAGIC:
        raise _Broken("it does not begin with GGUF")
    version = reader.unsigned(4)
    if version not in (2, 3):
        big_endian = version >= 1 << 24
        raise _Broken("its numbers are big-endian" if big_endian else f"it is of version {version}, not 2 or 3")
    num_tensors, num_values = reader.unsigned(8), reader.unsigned(8)
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = reader.text()
        if key in metadata:
            raise _Broken(f"its metadata has {_short(key)} twice")
        metadata[key] = reader.value(reader.kind())
    alignment = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _Broken(f"{_ALIGNMENT_KEY} is {alignment!r}, not a power of two")
    relative = dict(_tensor_headers(reader, num_tensors))
    data_start = -(-reader.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, (shape, encoding, offset) in relative.items():
        if offset % alignment:
            raise _Broken(f"tensor {_short(name)} does not begin at a multiple of {alignment} bytes")
        num_bytes = math.prod(shape) // encoding.block_elements * encoding.block_bytes
        if data_start + offset + num_bytes > len(content):
            raise _Broken(f"tensor {_short(name)} ends beyond the end of the file")
        tensors[name] = StoredTensor(shape, encoding, data_start + offset, num_bytes)
    in_order = sorted(tensors, key=lambda name: tensors[name].start)
    for earlier, later in pairwise(in_order):
        if tensors[earlier].start + tensors[earlier].num_bytes > tensors[later].start:
            raise _Broken(f"tensors {_short(earlier)} and {_short(later)} overlap")
    return GgufFile(path, metadata, tensors, content)


def _tensor_headers(reader: _Reader, count: int) -> Iterator[tuple[str, tuple[tuple[int, ...], Encoding, int]]]:
    """Name, and (shape, encoding, offset in the data) of each tensor."""
    seen: set[str] = set()
    for _ in range(count):
        name = reader.text()
        if name in seen:
            raise _Broken(f"there are two tensors {_short(name)}")
        seen.add(name)
        num_dims = reader.unsigned(4)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise _Broken(f"tensor {_short(name)} has {num_dims} dimensions")
        shape = tuple(reader.unsigned(8) for _ in range(num_dims))[::-1]
        number, offset = reader.unsigned(4), reader.unsigned(8)
        if number not in ENCODINGS:
            raise _Broken(
                f"tensor {_short(name)} is of type {number}; Puna reads {', '.join(BY_NAME)} and no other type, "
                "so take another variant of the model"
            )
        encoding = ENCODINGS[number]
        if min(shape) < 1 or shape[-1] % encoding.block_elements:
            raise _Broken(f"tensor {_short(name)} has a shape that {encoding.name} cannot hold: {shape}")
        yield name, (shape, encoding, offset)


def _short(name: str) -> str:
    return repr(name if len(name) <= 64 else f"{name[:64]}...")


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[tuple[str, tuple[int, ...], Encoding]],
    data: Iterable[NDArray[np.uint8]],
) -> None:
    """Write a GGUF file of version 3.

    Args:
        metadata: booleans, strings, whole numbers (stored in 32 bits where they fit), floats (32 bits), lists of
            strings, one-dimensional arrays of numbers.
        tensors: name, shape (outermost first) and encoding of each.
        data: the bytes of each, in the same order; taken one at a time.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    header = bytearray(_MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _text(key) + _value(value)
    offset = 0
    sizes = []
    for name, shape, encoding in tensors:
        assert shape[-1] % encoding.block_elements == 0, f"{name} of shape {shape} in {encoding.name}"
        header += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", encoding.number, offset)
        sizes.append(math.prod(shape) // encoding.block_elements * encoding.block_bytes)
        offset += _padded(sizes[-1])
    with path.open("wb") as file:
        file.write(header)
        _pad(file, len(header))
        for size, part in zip(sizes, data, strict=True):
            assert part.nbytes == size
            file.write(np.ascontiguousarray(part).data)
            _pad(file, size)


def _padded(size: int) -> int:
    return -(-size // _DEFAULT_ALIGNMENT) * _DEFAULT_ALIGNMENT


def _pad(file: BinaryIO, written: int) -> None:
    file.write(bytes(_padded(written) - written))


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    """Type and content of a metadata value."""
    if isinstance(value, bool):
        return struct.pack("<IB", _Kind.BOOL, value)
    if isinstance(value, int):
        kind, code = (_Kind.UINT32, "I") if 0 <= value < 1 << 32 else (_Kind.INT64, "q")
        return struct.pack(f"<I{code}", kind, value)
    if isinstance(value, float):
        return struct.pack("<If", _Kind.FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _Kind.STRING) + _text(value)
    if isinstance(value, np.ndarray):
        dtype = value.dtype.newbyteorder("<")
        kind = next(kind for kind, stored in _DTYPE.items() if stored == dtype and kind is not _Kind.BOOL)
        return struct.pack("<IIQ", _Kind.ARRAY, kind, len(value)) + value.astype(dtype).tobytes()
    return struct.pack("<IIQ", _Kind.ARRAY, _Kind.STRING, len(value)) + b"".join(map(_text, value))
