"""Long texts for a head that finds answers: overlapping windows, and the best answer of all of them.

Shapes: T tokens, C outputs of the head (first and last token of an answer).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from puna.batches.packing import IGNORE
from puna.finetune.tasks.squad import Question
from puna.finetune.tasks.task import Example
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a text behind its question."""

    question: int
    first: int
    """Where in the window the text begins, in tokens."""
    edges: list[int]
    """Where in the text's UTF-8 bytes each token begins, and behind them where the last ends."""


def windows(
    questions: Sequence[Question], tokenizer: Tokenizer, limit: int, overlap: int
) -> Iterator[tuple[Example, Window]]:
    """BOS, question, EOS and a window of the text; as many of each question as its text needs.

    Args:
        limit: the most tokens of all that.
        overlap: tokens of the text that two windows share.

    Raises:
        InputError: the tokenizer has no EOS, a question leaves no room for its text, or the text cannot be pointed at.
    """
    if tokenizer.eos_id is None:
        raise InputError("This tokenizer has no EOS token, which stands between question and text.")
    assert tokenizer.bos_id is not None
    for number, question in enumerate(questions):
        asked = [tokenizer.bos_id, *tokenizer.encode(question.text), tokenizer.eos_id]
        size = limit - len(asked)
        if size <= overlap:
            raise InputError(
                f"{question.where}: the question has {len(asked) - 2} tokens, so that only {size} of "
                f"train.row_length ({limit}) are left for the text; task.overlap is {overlap}."
            )
        text = tokenizer.encode(question.context, continuation=True)
        pieces = [tokenizer.token_bytes(piece) for piece in text]
        if b"".join(pieces) != question.context.encode():
            raise InputError(f"{question.where}: the tokenizer changes the text, so places in it cannot be found.")
        edges = [0, *accumulate(map(len, pieces))]
        span = _token_span(question, edges)
        for begin in range(0, max(1, len(text) - overlap), size - overlap):
            stop = min(begin + size, len(text))
            inside = span is not None and begin <= span[0] and span[1] < stop
            shift = len(asked) - begin
            targets = (0.0, 0.0) if span is None or not inside else (float(span[0] + shift), float(span[1] + shift))
            ids = asked + text[begin:stop]
            labels = [0] + [IGNORE] * (len(ids) - 1)
            yield Example(ids, labels, targets), Window(number, len(asked), edges[begin : stop + 1])


def _token_span(question: Question, edges: Sequence[int]) -> tuple[int, int] | None:
    """The first and the last token of the first answer; None where there is none."""
    if not question.answers:
        return None
    begin, answer = question.answers[0]
    first_byte = len(question.context[:begin].encode())
    last_byte = first_byte + len(answer.encode()) - 1
    first = max(token for token, edge in enumerate(edges) if edge <= first_byte)
    return first, max(token for token, edge in enumerate(edges) if edge <= last_byte)


def _best_span(logits_TC: Tensor, max_tokens: int) -> tuple[float, int, int]:
    """(score, first token, token behind the last) of the likeliest answer in a window's text."""
    scores_TT = logits_TC[:, None, 0] + logits_TC[None, :, 1]
    allowed_TT = torch.ones_like(scores_TT, dtype=torch.bool).triu().tril(max_tokens - 1)
    scores_TT = scores_TT.masked_fill(~allowed_TT, float("-inf"))
    start, last = divmod(int(scores_TT.argmax()), len(logits_TC))
    return float(scores_TT[start, last]), start, last + 1


def best_answers(
    questions: Sequence[Question],
    read: Sequence[Window],
    logits: Sequence[Tensor],
    max_tokens: int,
    *,
    may_be_none: bool,
) -> list[str]:
    """The answer to each question, from the logits [T, 2] of all windows.

    Args:
        max_tokens: the longest answer.
        may_be_none: an answer is empty where the head rather points at BOS.
    """
    best = [(float("-inf"), "")] * len(questions)
    none = [float("inf")] * len(questions)
    for logits_TC, window in zip(logits, read, strict=True):
        score, start, stop = _best_span(logits_TC[window.first :], max_tokens)
        none[window.question] = min(none[window.question], float(logits_TC[0].sum()))
        if score > best[window.question][0]:
            text = questions[window.question].context.encode()
            found = text[window.edges[start] : window.edges[stop]].decode(errors="ignore").strip()
            best[window.question] = (score, found)
    if not may_be_none:
        return [text for _, text in best]
    return ["" if null > score else text for (score, text), null in zip(best, none, strict=True)]
