"""How vocabulary files spell bytes."""

import re
from functools import cache

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def is_byte_piece(piece: str) -> bool:
    """Whether a SentencePiece piece is one of the 256 that stand for single bytes, such as `<0x0A>`."""
    return _BYTE_PIECE.fullmatch(piece) is not None


def piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: `▁` is a blank, `<0x0A>` one byte, all else its UTF-8."""
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


@cache
def byte_to_unicode() -> dict[int, str]:
    """The visible character by which byte-level BPE files write each byte (GPT-2, `bytes_to_unicode`).

    Visible Latin-1 characters stand for themselves; the others for U+0100 and on, in the order of their
    values.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@cache
def unicode_to_byte() -> dict[str, int]:
    """The inverse of `byte_to_unicode`."""
    return {char: byte for byte, char in byte_to_unicode().items()}
