"""Texts as a trained head reads them, without asking for labels."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from puna.batches.tables import Row, read_table, text_lines
from puna.finetune.tasks.classification import Classification, text_ids
from puna.finetune.tasks.tagging import Tagging, word_pieces
from puna.runtime.errors import InputError
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer

_GIVEN = "the text given"


@dataclass(frozen=True, slots=True)
class Asked:
    """A text, and where its head is asked."""

    name: str
    """Where the text is from."""
    ids: list[int]
    """Its tokens."""
    positions: list[int]
    """The tokens at which the head is asked."""
    words: list[str]
    """The word that each of them stands for; one empty string where it is the whole text."""


@dataclass(frozen=True)
class Texts:
    """What to read."""

    given: tuple[str, ...] = ()
    """One text, or the two of a pair."""
    data: Path | None = None
    """Or a file: .txt has a text a line, any other is as the task's own data, with or without labels."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a .csv or .tsv file that has no header."""
    max_texts: int = 20
    """At most so many of them."""


def read_texts(texts: Texts, task: Classification | Tagging, tokenizer: Tokenizer, max_tokens: int) -> list[Asked]:
    """Texts, at most as long as the head was trained on.

    Raises:
        InputError: nothing to read, or a text that the task cannot read, with its place.
    """
    if isinstance(task, Tagging):
        found = _for_tags(texts, task, tokenizer, max_tokens)
    else:
        found = _for_classes(texts, task, tokenizer, max_tokens)
    asked = list(islice(found, texts.max_texts + 1))
    if not asked:
        raise InputError(f"{texts.data} holds no text.")
    if len(asked) > texts.max_texts:
        say(f"{texts.data} holds more than max_texts={texts.max_texts} texts; the first are explained.")
    return asked[: texts.max_texts]


def _for_classes(texts: Texts, task: Classification, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Asked]:
    if texts.data is None:
        if len(texts.given) != 1 + bool(task.second_text):
            raise InputError(
                "This head reads pairs of texts: set second_text too."
                if task.second_text
                else "This head reads one text, not a pair: leave second_text out."
            )
        rows = iter([Row(_GIVEN, dict(zip((task.text, task.second_text), texts.given, strict=False)))])
    else:
        rows = _lines(texts.data, task.text) if texts.data.suffix == ".txt" else read_table(texts.data, texts.columns)
    for row in rows:
        ids, cut = text_ids(task, row, tokenizer, max_tokens)
        if cut:
            _say_cut(row.where, max_tokens)
        yield Asked(row.where, ids, [len(ids) - 1], [""])


def _for_tags(texts: Texts, task: Tagging, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Asked]:
    sentences: Iterator[tuple[str, list[str]]]
    if len(texts.given) > 1 or texts.columns:
        raise InputError("This head tags the words of one text: leave second_text and columns out.")
    if texts.data is None:
        sentences = iter([(_GIVEN, _words(texts.given[0], task))])
    elif texts.data.suffix == ".txt":
        sentences = ((row.where, _words(row.values["text"], task)) for row in _lines(texts.data, "text"))
    else:
        read = task.read(texts.data)
        sentences = ((sentence.places[0], sentence.words) for sentence in read)
    for name, words in sentences:
        ids, positions = word_pieces(task, words, [name] * len(words), tokenizer)
        if len(ids) > max_tokens:
            _say_cut(name, max_tokens)
        positions = [position for position in positions if position < max_tokens]
        yield Asked(name, ids[:max_tokens], positions, words[: len(positions)])


def _lines(path: Path, column: str) -> Iterator[Row]:
    for number, line in text_lines(path):
        if line.strip():
            yield Row(f"{path}, line {number}", {column: line.strip()})


def _words(text: str, task: Tagging) -> list[str]:
    """What blanks separate; single characters where the task puts nothing between words."""
    return text.split() if task.separator else list("".join(text.split()))


def _say_cut(where: str, max_tokens: int) -> None:
    say(f"{where} is longer than the {max_tokens:,} tokens that the head was trained on, and was cut.")
