"""HTML to text: what a reader of the page came for, without the frame around it."""

import re
from dataclasses import dataclass
from typing import Literal

from puna.curate.readers.text import decode

MAX_DEPTH = 1000
"""Of nested elements that the search for the main content is given; beyond that its time grows with the square."""

_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9-]*)")
_NOT_NESTING = re.compile(
    r"area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr"
    r"|p|li|dt|dd|tr|td|th|thead|tbody|tfoot|option|optgroup|colgroup|rp|rt"
)
"""Elements that hold nothing, or that the next of their like closes."""
_LANGUAGE = re.compile(r"<html[^<>]{0,500}?\blang\s*=\s*[\"']?([a-zA-Z]{2,3}(?:-[a-zA-Z0-9]{2,8})*)", re.IGNORECASE)


@dataclass(frozen=True)
class HtmlToText:
    """How text is taken out of HTML."""

    library: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """resiliparse finds more of the text; trafilatura leaves out more of the frame, and takes ten times as long."""
    main_content: bool = True
    """Leave out navigation, comments, footers and the like. Only resiliparse can do without."""
    min_characters: int = 200
    """Where less main content than this is found, the whole page is taken."""

    def __post_init__(self) -> None:
        if self.library == "trafilatura" and not self.main_content:
            raise ValueError("trafilatura always looks for the main content; set library to resiliparse.")

    def __call__(self, html: str) -> str:
        """The text of a page, a paragraph or list item a line."""
        if not self.main_content or _depth(html) > MAX_DEPTH:
            return _whole(html)
        if self.library == "trafilatura":
            from trafilatura import extract

            text = extract(html, include_comments=False) or ""
        else:
            from resiliparse.extract.html2text import extract_plain_text

            text = extract_plain_text(
                html, main_content=True, preserve_formatting=True, alt_texts=False, comments=False
            )
        return text if len(text) >= self.min_characters else _whole(html)


def decode_html(content: bytes, declared: str | None = None) -> str:
    """HTML in the encoding that the HTTP header, the page itself, or its bytes tell."""
    return decode(content, declared, html=True)


def fragment_to_text(html: str) -> str:
    """A piece of HTML that is all content, such as the body of a post: code blocks keep their lines."""
    return _whole(html)


def language_of(html: str) -> str | None:
    """What the page says that it is written in, as an ISO 639 code."""
    found = _LANGUAGE.search(html[:5000])
    return found[1].lower() if found else None


def _whole(html: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    text: str = extract_plain_text(html, main_content=False, preserve_formatting=True, alt_texts=False)
    return text


def _depth(html: str) -> int:
    """An upper estimate of how deep elements nest."""
    if html.count("<") <= MAX_DEPTH:
        return 0
    depth = deepest = 0
    for closing, name in _TAG.findall(html):
        if not _NOT_NESTING.fullmatch(name.lower()):
            depth = max(depth - 1, 0) if closing else depth + 1
            deepest = max(deepest, depth)
    return deepest
