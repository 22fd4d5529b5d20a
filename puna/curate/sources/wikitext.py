"""Wikitext to text: what a reader of the article sees, as plain lines.

LLaMA (Touvron et al. 2023), section 2.1, Wikipedia: "We process the data to remove hyperlinks, comments and other
formatting boilerplate."

Own passes over the text rather than a parser's tree: mwparserfromhell, which the tests compare with, takes many
times as long. Each pass is linear in the text, whatever is left open in it.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from puna.curate.document import Outcome
from puna.curate.filters.texts import split_with_texts

_REDIRECT = re.compile(r"\s*#\s?\w{4,30}\s*:?\s*\[\[")
_DROPPED = (
    "ref|references|gallery|timeline|imagemap|score|templatestyles|mapframe|maplink|graph|hiero|chem|categorytree"
)
_DROPPED_TAG = re.compile(rf"<(/?)({_DROPPED})\b[^<>]*?(/?)>", re.IGNORECASE)
_TAG = re.compile(r"</?(?:[a-zA-Z][a-zA-Z0-9]*)(?:\s[^<>]*)?/?>")
_BREAK = re.compile(r"<(?:br|hr|/?p|/?div|/?blockquote|/?poem|/?center)\b[^<>]*>", re.IGNORECASE)
_SHOWN = re.compile(
    r"\{\{\s*+(?:(?:lang|script)\s*+\|[^{}|]*+\||transl\s*+\|[^{}|]*+\|(?:[^{}|]*+\|)?"
    r"|(?:lang-[a-z-]+|nowrap|nobr|small|abbr|sic)\s*+\|)"
    r"([^{}|=]*+)(?:\|[^{}]*+)?\}\}",
    re.IGNORECASE,
)
"""Templates that show what they are given: in another script, without line breaks."""
_CONVERTED = re.compile(r"\{\{\s*+(?:convert|cvt)\s*+\|([^{}|]*+)\|([^{}|]*+)(?:\|[^{}]*+)?\}\}", re.IGNORECASE)
"""Templates that show a number and its unit."""
_BRACES = re.compile(r"\{\{|\}\}")
_TABLES = re.compile(r"^[ \t]*+:*+[ \t]*+(\{\|)|^[ \t]*+(\|\})(?!\})", re.MULTILINE)
_LINKS = re.compile(r"\[\[|\]\]")
_MEDIA = re.compile(
    r"\s*+:?\s*+(?:file|image|media|category|datei|bild|kategorie|fichier|catégorie|archivo|imagen|categoría|immagine|categoria"
    r"|bestand|afbeelding|categorie|plik|grafika|kategoria|ficheiro|arquivo|imagem|soubor|obrázek|kategória|kategorie"
    r"|fil|billede|kategori|fitxer|imatge|fájl|kép|fișier|imagine|slika|datoteka|kategorija|файл|изображение|категория"
    r"|зображення|категорія|картинка|слика|датотека|категорија|медиа)\s*:",
    re.IGNORECASE,
)
"""Names of the namespaces File and Category in the 20 languages of the paper."""
_INTERLANGUAGE = re.compile(r"\s*[a-z]{2,3}(?:-[a-z]+)*\s*:\s*\S")
_EXTERNAL = re.compile(r"\[(?:(?:https?:|ftp:)?//|mailto:)[^\s\[\]<>]*+[ \t]*+([^\[\]\n]*+)\]")
_HEADING = re.compile(r"^[ \t]*+(={1,6})(.+?)\1[ \t]*$", re.MULTILINE)
_QUOTES = re.compile(r"'{2,5}")
_MARKERS = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
_SWITCH = re.compile(r"__[A-Z]{3,20}__|^----+", re.MULTILINE)
_EMPTY_PARENTHESES = re.compile(r"[ \t]?\((?:[\s,;:]|&nbsp;)*\)")
_LOOSE_OPENING = re.compile(r"\([\s,;]+")

_HEADING_MARK = "\ue000"
"""Private character that stands before a heading until empty sections are dropped."""


@dataclass(frozen=True)
class Wikitext:
    """Makes text of wikitext: without templates, tables, references, comments, files; links as what they show."""

    kind: Literal["wikitext"] = "wikitext"
    """Wikitext to text: templates, tables, references, comments and hyperlinks removed."""
    title_column: str = "title"
    """Column whose value becomes the first line; empty for none."""

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject with "redirect" or "no text besides markup"."""
        before = documents["text"].to_pylist()
        titled = self.title_column in documents.column_names
        titles = documents[self.title_column].to_pylist() if titled else [None] * len(before)
        texts: list[str] = []
        reasons: list[str | None] = []
        for text, title in zip(before, titles, strict=True):
            redirect = _REDIRECT.match(text)
            body = "" if redirect else clean_wikitext(text)
            texts.append(f"{title}\n\n{body}" if title else body)
            reasons.append("redirect" if redirect else None if body else "no text besides markup")
        return split_with_texts(documents, pa.array(texts, pa.string()), pa.array(reasons, pa.string()), {})


def clean_wikitext(text: str) -> str:
    """The text of an article: paragraphs, list items and headings as lines; sections without text are left out."""
    text = text.replace(_HEADING_MARK, "")
    text = _without_between(text, "<!--", "-->")
    text = _without_elements(text)
    text = _CONVERTED.sub(r"\1 \2", _SHOWN.sub(r"\1", text))
    text = _without_pairs(text, _BRACES, "{{")
    text = _without_pairs(text, _TABLES, "{|")
    text = _links_to_text(text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _TAG.sub("", _BREAK.sub("\n", text))
    text = html.unescape(text)
    text = _SWITCH.sub("", _QUOTES.sub("", text))
    text = _HEADING.sub(lambda found: _HEADING_MARK + found[1] + found[2], text)
    text = _MARKERS.sub("", text)
    text = _LOOSE_OPENING.sub("(", _EMPTY_PARENTHESES.sub("", text))
    return _lines(text)


def _without_between(text: str, start: str, end: str) -> str:
    """Everything from `start` to the next `end` removed; a start that nothing ends, with all that follows."""
    first, *rest = text.split(start)
    return first + "".join(part.partition(end)[2] for part in rest)


def _without_elements(text: str) -> str:
    """Elements whose content is no running text removed; tags without their other half are removed alone."""
    tags = list(_DROPPED_TAG.finditer(text))
    last_end = {tag[2].lower(): tag.start() for tag in tags if tag[1]}
    parts: list[str] = []
    position, inside = 0, ""
    for tag in tags:
        name = tag[2].lower()
        if inside:
            if tag[1] and name == inside:
                position, inside = tag.end(), ""
            continue
        parts.append(text[position : tag.start()])
        position = tag.end()
        if not tag[1] and not tag[3] and last_end.get(name, -1) > tag.start():
            inside = name
    return "".join(parts) + text[position:]


def _without_pairs(text: str, pattern: re.Pattern[str], opening: str) -> str:
    """Everything between a bracket and its partner removed, nested ones along; brackets without partner stay."""
    parts: list[str] = []
    position = 0
    for start, end in _outermost(text, pattern, opening):
        parts.append(text[position:start])
        position = end
    return "".join(parts) + text[position:]


def _outermost(text: str, pattern: re.Pattern[str], opening: str) -> Iterator[tuple[int, int]]:
    """Pairs of brackets that are in no other pair, in order."""
    starts: list[int] = []
    pairs: list[tuple[int, int]] = []
    for found in pattern.finditer(text):
        if found[0].endswith(opening):
            starts.append(found.end() - len(opening))
        elif starts:
            start = starts.pop()
            while pairs and pairs[-1][0] > start:
                pairs.pop()
            pairs.append((start, found.end()))
    return iter(pairs)


def _links_to_text(text: str) -> str:
    """Links as the text that they show; files, categories and links to other languages removed."""
    stack: list[list[str]] = [[]]
    position = 0
    for found in _LINKS.finditer(text):
        stack[-1].append(text[position : found.start()])
        position = found.end()
        if found[0] == "[[":
            stack.append([])
        elif len(stack) > 1:
            inner = "".join(stack.pop())
            stack[-1].append(_shown(inner))
    stack[-1].append(text[position:])
    return "".join(piece for level in stack for piece in level)


def _shown(link: str) -> str:
    target, bar, label = link.partition("|")
    if _MEDIA.match(target) and not target.lstrip().startswith(":"):
        return ""
    if bar:
        # Of several labels, which only files have, the last; an empty one stands for the target without its namespace.
        shown = target.rpartition(":")[2].strip()
        return label.rpartition("|")[2] or (shown[: shown.rfind("(")].rstrip() if shown.endswith(")") else shown)
    return "" if _INTERLANGUAGE.match(target) else target.removeprefix(":")


def _lines(text: str) -> str:
    """Lines without space around them, at most one blank line in a row, headings only where text follows."""
    kept: list[str] = []
    waiting: list[tuple[int, str]] = []
    for raw in text.split("\n"):
        line = raw.strip()
        if line.startswith(_HEADING_MARK):
            title = line[1:].lstrip("=")
            level = len(line) - 1 - len(title)
            while waiting and waiting[-1][0] >= level:
                waiting.pop()
            waiting.append((level, title.strip()))
        elif any(map(str.isalnum, line)):
            for _, title in waiting:
                kept += ["", title, ""]
            waiting = []
            kept.append(line)
        elif kept and kept[-1]:
            kept.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
