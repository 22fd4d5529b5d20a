"""Classes of texts or of pairs of texts: one class, any number of classes, or a number (regression).

Shapes: B examples, T tokens, C classes, N held-out examples.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.batches.packing import IGNORE
from puna.batches.tables import Row, read_table
from puna.finetune.regularize.agreement import symmetric_divergence
from puna.finetune.tasks.task import Example, ExampleBatch, OpenTask, Task, TaskData, read_both
from puna.peft.heads import Attention, HeadSpec
from puna.runtime.errors import InputError
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer

Problem = Literal["one_class", "many_classes", "number"]

Read = Callable[[Path, Sequence[str]], Iterable[Row]]

_PROBLEM_TYPES = {
    "one_class": "single_label_classification",
    "many_classes": "multi_label_classification",
    "number": "regression",
}


@dataclass(frozen=True)
class Classification(Task):
    """Classify texts or pairs of texts (sentiment, topic, intent, paraphrase), or give them a number."""

    kind: Literal["classification"] = "classification"
    """This task's name."""
    text: str = "text"
    """The column with the text."""
    second_text: str = ""
    """The column with the other text of a pair; empty where there are no pairs."""
    label: str = "label"
    """The column with the class, the classes or the number."""
    problem: Problem = "one_class"
    """Whether a text has one class, any number of classes (a list, or a text with `label_separator` between), or a
    number."""
    label_separator: str = ","
    """Between the classes of a text, in files that have no lists."""
    labels: tuple[str, ...] = ()
    """The classes in the order of the head's outputs; those of the data, sorted, when absent."""
    attention: Attention = "causal"
    """Whether a token of the trunk sees only what is before it, as it was pretrained, or everything (bidirectional)."""

    def open(self, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> "OpenClassification":
        """See `Task.open`."""
        return OpenClassification(self, data, tokenizer, max_tokens)


@dataclass(frozen=True, slots=True)
class _Labelled:
    where: str
    ids: list[int]
    classes: tuple[str, ...]
    number: float


class OpenClassification(OpenTask):
    """See `OpenTask`. The head reads the last token, which under causal attention has seen all others.

    Args:
        read: the rows of a file, given names for columns that have none.
    """

    def __init__(
        self, task: Classification, data: TaskData, tokenizer: Tokenizer, max_tokens: int, read: Read = read_table
    ) -> None:
        self.task, self.attention = task, task.attention
        train, held_out = read_both(
            data, lambda path: _encode(task, path, read(path, data.columns), tokenizer, max_tokens)
        )
        self.labels = ("number",) if task.problem == "number" else _label_set(task, train, data)
        numbers = {label: number for number, label in enumerate(self.labels)}
        self.train = [_example(self.task, row, numbers) for row in train]
        self.held_out = [_example(self.task, row, numbers) for row in held_out]
        self.head = HeadSpec(
            "ForSequenceClassification", "score", False, self.labels, {"problem_type": _PROBLEM_TYPES[task.problem]}
        )
        self.metrics = {
            "one_class": ("validation/accuracy", "validation/macro_f1", "validation/mcc"),
            "many_classes": ("validation/exact_match", "validation/macro_f1", "validation/micro_f1"),
            "number": ("validation/mean_absolute_error", "validation/pearson", "validation/spearman"),
        }[task.problem]

    def loss(self, logits_BTC: Tensor, batch: ExampleBatch) -> Tensor:
        """Cross-entropy; binary cross-entropy, mean over classes; or squared error."""
        asked_BT = batch.labels_BT != IGNORE
        logits_BC = logits_BTC[asked_BT]
        match self.task.problem:
            case "one_class":
                return F.cross_entropy(logits_BC, batch.labels_BT[asked_BT], reduction="sum")
            case "many_classes":
                each_BC = F.binary_cross_entropy_with_logits(logits_BC, batch.targets_BC, reduction="none")
                return each_BC.mean(-1).sum()
            case "number":
                return F.mse_loss(logits_BC, batch.targets_BC, reduction="sum")

    def divergence(self, logits_BTC: Tensor, batch: ExampleBatch) -> Tensor:
        """See `OpenTask.divergence`: of the classes' probabilities, mean over classes where there may be several; of
        numbers the square of their difference, for squared error is the likelihood of a normal distribution."""
        if self.task.problem == "one_class":
            return super().divergence(logits_BTC, batch)
        first_NC, second_NC = logits_BTC[batch.labels_BT != IGNORE].chunk(2)
        if self.task.problem == "number":
            return (first_NC - second_NC).square().sum()
        both = [torch.stack((F.logsigmoid(x_NC), F.logsigmoid(-x_NC))) for x_NC in (first_NC, second_NC)]
        return symmetric_divergence(*both) / len(self.labels)

    def measure(self, logits: Sequence[Tensor]) -> tuple[dict[str, float], str]:
        """Accuracy, macro F1 and Matthews correlation; exact match and F1; or error and correlations (scikit-learn)."""
        scores_NC = torch.stack([each_TC[-1] for each_TC in logits]).numpy()
        match self.task.problem:
            case "one_class":
                values, report = self._one_class(scores_NC.argmax(-1))
            case "many_classes":
                values, report = self._many_classes(scores_NC > 0)
            case "number":
                values, report = self._number(scores_NC[:, 0])
        return {name: float(value) for name, value in zip(self.metrics, values, strict=True)}, report

    def _one_class(self, given_N: Any) -> tuple[Sequence[float], str]:
        metrics = sklearn_metrics()
        wanted_N = np.array([example.labels[-1] for example in self.held_out])
        values = (
            metrics.accuracy_score(wanted_N, given_N),
            metrics.f1_score(wanted_N, given_N, average="macro", zero_division=0),
            metrics.matthews_corrcoef(wanted_N, given_N) if len({*wanted_N, *given_N}) > 1 else 0.0,
        )
        numbers = range(len(self.labels))
        return values, metrics.classification_report(
            wanted_N, given_N, labels=numbers, target_names=self.labels, digits=3, zero_division=0
        )

    def _many_classes(self, given_NC: Any) -> tuple[Sequence[float], str]:
        metrics = sklearn_metrics()
        wanted_NC = np.array([example.targets for example in self.held_out], dtype=bool)
        values = (
            metrics.accuracy_score(wanted_NC, given_NC),
            metrics.f1_score(wanted_NC, given_NC, average="macro", zero_division=0),
            metrics.f1_score(wanted_NC, given_NC, average="micro", zero_division=0),
        )
        return values, metrics.classification_report(
            wanted_NC, given_NC, target_names=self.labels, digits=3, zero_division=0
        )

    def _number(self, given_N: Any) -> tuple[Sequence[float], str]:
        wanted_N = np.array([example.targets[0] for example in self.held_out])
        ranks = [np.unique(values, return_inverse=True, return_counts=True)[1:] for values in (given_N, wanted_N)]
        # Equal values share the mean of their ranks.
        given_ranks, wanted_ranks = ((np.cumsum(counts) - (counts - 1) / 2)[inverse] for inverse, counts in ranks)
        values = (
            np.abs(given_N - wanted_N).mean(),
            _correlation(given_N, wanted_N),
            _correlation(given_ranks, wanted_ranks),
        )
        return values, "\n".join(f"{name} {value:.4f}" for name, value in zip(self.metrics, values, strict=True))


def sklearn_metrics() -> ModuleType:
    """`sklearn.metrics`.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("sklearn.metrics")
    except ImportError as error:
        raise InputError("Measuring a classification needs scikit-learn: pip install 'puna[tasks]'.") from error


def _correlation(x_N: Any, y_N: Any) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    if x_N.std() == 0 or y_N.std() == 0:
        return 0.0
    return float(np.corrcoef(x_N, y_N)[0, 1])


def _encode(task: Classification, path: Path, read: Iterable[Row], tokenizer: Tokenizer, limit: int) -> list[_Labelled]:
    rows = []
    num_cut = 0
    for row in read:
        ids, cut = text_ids(task, row, tokenizer, limit)
        num_cut += cut
        classes = () if task.problem == "number" else _classes(task, row)
        number = _number(task, row) if task.problem == "number" else 0.0
        rows.append(_Labelled(row.where, ids, classes, number))
    if num_cut:
        say(f"{num_cut:,} of {len(rows):,} texts in {path} are longer than train.row_length ({limit:,}) and were cut.")
    return rows


def text_ids(task: Classification, row: Row, tokenizer: Tokenizer, limit: int) -> tuple[list[int], bool]:
    """BOS, the text, and for a pair EOS and the other text; and whether something was cut off, of the longer one first.

    Nothing stands at the end: `transformers` takes for the last token the last that is not padding.
    """
    assert tokenizer.bos_id is not None
    text = tokenizer.encode(_cell(row, task.text))
    if not task.second_text:
        return [tokenizer.bos_id, *text[: limit - 1]], len(text) > limit - 1
    if tokenizer.eos_id is None:
        raise InputError("This tokenizer has no EOS token, which stands between the texts of a pair.")
    other = tokenizer.encode(_cell(row, task.second_text))
    room = limit - 2
    kept = text[: max(room // 2, room - len(other))]
    ids = [tokenizer.bos_id, *kept, tokenizer.eos_id, *other[: room - len(kept)]]
    return ids, len(text) + len(other) > room


def _cell(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        known = f"It has {', '.join(row.values) or 'nothing'}; say with --set task.text=... which column is the text."
        raise InputError(f"{row.where} has no text in its column {column!r}. {known}")
    return value


def _label_cell(task: Classification, row: Row) -> Any:
    value = row.values.get(task.label)
    if value is None or value == "":
        known = f"It has {', '.join(row.values)}; say with --set task.label=... which column it is."
        raise InputError(f"{row.where} has no label in its column {task.label!r}. {known}")
    return value


def _classes(task: Classification, row: Row) -> tuple[str, ...]:
    if task.problem == "one_class":
        value = _label_cell(task, row)
        if isinstance(value, list | dict):
            raise InputError(
                f"{row.where}: the label is {value!r}; with several classes set task.problem=many_classes."
            )
        return (str(value).strip(),)
    value = row.values.get(task.label, "")
    parts = value if isinstance(value, list) else str(value).split(task.label_separator)
    names = tuple(name for name in (str(part).strip() for part in parts) if name)
    if len(set(names)) < len(names):
        raise InputError(f"{row.where} has a class twice: {', '.join(names)}.")
    return names


def _number(task: Classification, row: Row) -> float:
    value = _label_cell(task, row)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise InputError(f"{row.where}: the label is {value!r}, which is not a number.")
    return number


def _label_set(task: Classification, train: Sequence[_Labelled], data: TaskData) -> tuple[str, ...]:
    counts = Counter(name for row in train for name in row.classes)
    labels = task.labels or tuple(sorted(counts))
    if len(set(labels)) < len(labels):
        raise InputError(f"task.labels names a class twice: {', '.join(labels)}.")
    if empty := [label for label in labels if not counts[label]]:
        raise InputError(
            f"{data.train} has no example of {', '.join(map(repr, empty))}, so that class cannot be learnt. Give some, "
            "or take it out of task.labels."
        )
    if len(labels) < 2 and len(counts) < 2 and task.problem == "one_class":
        raise InputError(f"Every example in {data.train} has the label {labels[0]!r}: there is nothing to tell apart.")
    if not labels:
        raise InputError(f"No example in {data.train} has a class in its column {task.label!r}.")
    return labels


def _example(task: Classification, row: _Labelled, numbers: dict[str, int]) -> Example:
    if unknown := [name for name in row.classes if name not in numbers]:
        shown = ", ".join(list(numbers)[:20]) + (", ..." if len(numbers) > 20 else "")
        raise InputError(f"{row.where}: {unknown[0]!r} is not one of the {len(numbers)} classes learnt: {shown}.")
    label = numbers[row.classes[0]] if task.problem == "one_class" else 0
    labels = [IGNORE] * (len(row.ids) - 1) + [label]
    if task.problem == "many_classes":
        return Example(row.ids, labels, tuple(float(name in row.classes) for name in numbers))
    return Example(row.ids, labels, (row.number,) if task.problem == "number" else ())
