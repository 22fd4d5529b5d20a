"""Answers that stand in a text: question answering in the form of SQuAD, over long texts by overlapping windows.

Shapes: B windows, T tokens.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.batches.packing import IGNORE, PADDING
from puna.batches.tables import text_lines
from puna.finetune.tasks.task import Attention, Example, ExampleBatch, HeadSpec, OpenTask, Task, TaskData
from puna.runtime.errors import InputError
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
    attention: Attention = "bidirectional"
    """Whether a token of the trunk sees everything, or only what is before it, as it was pretrained (`causal`)."""

    def __post_init__(self) -> None:
        if self.overlap < 0 or self.max_answer_tokens < 1:
            raise ValueError("overlap cannot be negative, and max_answer_tokens has to be at least 1.")

    def open(self, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> "OpenSpans":
        """See `Task.open`."""
        return OpenSpans(self, data, tokenizer, max_tokens)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a text."""

    where: str
    """File and id, for errors."""
    text: str
    """The question."""
    context: str
    """The text."""
    answers: list[tuple[int, str]]
    """(first character in the context, answer); none where the text does not answer."""


@dataclass(frozen=True, slots=True)
class _Window:
    """A stretch of a text behind its question."""

    question: int
    first: int
    """Where in the window the text begins, in tokens."""
    edges: list[int]
    """Where in the text's UTF-8 bytes each token begins, and behind them where the last ends."""


class OpenSpans(OpenTask):
    """See `OpenTask`. Where a window holds no answer, the head should point at BOS."""

    metrics = ("validation/exact_match", "validation/f1")
    head = HeadSpec("ForQuestionAnswering", "qa_outputs", True, ("start", "end"), {})

    def __init__(self, task: Spans, data: TaskData, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.task, self.attention = task, task.attention
        if tokenizer.eos_id is None:
            raise InputError("This tokenizer has no EOS token, which stands between question and text.")
        questions = list(read_squad(data.train))
        self.train = [example for example, _ in self._windows(questions, tokenizer, max_tokens)]
        self.questions = list(read_squad(data.held_out)) if data.held_out else []
        held_out = list(self._windows(self.questions, tokenizer, max_tokens))
        self.held_out = [example for example, _ in held_out]
        self.windows = [window for _, window in held_out]

    def loss(self, logits_BTC: Tensor, batch: ExampleBatch) -> Tensor:
        """Mean of the cross-entropies of the answer's first and last token (arXiv:1810.04805, section 4.2)."""
        logits_BTC = logits_BTC.masked_fill((batch.documents_BT == PADDING)[:, :, None], float("-inf"))
        wanted_BC = batch.targets_BC.long()
        return F.cross_entropy(logits_BTC, wanted_BC, reduction="sum") / 2

    def measure(self, logits: Sequence[Tensor]) -> tuple[dict[str, float], str]:
        """Exact match and F1 as SQuAD counts them (arXiv:1606.05250, section 6.1)."""
        given = self.answers(logits)
        pairs = [
            (answer, [text for _, text in question.answers] or [""])
            for answer, question in zip(given, self.questions, strict=True)
        ]
        exact = [max(_words(answer) == _words(text) for text in wanted) for answer, wanted in pairs]
        f1 = [max(overlap_f1(answer, text, self.task.unit) for text in wanted) for answer, wanted in pairs]
        values = sum(exact) / len(exact), sum(f1) / len(f1)
        report = f"{len(pairs):,} questions: exact match {values[0]:.3f}, F1 {values[1]:.3f}"
        return dict(zip(self.metrics, values, strict=True)), report

    def answers(self, logits: Sequence[Tensor]) -> list[str]:
        """The answer to each held-out question, from the logits of all windows; empty where BOS is likelier, if the
        data has questions without answers."""
        best = [(float("-inf"), "")] * len(self.questions)
        none = [float("inf")] * len(self.questions)
        for logits_TC, window in zip(logits, self.windows, strict=True):
            score, start, stop = self._best_span(logits_TC[window.first :])
            none[window.question] = min(none[window.question], float(logits_TC[0].sum()))
            if score > best[window.question][0]:
                text = self.questions[window.question].context.encode()
                found = text[window.edges[start] : window.edges[stop]].decode(errors="ignore").strip()
                best[window.question] = (score, found)
        if all(question.answers for question in self.questions):
            return [text for _, text in best]
        return ["" if null > score else text for (score, text), null in zip(best, none, strict=True)]

    def _best_span(self, logits_TC: Tensor) -> tuple[float, int, int]:
        """(score, first token, token behind the last) of the likeliest answer in a window's text."""
        scores_TT = logits_TC[:, None, 0] + logits_TC[None, :, 1]
        allowed_TT = torch.ones_like(scores_TT, dtype=torch.bool).triu().tril(self.task.max_answer_tokens - 1)
        scores_TT = scores_TT.masked_fill(~allowed_TT, float("-inf"))
        start, last = divmod(int(scores_TT.argmax()), len(logits_TC))
        return float(scores_TT[start, last]), start, last + 1

    def _windows(
        self, questions: Sequence[Question], tokenizer: Tokenizer, limit: int
    ) -> Iterator[tuple[Example, _Window]]:
        """BOS, question, EOS and a window of the text."""
        assert tokenizer.bos_id is not None
        assert tokenizer.eos_id is not None
        for number, question in enumerate(questions):
            asked = [tokenizer.bos_id, *tokenizer.encode(question.text), tokenizer.eos_id]
            size = limit - len(asked)
            if size <= self.task.overlap:
                raise InputError(
                    f"{question.where}: the question has {len(asked) - 2} tokens, so that only {size} of "
                    f"train.row_length ({limit}) are left for the text; task.overlap is {self.task.overlap}."
                )
            text = tokenizer.encode(question.context, continuation=True)
            pieces = [tokenizer.token_bytes(piece) for piece in text]
            if b"".join(pieces) != question.context.encode():
                raise InputError(f"{question.where}: the tokenizer changes the text, so places in it cannot be found.")
            edges = [0, *accumulate(map(len, pieces))]
            span = _token_span(question, edges)
            for begin in range(0, max(1, len(text) - self.task.overlap), size - self.task.overlap):
                stop = min(begin + size, len(text))
                inside = span is not None and begin <= span[0] and span[1] < stop
                shift = len(asked) - begin
                targets = (0.0, 0.0) if span is None or not inside else (float(span[0] + shift), float(span[1] + shift))
                ids = asked + text[begin:stop]
                labels = [0] + [IGNORE] * (len(ids) - 1)
                yield Example(ids, labels, targets), _Window(number, len(asked), edges[begin : stop + 1])


def _token_span(question: Question, edges: Sequence[int]) -> tuple[int, int] | None:
    """The first and the last token of the first answer; None where there is none."""
    if not question.answers:
        return None
    begin, answer = question.answers[0]
    first_byte = len(question.context[:begin].encode())
    last_byte = first_byte + len(answer.encode()) - 1
    first = max(token for token, edge in enumerate(edges) if edge <= first_byte)
    return first, max(token for token, edge in enumerate(edges) if edge <= last_byte)


def read_squad(path: Path) -> Iterator[Question]:
    """The questions of a file in the form of SQuAD.

    Raises:
        InputError: another form; no question; or an answer does not stand where it should, with the question's id.
    """
    text = "".join(line for _, line in text_lines(path))
    try:
        articles = json.loads(text)["data"]
        count = 0
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    count += 1
                    yield _question(path, paragraph["context"], asked)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not in the form of SQuAD (data, paragraphs, qas, answers): {error!r}.") from error
    if not count:
        raise InputError(f"{path} holds no question.")


def _question(path: Path, context: str, asked: dict[str, Any]) -> Question:
    where = f"{path}, question {asked['id']}"
    if not context.strip():
        raise InputError(f"{where}: the text is empty.")
    answers = [] if asked.get("is_impossible") else [(a["answer_start"], a["text"]) for a in asked["answers"]]
    for begin, answer in answers:
        found = context[begin : begin + len(answer)]
        if not answer or found != answer:
            raise InputError(
                f"{where}: the answer is {answer!r}, but at answer_start ({begin}) the text has {found!r}."
            )
    return Question(where, asked["question"], context, answers)


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
