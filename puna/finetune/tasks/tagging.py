"""Tags of words: named entities, and whatever else marks stretches of words.

Shapes: B examples, T tokens, C tags.
"""

import importlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from puna.batches.packing import IGNORE
from puna.batches.tables import Row
from puna.finetune.tasks.entity_spans import from_spans, word_spans
from puna.finetune.tasks.tags import (
    Scheme,
    Sentence,
    detect_scheme,
    entities,
    from_lists,
    read_sentences,
    to_tags,
)
from puna.finetune.tasks.task import Example, ExampleBatch, OpenTask, Task, TaskData, read_both
from puna.peft.heads import Attention, HeadSpec
from puna.runtime.errors import InputError
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Tagging(Task):
    """Tag words, such as those of named entities.

    Data are CoNLL files, or tables with lists of words and tags, or with texts and the places of entities (doccano,
    CLUENER).
    """

    kind: Literal["tagging"] = "tagging"
    """This task's name."""
    scheme: Literal["detect", "BIO1", "BIO2", "BIOES"] = "detect"
    """How the files mark where an entity begins and ends."""
    learned_scheme: Literal["BIO2", "BIOES"] = "BIO2"
    """How the head does."""
    words: str = "tokens"
    """The column with the words, or with the text, in tables."""
    tags: str = "tags"
    """The column with the tags, or with the places of entities, in tables."""
    separator: str = " "
    """What stands between words; empty for Chinese characters, of which each is a word."""
    word_ending: str = ""
    """A regular expression of what stands at the ends of words in the files and does not belong to them, such as [0-9]
    in Weibo NER."""
    overlapping: Literal["refuse", "longest"] = "refuse"
    """Of entities given by their places that go over each other: refuse the file, or keep the longest."""
    labelled_piece: Literal["first", "last"] = "last"
    """The piece of a word that is tagged; under causal attention only the last has seen the whole word."""
    attention: Attention = "bidirectional"
    """Whether a token of the trunk sees everything, or only what is before it, as it was pretrained (`causal`)."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.word_ending)
        except re.error as error:
            raise ValueError(
                f"word_ending is {self.word_ending!r}, which is no regular expression: {error}."
            ) from error

    def read(self, path: Path) -> list[Sentence]:
        """The sentences of a file, with the tags that it has.

        Raises:
            InputError: see `read_sentences`.
        """
        sentences = read_sentences(path, self._from_row)
        return [
            Sentence([self._without_ending(word) for word in each.words], each.tags, each.places) for each in sentences
        ]

    def split(self, text: str) -> list[str]:
        """The words of a text that nobody has tagged: words and punctuation marks, or single characters."""
        return [text[begin:end] for begin, end in word_spans(text, characters=not self.separator)]

    def _without_ending(self, word: str) -> str:
        """A word without its ending, unless that is all there is."""
        return (self.word_ending and re.sub(f"(?:{self.word_ending})$", "", word)) or word

    def _from_row(self, row: Row) -> Sentence:
        text = row.values.get(self.words)
        if isinstance(text, str) and self.tags in row.values:
            return from_spans(
                row, text, row.values[self.tags], characters=not self.separator, overlapping=self.overlapping
            )
        return from_lists(row, self.words, self.tags)

    def open(self, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> "OpenTagging":
        """See `Task.open`."""
        return OpenTagging(self, data, tokenizer, max_tokens)


class OpenTagging(OpenTask):
    """See `OpenTask`."""

    metrics = ("validation/f1", "validation/precision", "validation/recall")

    def __init__(self, task: Tagging, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.task, self.attention = task, task.attention
        train, held_out = read_both(data, lambda path: _read(task, path))
        types = sorted({tag[2:] for sentence in train for tag in sentence.tags if tag != "O"})
        if not types:
            raise InputError(f"Every word in {data.train} is tagged O: there is no entity to learn.")
        marks = "BI" if task.learned_scheme == "BIO2" else "BIES"
        self.labels = ("O", *(f"{mark}-{kind}" for kind in types for mark in marks))
        numbers = {label: number for number, label in enumerate(self.labels)}
        for sentence in held_out:
            for tag, place in zip(sentence.tags, sentence.places, strict=True):
                if tag not in numbers:
                    raise InputError(
                        f"{place}: no entity of type {tag[2:]} is in {data.train}; it has {', '.join(types)}."
                    )
        self.train = self._examples(train, tokenizer, max_tokens, numbers)
        self.held_out = self._examples(held_out, tokenizer, max_tokens, numbers)
        self.wanted = [sentence.tags for sentence in held_out]
        self.head = HeadSpec(
            "ForTokenClassification",
            "score",
            True,
            self.labels,
            {"classifier_dropout": 0.0, "puna_labelled_piece": task.labelled_piece},
        )

    def loss(self, logits_BTC: Tensor, batch: ExampleBatch) -> Tensor:
        """Cross-entropy at the labelled piece of each word."""
        return F.cross_entropy(
            logits_BTC.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE, reduction="sum"
        )

    def measure(self, logits: Sequence[Tensor]) -> tuple[dict[str, float], str]:
        """F1, precision and recall over whole entities (seqeval, strict); words that were cut off count as O."""
        given = []
        for logits_TC, example, wanted in zip(logits, self.held_out, self.wanted, strict=True):
            best = logits_TC.argmax(-1).tolist()
            tags = [self.labels[best[at]] for at, label in enumerate(example.labels) if label != IGNORE]
            given.append(tags + ["O"] * (len(wanted) - len(tags)))
        return entity_scores(self.wanted, given, self.task.learned_scheme)

    def _examples(
        self, sentences: Sequence[Sentence], tokenizer: Tokenizer, limit: int, numbers: dict[str, int]
    ) -> list[Example]:
        examples = [self._example(sentence, tokenizer, numbers) for sentence in sentences]
        if num_cut := sum(len(example.ids) > limit for example in examples):
            say(
                f"{num_cut:,} of {len(examples):,} sentences are longer than train.row_length ({limit:,}) and were cut."
            )
        return [Example(example.ids[:limit], example.labels[:limit]) for example in examples]

    def _example(self, sentence: Sentence, tokenizer: Tokenizer, numbers: dict[str, int]) -> Example:
        ids, positions = word_pieces(self.task, sentence.words, sentence.places, tokenizer)
        labels = [IGNORE] * len(ids)
        for position, tag in zip(positions, sentence.tags, strict=True):
            labels[position] = numbers[tag]
        return Example(ids, labels)


def word_pieces(
    task: Tagging, words: Sequence[str], places: Sequence[str], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """BOS and the pieces of each word, and the position of the piece of each word that is tagged.

    Words are encoded one by one, so that every piece belongs to one word.

    Raises:
        InputError: a word has no piece; names its place.
    """
    assert tokenizer.bos_id is not None
    ids, positions = [tokenizer.bos_id], []
    for at, (word, place) in enumerate(zip(words, places, strict=True)):
        pieces = tokenizer.encode(task.separator + word if at else word, continuation=at > 0)
        if not pieces:
            raise InputError(f"{place}: the tokenizer makes nothing of the word {word!r}.")
        positions.append(len(ids) if task.labelled_piece == "first" else len(ids) + len(pieces) - 1)
        ids += pieces
    return ids, positions


def _read(task: Tagging, path: Path) -> list[Sentence]:
    """Sentences with their tags in the scheme that is learnt."""
    sentences = task.read(path)
    scheme: Scheme = detect_scheme(sentences) if task.scheme == "detect" else task.scheme
    return [
        Sentence(each.words, to_tags(entities(each, scheme), len(each.words), task.learned_scheme), each.places)
        for each in sentences
    ]


def entity_scores(
    wanted: Sequence[list[str]], given: Sequence[list[str]], scheme: Literal["BIO2", "BIOES"]
) -> tuple[dict[str, float], str]:
    """Metrics and report of seqeval in its strict mode.

    Raises:
        InputError: seqeval is not installed.
    """
    try:
        metrics = importlib.import_module("seqeval.metrics")
        schemes = importlib.import_module("seqeval.scheme")
    except ImportError as error:
        raise InputError("Measuring tags needs seqeval: pip install 'puna[tasks]'.") from error
    options = {"mode": "strict", "scheme": schemes.IOB2 if scheme == "BIO2" else schemes.IOBES, "zero_division": 0}
    with warnings.catch_warnings():
        # Of types that were never given, for which zero is the answer.
        warnings.simplefilter("ignore")
        scores = (metrics.f1_score, metrics.precision_score, metrics.recall_score)
        values = [score(wanted, given, **options) for score in scores]
        report: str = metrics.classification_report(wanted, given, digits=3, **options)
    return {name: float(value) for name, value in zip(OpenTagging.metrics, values, strict=True)}, report
