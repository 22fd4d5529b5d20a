"""Bytes to text, and text to documents that any later step can rely on."""

from collections.abc import Collection, Mapping

from puna.curate.document import Document, Rejected

Metadata = dict[str, str | int | float | bool]
"""What is known of a document besides its text."""

TOO_LARGE = "larger than max_document_bytes"

_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_INT64 = range(-(2**63), 2**63)


def decode(content: bytes, declared: str | None = None, html: bool = False) -> str:
    """Text in whatever encoding it turns out to be.

    A byte order mark decides; then valid UTF-8 does (other encodings are valid UTF-8 by accident only where the
    declaration cannot matter, save ISO-2022-JP with its escapes); then the declared encoding, then what an HTML page's
    <meta> says, then detection by byte statistics. Bytes that remain invalid become U+FFFD.

    Args:
        content: the bytes.
        declared: an encoding's name from a header, right or wrong, known or unknown.
        html: look for <meta charset>.
    """
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

    for mark, encoding in _BOMS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, "replace")
    if b"\x1b" not in content:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            pass
    named = map_encoding_to_html5(declared, False) if declared else None
    if named not in (None, "utf-8"):
        try:
            return content.decode(named)
        except UnicodeDecodeError:
            pass
    found = detect_encoding(content, from_html_meta=html) or "utf-8"
    return content.decode(found, "replace")


def to_document(
    text: str, name: str, max_bytes: int, metadata: Mapping[str, str | int | float | bool]
) -> Document | Rejected:
    """A document with \\n line ends and valid Unicode, or why there is none."""
    if len(text) > max_bytes:
        return Rejected(name, TOO_LARGE)
    if "\0" in text:
        return Rejected(name, "binary")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.removeprefix("\ufeff")
    if not text.strip():
        return Rejected(name, "empty")
    text = valid_unicode(text)
    if len(text) * 4 > max_bytes and len(text.encode()) > max_bytes:
        return Rejected(name, TOO_LARGE)
    return Document(text, name, metadata)


def valid_unicode(text: str) -> str:
    """Pairs of surrogates joined, lone ones (which no file can hold) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class MetadataOf:
    """Picks metadata out of rows, with one type for each name, so that the values fit into one column.

    The first value seen of a name sets its type; values of other types, nested ones and integers beyond 64 bits are
    left out.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._types: dict[str, type] = {}

    def __call__(self, row: Mapping[str, object]) -> Metadata:
        """The metadata of one row."""
        found: Metadata = {}
        for name in self._names:
            value = row.get(name)
            if not isinstance(value, (str, int, float, bool)) or (isinstance(value, int) and value not in _INT64):
                continue
            if self._types.setdefault(name, type(value)) is type(value):
                found[name] = valid_unicode(value) if isinstance(value, str) else value
        return found
