"""Texts as a trained head reads them, without asking for labels."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from puna.batches.tables import Row
from puna.finetune.predict import new_rows, new_sentences
from puna.finetune.tasks.classification import Classification, text_ids
from puna.finetune.tasks.relations import Relations, entities_of
from puna.finetune.tasks.tagging import Tagging, word_pieces
from puna.finetune.tasks.tags import Sentence
from puna.finetune.tasks.task import Task
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
    """Or a file, see `puna.finetune.predict.PredictConfig.data`."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a .csv or .tsv file that has no header."""
    max_texts: int = 20
    """At most so many of them."""


def read_texts(texts: Texts, task: Task, tokenizer: Tokenizer, max_tokens: int) -> list[Asked]:
    """Texts, at most as long as the head was trained on.

    Raises:
        InputError: nothing to read, a text that the task cannot read, with its place, or another kind of task.
    """
    match task:
        case Classification():
            found = _for_classes(_rows(texts, task), task, tokenizer, max_tokens)
        case Relations():
            found = _for_classes(_related(texts, task), task.as_pairs(), tokenizer, max_tokens)
        case Tagging():
            found = _for_tags(_sentences(texts, task), task, tokenizer, max_tokens)
        case _:
            raise InputError(f"What is explained are classes and tags; this head is for {getattr(task, 'kind', task)}.")
    asked = list(islice(found, texts.max_texts + 1))
    if not asked:
        raise InputError(f"{texts.data or _GIVEN} holds nothing to read.")
    if len(asked) > texts.max_texts:
        say(f"{texts.data} holds more than max_texts={texts.max_texts} texts; the first are explained.")
    return asked[: texts.max_texts]


def _rows(texts: Texts, task: Classification) -> Iterable[Row]:
    if texts.data is not None:
        return new_rows(texts.data, texts.columns, task.text)
    if len(texts.given) != 1 + bool(task.second_text):
        raise InputError(
            "This head reads pairs of texts: set second_text too."
            if task.second_text
            else "This head reads one text, not a pair: leave second_text out."
        )
    return [Row(_GIVEN, dict(zip((task.text, task.second_text), texts.given, strict=False)))]


def _related(texts: Texts, task: Relations) -> Iterable[Row]:
    if texts.data is not None:
        return task.read(texts.data, texts.columns)
    _refuse_pair(texts)
    row = Row(_GIVEN, {task.text: texts.given[0]})
    return [Row(_GIVEN, row.values | {"entities": entities_of(row, task.text)})]


def _sentences(texts: Texts, task: Tagging) -> Iterable[Sentence]:
    if texts.columns:
        raise InputError("Files of tagged words have no columns to name: leave columns out.")
    if texts.data is not None:
        return new_sentences(texts.data, task)
    _refuse_pair(texts)
    words = task.split(texts.given[0])
    return [Sentence(words, ["O"] * len(words), [_GIVEN] * len(words))] if words else []


def _refuse_pair(texts: Texts) -> None:
    if len(texts.given) > 1:
        raise InputError("This head reads one text, not a pair: leave second_text out.")


def _for_classes(rows: Iterable[Row], task: Classification, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Asked]:
    for row in rows:
        ids, cut = text_ids(task, row, tokenizer, max_tokens)
        if cut:
            _say_cut(row.where, max_tokens)
        yield Asked(row.where, ids, [len(ids) - 1], [""])


def _for_tags(sentences: Iterable[Sentence], task: Tagging, tokenizer: Tokenizer, max_tokens: int) -> Iterator[Asked]:
    for sentence in sentences:
        ids, positions = word_pieces(task, sentence.words, sentence.places, tokenizer)
        if len(ids) > max_tokens:
            _say_cut(sentence.places[0], max_tokens)
        positions = [position for position in positions if position < max_tokens]
        yield Asked(sentence.places[0], ids[:max_tokens], positions, sentence.words[: len(positions)])


def _say_cut(where: str, max_tokens: int) -> None:
    say(f"{where} is longer than the {max_tokens:,} tokens that the head was trained on, and was cut.")
