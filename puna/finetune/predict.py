"""`puna predict`: what a trained head says about new texts.

Shapes: T tokens, C outputs of the head.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.batches.tables import SUFFIXES, Row, read_table, text_lines
from puna.finetune.tasks.classification import Classification, text_ids
from puna.finetune.tasks.head import predict
from puna.finetune.tasks.relations import Relations
from puna.finetune.tasks.spans import Spans
from puna.finetune.tasks.squad import read_squad
from puna.finetune.tasks.tagging import Tagging, word_pieces
from puna.finetune.tasks.tags import Sentence, entities
from puna.finetune.tasks.task import Example
from puna.finetune.tasks.trained import trained_task
from puna.finetune.tasks.windows import best_answers, windows
from puna.peft.heads import HeadModel, load_head_model
from puna.runtime.devices import DeviceName, open_device
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.runtime.progress import say
from puna.weights.load import resolve

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Classify, tag or search new texts by a head that `puna finetune` has trained."""

    model: Path
    """A directory with a head: model/ or adapter/ of a task, or any that transformers wrote."""
    data: Path
    """The texts: a file in the form of the task's own data, with or without labels, or a .txt file with a text a
    line."""
    output: Path | None = None
    """JSON Lines to write: each row with what the head says of it. Absent, they are printed."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a .csv or .tsv file that has no header."""
    device: DeviceName = "auto"
    """"auto" takes a GPU where there is one."""


def main(config: PredictConfig) -> None:
    """Read the texts, ask the head, write or print.

    Raises:
        InputError: the head cannot be read, or a text cannot; names the line.
    """
    directory = resolve(config.model)
    head = load_head_model(directory, dtype=torch.float32)
    head.model.to(open_device(config.device))
    task, max_tokens = trained_task(head, directory)
    match task:
        case Classification():
            lines = of_texts(head, task, new_rows(config.data, config.columns, task.text), max_tokens)
        case Relations():
            lines = of_texts(head, task.as_pairs(), task.read(config.data, config.columns), max_tokens)
        case Tagging():
            lines = of_words(head, task, new_sentences(config.data, task), max_tokens)
        case Spans():
            lines = of_questions(head, task, config.data, max_tokens)
        case _:
            raise InputError(f"The head in {config.model} is of a kind that cannot be asked: {task}.")
    if config.output is None:
        for line in lines:
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    else:
        say(f"Wrote {write_jsonl(config.output, lines):,} rows to {config.output}")


def of_texts(head: HeadModel, task: Classification, rows: Iterable[Row], max_tokens: int) -> Iterator[Line]:
    """Each row with its class and that class's probability; its classes and the probabilities of all; or its number."""
    read = list(rows)
    ids = []
    for row in read:
        own, cut = text_ids(task, row, head.tokenizer, max_tokens)
        ids.append(own)
        if cut:
            say(f"{row.where} is longer than the {max_tokens:,} tokens that the head was trained on, and was cut.")
    for row, logits_TC in zip(read, _ask(head, ids), strict=True):
        yield row.values | _verdict(head, task, logits_TC[-1])


def classify(directory: Path, texts: Sequence[str]) -> list[str]:
    """The class of each text, by a head in a directory.

    Raises:
        InputError: it is no classification of single texts with one class each.
    """
    head = load_head_model(directory, dtype=torch.float32)
    task, max_tokens = trained_task(head, directory)
    if not isinstance(task, Classification) or task.second_text or task.problem != "one_class":
        raise InputError(f"{directory} is no classification that gives each text one class.")
    rows = [Row(f"text {number}", {task.text: text}) for number, text in enumerate(texts, start=1)]
    return [line["predicted"] for line in of_texts(head, task, rows, max_tokens)]


def _verdict(head: HeadModel, task: Classification, logits_C: Tensor) -> Line:
    match task.problem:
        case "one_class":
            best = int(logits_C.argmax())
            return {"predicted": head.spec.labels[best], "probability": round(float(logits_C.softmax(-1)[best]), 6)}
        case "many_classes":
            each = dict(zip(head.spec.labels, logits_C.sigmoid().tolist(), strict=True))
            return {
                "predicted": [
                    name for name, logit in zip(head.spec.labels, logits_C.tolist(), strict=True) if logit > 0
                ],
                "probabilities": {name: round(value, 6) for name, value in each.items()},
            }
        case "number":
            return {"predicted": float(logits_C[0])}


def of_words(head: HeadModel, task: Tagging, sentences: Iterable[Sentence], max_tokens: int) -> Iterator[Line]:
    """Each sentence's words with their tags, and the entities that the tags mark."""
    read = list(sentences)
    pieces = [word_pieces(task, each.words, each.places, head.tokenizer) for each in read]
    logits = _ask(head, [ids[:max_tokens] for ids, _ in pieces])
    for sentence, (ids, positions), logits_TC in zip(read, pieces, logits, strict=True):
        if len(ids) > max_tokens:
            say(f"{sentence.places[0]}: only {max_tokens:,} tokens were tagged; the rest got O.")
        best = logits_TC.argmax(-1).tolist()
        tags = [head.spec.labels[best[at]] if at < max_tokens else "O" for at in positions]
        # What the head says may be no tags of the scheme; read as BIO1, every sequence of B and I is.
        loose = [{"E": "I", "S": "B"}.get(tag[0], tag[0]) + tag[1:] for tag in tags]
        found = entities(Sentence(sentence.words, loose, sentence.places), "BIO1")
        yield {
            "tokens": sentence.words,
            "tags": tags,
            "entities": [
                {"text": task.separator.join(sentence.words[each.start : each.stop]), "type": each.type,
                 "start": each.start, "stop": each.stop}
                for each in found
            ],
        }  # fmt: skip


def of_questions(head: HeadModel, task: Spans, path: Path, max_tokens: int) -> Iterator[Line]:
    """Each question with the answer that was found, empty where there is none."""
    questions = list(read_squad(path, labelled=False))
    read = list(windows(questions, head.tokenizer, max_tokens, task.overlap))
    answers = best_answers(
        questions,
        [window for _, window in read],
        _ask(head, [example.ids for example, _ in read]),
        task.max_answer_tokens,
        may_be_none=bool(head.spec.config.get("puna_may_be_none", False)),
    )
    for question, answer in zip(questions, answers, strict=True):
        yield {"id": question.id, "question": question.text, "answer": answer}


def _ask(head: HeadModel, texts: Sequence[list[int]]) -> list[Tensor]:
    """The logits [T, C] of each text."""
    examples = [Example(ids, [0] * len(ids)) for ids in texts]
    return predict(head.model, examples, head.spec.module, head.attention, head.tokenizer.pad_id)


def new_rows(path: Path, columns: Sequence[str], column: str) -> Iterator[Row]:
    """The rows of a table, or the lines of a .txt file as rows.

    Args:
        columns: names for the columns of tables without header.
        column: what the lines' texts are called.

    Raises:
        InputError: see `read_table`.
    """
    if path.suffix == ".txt":
        for number, line in text_lines(path):
            if line.strip():
                yield Row(f"{path}, line {number}", {column: line.strip()})
    else:
        yield from read_table(path, columns)


def new_sentences(path: Path, task: Tagging) -> Iterator[Sentence]:
    """Sentences, with tags or without; the tags are not looked at.

    Raises:
        InputError: a row without words; see also `read_sentences`.
    """
    if path.suffix == ".txt":
        for number, line in text_lines(path):
            if words := task.split(line):
                yield Sentence(words, ["O"] * len(words), [f"{path}, line {number}"] * len(words))
    elif (path.with_suffix("") if path.suffix == ".gz" else path).suffix in SUFFIXES:
        for row in read_table(path):
            value = row.values.get(task.words)
            listed: Any = task.split(value) if isinstance(value, str) else value
            if not isinstance(listed, list) or not listed or not all(isinstance(word, str) and word for word in listed):
                raise InputError(f"{row.where} has neither a text nor a list of words in its column {task.words!r}.")
            yield Sentence(listed, ["O"] * len(listed), [row.where] * len(listed))
    else:
        yield from task.read(path)
