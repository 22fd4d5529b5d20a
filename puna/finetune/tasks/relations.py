"""Relations between two marked entities of a sentence.

A sentence is a pair of texts for the head of a classification: the sentence with its markers, `<e1>child</e1>`, and
behind EOS the two entities once more, separated by a comma. The head reads the last token, as
`LlamaForSequenceClassification` does. Heads over the states at the two markers (Baldini Soares et al. 2019,
arXiv:1906.03158, section 3.2, "entity start") have no class in `transformers` that loads them.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from puna.batches.tables import SUFFIXES, Row, read_table, text_lines
from puna.finetune.tasks.classification import Classification, OpenClassification, sklearn_metrics
from puna.finetune.tasks.task import Task, TaskData
from puna.peft.heads import Attention
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer

_SENTENCE = re.compile(r'\s*\d+\t\s*"?(.*?)"?\s*')
_DIRECTION = re.compile(r"\(e[12],e[12]\)")


@dataclass(frozen=True)
class Relations(Task):
    """Tell how two entities of a sentence are related, which <e1></e1> and <e2></e2> mark in it.

    Data are tables, or files in the form of SemEval-2010 task 8.
    """

    kind: Literal["relations"] = "relations"
    """This task's name."""
    text: str = "text"
    """The column with the marked sentence, in tables."""
    label: str = "label"
    """The column with the relation, in tables. A relation with two directions ends in (e1,e2) or (e2,e1)."""
    other: str = "Other"
    """The relation that stands for none of the others, which F1 leaves out."""
    labels: tuple[str, ...] = ()
    """The relations in the order of the head's outputs; those of the data, sorted, when absent."""
    attention: Attention = "bidirectional"
    """Whether a token of the trunk sees everything, or only what is before it, as it was pretrained (`causal`)."""

    def as_pairs(self) -> Classification:
        """The classification of pairs of texts that this is."""
        return Classification(
            text=self.text,
            second_text="entities",
            label=self.label,
            labels=self.labels,
            attention=self.attention,
        )

    def read(self, path: Path, columns: Sequence[str]) -> Iterator[Row]:
        """The rows of a file, with a column "entities" for the second texts.

        Raises:
            InputError: see `read_relations` and `entities_of`.
        """
        for row in read_relations(path, columns, self.text, self.label):
            yield Row(row.where, row.values | {"entities": entities_of(row, self.text)})

    def open(self, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> "OpenRelations":
        """See `Task.open`."""
        return OpenRelations(self, data, tokenizer, max_tokens)


class OpenRelations(OpenClassification):
    """See `OpenTask`."""

    def __init__(self, task: Relations, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> None:
        super().__init__(task.as_pairs(), data, tokenizer, max_tokens, task.read)
        self.other = task.other
        self.metrics = ("validation/f1", "validation/accuracy")

    def measure(self, logits: Sequence[Tensor]) -> tuple[dict[str, float], str]:
        """The official F1 of SemEval-2010 task 8, and accuracy over all relations."""
        given = [self.labels[int(each_TC[-1].argmax())] for each_TC in logits]
        wanted = [self.labels[example.labels[-1]] for example in self.held_out]
        scores = relation_f1(wanted, given, self.labels, self.other)
        f1 = sum(scores.values()) / len(scores)
        accuracy = sum(map(str.__eq__, wanted, given)) / len(wanted)
        width = max(map(len, scores))
        report = "\n".join(f"{name:<{width}}  F1 {score:.3f}" for name, score in scores.items())
        report += f"\nmacro F1 without {self.other}, directions told apart: {f1:.3f}; accuracy {accuracy:.3f}"
        return dict(zip(self.metrics, (f1, accuracy), strict=True)), report


def relation_f1(wanted: Sequence[str], given: Sequence[str], labels: Sequence[str], other: str) -> dict[str, float]:
    """F1 of each relation but `other`, a right relation in the wrong direction being wrong (Hendrickx et al. 2010,
    "SemEval-2010 Task 8", section 4.2): the micro average over a relation's two directions. Their mean is the official
    score.

    Raises:
        InputError: scikit-learn is not installed, or there is no relation but `other`.
    """
    directions: dict[str, list[str]] = {}
    for label in labels:
        if label != other:
            directions.setdefault(_DIRECTION.sub("", label), []).append(label)
    if not directions:
        raise InputError(f"There is no relation but {other!r}, which F1 leaves out; see task.other.")
    score = sklearn_metrics().f1_score
    return {
        name: float(score(wanted, given, labels=both, average="micro", zero_division=0))
        for name, both in directions.items()
    }


def read_relations(path: Path, columns: Sequence[str], text: str, label: str) -> Iterator[Row]:
    """Rows with a marked sentence and a relation, from a table, or from a file in the form of SemEval-2010 task 8: a
    number and the sentence, the relation, a comment, an empty line.

    Args:
        columns: names for the columns of tables without header.
        text, label: what the two columns are called.

    Raises:
        InputError: a line that is not of the form, with its number.
    """
    if path.is_dir() or (path.with_suffix("") if path.suffix == ".gz" else path).suffix in SUFFIXES:
        yield from read_table(path, columns)
        return
    block: list[str] = []
    first = 0
    for number, line in text_lines(path):
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield _from_semeval(path, first, block, text, label)
            block = []
    if block:
        yield _from_semeval(path, first, block, text, label)


def _from_semeval(path: Path, number: int, block: Sequence[str], text: str, label: str) -> Row:
    where = f"{path}, line {number}"
    sentence = _SENTENCE.fullmatch(block[0])
    if sentence is None:
        raise InputError(f"{where}: expected a number, a tab and a sentence in quotes, found {block[0].strip()!r}.")
    if len(block) < 2:
        raise InputError(f"{where}: there is no relation below the sentence.")
    return Row(where, {text: sentence[1], label: block[1].strip()})


def entities_of(row: Row, text: str) -> str:
    """The two marked entities of a row, a comma between.

    Raises:
        InputError: they are not marked, or not once each.
    """
    marked = str(row.values.get(text, ""))
    found = []
    for name in ("e1", "e2"):
        places = re.findall(f"<{name}>(.*?)</{name}>", marked)
        if len(places) != 1 or not places[0].strip():
            raise InputError(
                f"{row.where}: the column {text!r} has to mark one entity by <{name}> and </{name}>, but is {marked!r}."
            )
        found.append(places[0].strip())
    return ", ".join(found)
