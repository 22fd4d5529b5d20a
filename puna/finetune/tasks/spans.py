"""Answers that stand in a text: question answering in the form of SQuAD, over long texts by overlapping windows.

Shapes: B windows, T tokens.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from puna.batches.packing import PADDING
from puna.finetune.regularize.agreement import symmetric_divergence
from puna.finetune.tasks.squad import read_squad
from puna.finetune.tasks.task import ExampleBatch, OpenTask, Task, TaskData, read_both
from puna.finetune.tasks.windows import best_answers, windows
from puna.peft.heads import Attention, HeadSpec
from puna.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Spans(Task):
    """Find the answer to a question in a text; data in the form of SQuAD 1.1 or 2.0 (JSON)."""

    kind: Literal["spans"] = "spans"
    """This task's name."""
    overlap: int = 64
    """Tokens that two windows of a text share, where it is too long for one."""
    max_answer_tokens: int = 30
    """Longer answers are not given."""
    unit: Literal["words", "characters"] = "words"
    """What the overlap of answers (F1) is counted in: characters for Chinese and its like."""
    misplaced: Literal["refuse", "leave_out"] = "refuse"
    """Where an answer does not stand at its place in the text: refuse the file, or leave the question out."""
    attention: Attention = "bidirectional"
    """Whether a token of the trunk sees everything, or only what is before it, as it was pretrained (`causal`)."""

    def __post_init__(self) -> None:
        if self.overlap < 0 or self.max_answer_tokens < 1:
            raise ValueError("overlap cannot be negative, and max_answer_tokens has to be at least 1.")

    def open(self, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> "OpenSpans":
        """See `Task.open`."""
        return OpenSpans(self, data, tokenizer, max_tokens)


class OpenSpans(OpenTask):
    """See `OpenTask`. Where a window holds no answer, the head should point at BOS; an answer is empty only where the
    training data has such."""

    metrics = ("validation/exact_match", "validation/f1")

    def __init__(self, task: Spans, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.task, self.attention = task, task.attention
        questions, self.questions = read_both(data, lambda path: list(read_squad(path, misplaced=task.misplaced)))
        self.train = [example for example, _ in windows(questions, tokenizer, max_tokens, task.overlap)]
        held_out = list(windows(self.questions, tokenizer, max_tokens, task.overlap))
        self.held_out = [example for example, _ in held_out]
        self.windows = [window for _, window in held_out]
        self.may_be_none = not all(question.answers for question in questions)
        config = {"puna_may_be_none": self.may_be_none}
        self.head = HeadSpec("ForQuestionAnswering", "qa_outputs", True, ("start", "end"), config)

    def loss(self, logits_BTC: Tensor, batch: ExampleBatch) -> Tensor:
        """Mean of the cross-entropies of the answer's first and last token (arXiv:1810.04805, section 4.2)."""
        logits_BTC = logits_BTC.masked_fill((batch.documents_BT == PADDING)[:, :, None], float("-inf"))
        wanted_BC = batch.targets_BC.long()
        return F.cross_entropy(logits_BTC, wanted_BC, reduction="sum") / 2

    def divergence(self, logits_BTC: Tensor, batch: ExampleBatch) -> Tensor:
        """See `OpenTask.divergence`: mean over the distributions of the first and of the last token."""
        # Finite, because 0 times infinity is no number.
        logits_BTC = logits_BTC.masked_fill((batch.documents_BT == PADDING)[:, :, None], -1e9)
        first_BTC, second_BTC = logits_BTC.log_softmax(1).chunk(2)
        return symmetric_divergence(first_BTC, second_BTC) / 2

    def measure(self, logits: Sequence[Tensor]) -> tuple[dict[str, float], str]:
        """Exact match and F1 as SQuAD counts them (arXiv:1606.05250, section 6.1)."""
        given = best_answers(
            self.questions, self.windows, logits, self.task.max_answer_tokens, may_be_none=self.may_be_none
        )
        pairs = [
            (answer, [text for _, text in question.answers] or [""])
            for answer, question in zip(given, self.questions, strict=True)
        ]
        exact = [max(_words(answer) == _words(text) for text in wanted) for answer, wanted in pairs]
        f1 = [max(overlap_f1(answer, text, self.task.unit) for text in wanted) for answer, wanted in pairs]
        values = sum(exact) / len(exact), sum(f1) / len(f1)
        report = f"{len(pairs):,} questions: exact match {values[0]:.3f}, F1 {values[1]:.3f}"
        return dict(zip(self.metrics, values, strict=True)), report


def _words(text: str) -> list[str]:
    """Words without case, punctuation and articles, as the official script of SQuAD has them."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def overlap_f1(given: str, wanted: str, unit: Literal["words", "characters"]) -> float:
    """Harmonic mean of precision and recall over words or characters."""
    if unit == "words":
        one, other = Counter(_words(given)), Counter(_words(wanted))
    else:
        one, other = Counter("".join(_words(given))), Counter("".join(_words(wanted)))
    if not one or not other:
        return float(one == other)
    return 2 * (one & other).total() / (one.total() + other.total())
