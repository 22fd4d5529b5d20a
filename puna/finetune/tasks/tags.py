"""Tags of words: reading them, telling their scheme, and changing from one scheme to another.

BIO1    I-X; B-X only where an entity follows another of the same type
BIO2    B-X begins every entity, I-X goes on
BIOES   B-X, I-X, E-X for begin, middle, end; S-X for an entity of one word (BILOU's L and U are read as E and S)
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puna.batches.tables import Row, read_table, text_lines
from puna.runtime.errors import InputError

Scheme = Literal["BIO1", "BIO2", "BIOES"]

_TAG = re.compile(r"O|([BIESLU])-(.+)")
_TABLES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words with their tags."""

    words: list[str]
    """The words."""
    tags: list[str]
    """As many."""
    places: list[str]
    """Where each word stands, for errors."""


@dataclass(frozen=True, slots=True, order=True)
class Entity:
    """Words [start, stop) of a sentence."""

    start: int
    stop: int
    type: str


def read_sentences(path: Path, from_row: Callable[[Row], Sentence]) -> list[Sentence]:
    """Sentences of a file in CoNLL format (a word a line, its tag last, empty lines between sentences), or of a table.

    Args:
        from_row: the sentence in a row of a table.

    Raises:
        InputError: a line that is broken, with its number; or there is no sentence.
    """
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    sentences = list(map(_checked, map(from_row, read_table(path))) if suffix in _TABLES else _from_conll(path))
    if not sentences:
        raise InputError(f"{path} holds no sentence.")
    return sentences


def from_lists(row: Row, words_column: str, tags_column: str) -> Sentence:
    """The sentence in a row with a list of words and a list of tags.

    Raises:
        InputError: the row has no such lists, or they differ in length.
    """
    words, tags = row.values.get(words_column), row.values.get(tags_column)
    for column, value in ((words_column, words), (tags_column, tags)):
        if not isinstance(value, list) or not value or not all(isinstance(part, str) for part in value):
            raise InputError(
                f"{row.where} has no list of strings in its column {column!r}; it has {', '.join(row.values)}."
            )
    assert isinstance(words, list)
    assert isinstance(tags, list)
    if len(words) != len(tags):
        raise InputError(f"{row.where} has {len(words)} words, but {len(tags)} tags.")
    places = [f"{row.where}, word {number}" for number in range(1, len(words) + 1)]
    return Sentence(words, tags, places)


def _from_conll(path: Path) -> Iterator[Sentence]:
    width = 0
    words: list[str] = []
    tags: list[str] = []
    places: list[str] = []
    for number, line in text_lines(path):
        where = f"{path}, line {number}"
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            if words:
                yield _checked(Sentence(words, tags, places))
                words, tags, places = [], [], []
            continue
        if len(fields) < 2:
            raise InputError(f"{where} has a word and no tag: {line.strip()!r}. Columns stand apart by blanks or tabs.")
        if width and len(fields) != width:
            raise InputError(
                f"{where} has {len(fields)} columns, where the lines before have {width}: {line.strip()!r}."
            )
        width = len(fields)
        words.append(fields[0])
        tags.append(fields[-1])
        places.append(where)
    if words:
        yield _checked(Sentence(words, tags, places))


def _checked(sentence: Sentence) -> Sentence:
    for word, tag, place in zip(sentence.words, sentence.tags, sentence.places, strict=True):
        if not word.strip():
            raise InputError(f"{place}: the word is empty.")
        if not _TAG.fullmatch(tag):
            raise InputError(f"{place}: {tag!r} is not a tag; tags are O, or B-, I-, E- or S- with a type behind.")
    return sentence


def detect_scheme(sentences: Sequence[Sentence]) -> Scheme:
    """The scheme that all tags follow.

    Raises:
        InputError: there is none; names two lines that contradict each other.
    """
    evidence: dict[str, str] = {}
    for sentence in sentences:
        before = "O"
        for tag, place in zip(sentence.tags, sentence.places, strict=True):
            if tag[0] in "ESLU":
                evidence.setdefault("BIOES", place)
            elif tag != "O" and before[1:] != tag[1:]:
                # An entity begins here in any scheme: with B- in BIO2, with I- in BIO1.
                evidence.setdefault("BIO2" if tag[0] == "B" else "BIO1", place)
            before = tag
    if "BIOES" in evidence:
        return "BIOES"
    if len(evidence) > 1:
        raise InputError(
            f"Tags contradict each other: {evidence['BIO2']} begins an entity with B-, as in BIO2, and "
            f"{evidence['BIO1']} begins one with I-, as in BIO1. Correct one of them, or set task.scheme=BIO1, "
            "which takes both for beginnings."
        )
    return "BIO1" if "BIO1" in evidence else "BIO2"


def entities(sentence: Sentence, scheme: Scheme) -> list[Entity]:
    """The entities that the tags of a sentence mark.

    Raises:
        InputError: a tag that the scheme does not allow there, with its line.
    """
    found: list[Entity] = []
    begin, kind = 0, ""  # of the entity that is open; none where `kind` is empty
    for at, (tag, place) in enumerate(zip(sentence.tags, sentence.places, strict=True)):
        mark = {"L": "E", "U": "S"}.get(tag[0], tag[0])
        own = tag[2:]
        goes_on = mark in "IE" and kind == own
        if scheme == "BIOES":
            if kind and not goes_on:
                raise InputError(f"{place}: {tag} stands where the entity of type {kind} before has not ended (BIOES).")
            if not kind and mark in "IE":
                raise InputError(f"{place}: {tag} goes on with an entity that has not begun (BIOES).")
        elif scheme == "BIO2" and mark == "I" and not goes_on:
            raise InputError(f"{place}: {tag} goes on with an entity that has not begun (BIO2).")
        if kind and not goes_on:
            found.append(Entity(begin, at, kind))
            kind = ""
        if mark != "O" and not goes_on:
            begin, kind = at, own
        if mark in "ES":
            found.append(Entity(begin, at + 1, own))
            kind = ""
    if kind:
        if scheme == "BIOES":
            raise InputError(f"{sentence.places[-1]}: the sentence ends, but its last entity of type {kind} does not.")
        found.append(Entity(begin, len(sentence.tags), kind))
    return found


def to_tags(found: Sequence[Entity], length: int, scheme: Literal["BIO2", "BIOES"]) -> list[str]:
    """The inverse of `entities`: tags of a sentence of `length` words."""
    tags = ["O"] * length
    for entity in found:
        tags[entity.start] = f"B-{entity.type}"
        tags[entity.start + 1 : entity.stop] = [f"I-{entity.type}"] * (entity.stop - entity.start - 1)
        if scheme == "BIOES":
            last = "S" if entity.stop - entity.start == 1 else "E"
            tags[entity.stop - 1] = f"{last}-{entity.type}"
    return tags
