"""A task from its data to its numbers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puna.config import to_plain
from puna.evaluate.harness.ask import Asker
from puna.evaluate.harness.shots import choose_shots
from puna.evaluate.tasks.request import Answer, Request
from puna.evaluate.tasks.task import Example, Metric, Score, Task, checked
from puna.runtime.errors import InputError


@dataclass(frozen=True)
class Prepared:
    """A task whose questions are ready to be asked."""

    task: Task
    examples: list[Example]
    requests: list[list[Request]]
    """For each example."""


@dataclass(frozen=True)
class Result:
    """What came of a task."""

    task: Task
    metrics: dict[str, Metric]
    """The most telling first."""
    groups: dict[str, dict[str, Metric]]
    """The same for each group of questions; empty where there is but one."""
    num_questions: int
    num_truncated: int
    """Questions whose beginning, shots first, had to be cut off, as the context holds no more."""
    samples: list[dict[str, Any]]
    """A row for each question, for samples.jsonl: task, id, where it stands, group, cluster, hash of its prompt, its
    values, and what the task records of it."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in results.json."""
        groups = {
            group: {name: asdict(metric) for name, metric in found.items()} for group, found in self.groups.items()
        }
        return {
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            **({"groups": groups} if groups else {}),
            "num_questions": self.num_questions,
            "num_truncated": self.num_truncated,
            "task": to_plain(self.task),
        }


def prepare(task: Task, data: Path | None) -> Prepared:
    """Read a task's questions, look whether they can be asked, and choose their shots.

    Raises:
        InputError: the data are not there or malformed (file and line are named), or there are too few for shots.
    """
    everything = task.read(data)
    examples = checked(task, everything)
    pool = task.read_shots(data) if task.shots else None
    shots = choose_shots(task, examples, everything, pool)
    requests = [task.requests(example, before) for example, before in zip(examples, shots, strict=True)]
    return Prepared(task, examples, requests)


def evaluate(asker: Asker, prepared: Prepared) -> Result:
    """Ask a task's questions, and what follows from the answers, and score them.

    Raises:
        InputError: a question cannot be asked of this model; see `Encoder`.
    """
    task, examples = prepared.task, prepared.examples
    if task.chat and asker.engine.tokenizer.chat_template is None:
        raise InputError(
            f"Task {task.title} asks through a chat (chat = true), but the model has no chat template. Leave chat out "
            "to ask for continuations of plain text, or give its tokenizer_config.json a chat_template."
        )
    answers: list[list[Answer]] = [[] for _ in examples]
    pending = dict(enumerate(prepared.requests))
    while pending:
        asked = asker.ask([request for requests in pending.values() for request in requests], task.title)
        given = iter(asked)
        for place, requests in pending.items():
            answers[place] += [next(given) for _ in requests]
        follow_ups = ((place, task.follow_up(examples[place], answers[place])) for place in pending)
        pending = {place: requests for place, requests in follow_ups if requests}
    scores = task.score_all(examples, answers, asker.kept)
    samples = [
        {
            "task": task.title,
            "id": example.id,
            "where": example.where,
            "group": example.group,
            "cluster": example.cluster,
            "prompt_hash": _hash(requests),
            "values": score.values,
            **score.record,
        }
        for example, requests, score in zip(examples, prepared.requests, scores, strict=True)
    ]
    return Result(
        task=task,
        metrics=task.metrics(examples, scores),
        groups=_by_group(task, examples, scores),
        num_questions=len(examples),
        num_truncated=sum(any(answer.num_truncated for answer in given) for given in answers),
        samples=samples,
    )


def _by_group(task: Task, examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, dict[str, Metric]]:
    names = sorted({example.group for example in examples})
    if len(names) < 2:
        return {}
    pairs = list(zip(examples, scores, strict=True))
    found = {}
    for name in names:
        own = [pair for pair in pairs if pair[0].group == name]
        found[name] = task.metrics([example for example, _ in own], [score for _, score in own])
    return found


def _hash(requests: Sequence[Request]) -> str:
    """Of all that the model was asked at first."""
    return hashlib.sha256(json.dumps([asdict(request) for request in requests]).encode()).hexdigest()[:16]
