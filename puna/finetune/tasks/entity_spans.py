"""Entities that are marked by their places in a text, turned into words with tags.

places      {"text": "...", "label": [[0, 4, "city"], ...]}, characters [0, 4)                    doccano
mentions    {"text": "...", "label": {"city": {"Lima": [[0, 3]]}}}, the last character included   CLUENER
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

from puna.batches.tables import Row
from puna.finetune.tasks.tags import Entity, Sentence, to_tags
from puna.runtime.errors import InputError


def word_spans(text: str, *, characters: bool) -> list[tuple[int, int]]:
    """Where the words of a text begin and end: words and punctuation marks, or single characters."""
    return [match.span() for match in re.finditer(r"\S" if characters else r"\w+|[^\w\s]", text)]


def from_spans(
    row: Row, text: str, marked: Any, *, characters: bool, overlapping: Literal["refuse", "longest"]
) -> Sentence:
    """A text and its marked entities as words with tags in the scheme BIO2.

    Args:
        marked: as above.
        characters: every character is a word; else words and punctuation marks are.
        overlapping: what becomes of entities that go over each other; "longest" keeps the longest, the first of equals.

    Raises:
        InputError: another form; or an entity that is not there, begins or ends inside a word, or goes over another.
    """
    words = word_spans(text, characters=characters)
    begins = {begin: number for number, (begin, _) in enumerate(words)}
    ends = {end: number + 1 for number, (_, end) in enumerate(words)}
    found: list[Entity] = []
    for begin, end, kind in sorted(_places(row, text, marked), key=lambda place: (place[0] - place[1], place)):
        shown = f"the entity {text[begin:end]!r} (characters {begin} to {end}, {kind})"
        if begin not in begins or end not in ends:
            raise InputError(f"{row.where}: {shown} begins or ends inside a word, or is not in the text.")
        entity = Entity(begins[begin], ends[end], kind)
        if not any(entity.start < other.stop and other.start < entity.stop for other in found):
            found.append(entity)
        elif overlapping == "refuse":
            raise InputError(
                f"{row.where}: {shown} goes over another, but a word can have only one tag. Set "
                "task.overlapping=longest to leave it out."
            )
    places = [f"{row.where}, character {begin}" for begin, _ in words]
    return Sentence([text[begin:end] for begin, end in words], to_tags(found, len(words), "BIO2"), places)


def _places(row: Row, text: str, marked: Any) -> Iterator[tuple[int, int, str]]:
    try:
        if isinstance(marked, dict):
            for kind, mentions in marked.items():
                for mention, places in mentions.items():
                    for begin, last in places:
                        if text[begin : last + 1] != mention:
                            raise InputError(
                                f"{row.where}: {mention!r} should stand at characters {begin} to {last}, but there the "
                                f"text has {text[begin : last + 1]!r}."
                            )
                        yield int(begin), int(last) + 1, str(kind)
        else:
            for begin, end, kind in marked:
                yield int(begin), int(end), str(kind)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{row.where}: entities are a list of [first character, character behind the last, type], or a table of "
            f"types with mentions and their places; found {str(marked)[:60]!r}."
        ) from error
