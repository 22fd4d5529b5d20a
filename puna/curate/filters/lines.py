"""Lines in UTF-8 bytes, as Python's `str.splitlines`, `strip` and `isspace` see them, for numba kernels."""

from numba import njit

from puna.batches.words import Bytes, decode


@njit(cache=True, nogil=True, inline="always")
def next_line(data: Bytes, at: int, end: int) -> tuple[int, int]:
    """End of the line that begins at `at`, and where the one after it begins."""
    while at < end:
        byte = data[at]
        if byte <= 0x1E and (0x0A <= byte <= 0x0D or byte >= 0x1C):
            return at, at + 2 if byte == 0x0D and at + 1 < end and data[at + 1] == 0x0A else at + 1
        if byte == 0xC2 and data[at + 1] == 0x85:
            return at, at + 2
        if byte == 0xE2 and data[at + 1] == 0x80 and data[at + 2] & 0xFE == 0xA8:
            return at, at + 3
        at += 1
    return end, end


@njit(cache=True, nogil=True, inline="always")
def is_space(code: int) -> bool:
    """Whether a code point is white space."""
    if code <= 0x20:
        return 0x09 <= code <= 0x0D or code >= 0x1C
    if code < 0x1680:
        return code == 0x85 or code == 0xA0
    if code < 0x3000:
        return code <= 0x1680 or 0x2000 <= code <= 0x200A or code in (0x2028, 0x2029, 0x202F, 0x205F)
    return code == 0x3000


@njit(cache=True, nogil=True)
def strip_left(data: Bytes, at: int, end: int) -> int:
    """Where the first character of [at, end) begins that is not white space, or `end`."""
    while at < end:
        code, size = decode(data, at)
        if not is_space(code):
            break
        at += size
    return at


@njit(cache=True, nogil=True)
def strip_right(data: Bytes, start: int, end: int) -> int:
    """Where the last character of [start, end) ends that is not white space, or `start`."""
    while end > start:
        last = last_character(data, end)
        if not is_space(decode(data, last)[0]):
            break
        end = last
    return end


@njit(cache=True, nogil=True, inline="always")
def last_character(data: Bytes, end: int) -> int:
    """Where the character begins that ends at `end`."""
    end -= 1
    while data[end] & 0xC0 == 0x80:
        end -= 1
    return end


@njit(cache=True, nogil=True)
def count_characters(data: Bytes, start: int, end: int) -> int:
    """Unicode characters in bytes [start, end)."""
    count = 0
    for at in range(start, end):
        count += data[at] & 0xC0 != 0x80
    return count


@njit(cache=True, nogil=True)
def ends_in_ellipsis(data: Bytes, start: int, end: int) -> bool:
    """Whether [start, end) ends in "..." or "…"."""
    if end - start < 3:
        return False
    dots = data[end - 1] == 0x2E and data[end - 2] == 0x2E and data[end - 3] == 0x2E
    return bool(dots or (data[end - 3] == 0xE2 and data[end - 2] == 0x80 and data[end - 1] == 0xA6))
