"""Tags of words: named entities, and whatever else marks stretches of words.

Shapes: B examples, T tokens, C tags.
"""

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from puna.batches.packing import IGNORE
from puna.finetune.tasks.tags import Scheme, Sentence, detect_scheme, entities, read_sentences, to_tags
from puna.finetune.tasks.task import Attention, Example, ExampleBatch, HeadSpec, OpenTask, Task, TaskData
from puna.runtime.errors import InputError
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Tagging(Task):
    """Tag words, such as those of named entities: CoNLL files, or tables with lists of words and tags."""

    kind: Literal["tagging"] = "tagging"
    """This task's name."""
    scheme: Literal["detect", "BIO1", "BIO2", "BIOES"] = "detect"
    """How the files mark where an entity begins and ends."""
    learned_scheme: Literal["BIO2", "BIOES"] = "BIO2"
    """How the head does."""
    words: str = "tokens"
    """The column with the words, in tables."""
    tags: str = "tags"
    """The column with the tags, in tables."""
    separator: str = " "
    """What stands between words; empty for Chinese characters."""
    labelled_piece: Literal["first", "last"] = "last"
    """The piece of a word that is tagged; under causal attention only the last has seen the whole word."""
    attention: Attention = "bidirectional"
    """Whether a token of the trunk sees everything, or only what is before it, as it was pretrained (`causal`)."""

    def open(self, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> "OpenTagging":
        """See `Task.open`."""
        return OpenTagging(self, data, tokenizer, max_tokens)


class OpenTagging(OpenTask):
    """See `OpenTask`."""

    metrics = ("validation/f1", "validation/precision", "validation/recall")

    def __init__(self, task: Tagging, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.task, self.attention = task, task.attention
        train = _read(task, data.train)
        held_out = _read(task, data.held_out) if data.held_out else []
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
        """BOS and the pieces of each word; words are encoded one by one, so that every piece belongs to one word."""
        assert tokenizer.bos_id is not None
        ids, labels = [tokenizer.bos_id], [IGNORE]
        for at, (word, tag) in enumerate(zip(sentence.words, sentence.tags, strict=True)):
            pieces = tokenizer.encode(self.task.separator + word if at else word, continuation=at > 0)
            if not pieces:
                raise InputError(f"{sentence.places[at]}: the tokenizer makes nothing of the word {word!r}.")
            marked = [IGNORE] * len(pieces)
            marked[0 if self.task.labelled_piece == "first" else -1] = numbers[tag]
            ids += pieces
            labels += marked
        return Example(ids, labels)


def _read(task: Tagging, path: Path) -> list[Sentence]:
    """Sentences with their tags in the scheme that is learnt."""
    sentences = read_sentences(path, task.words, task.tags)
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
