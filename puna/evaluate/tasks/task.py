"""What a task is, and how one is written.

A task is a frozen dataclass in a small file of its own, with an example problem in its docstring. It says three things:

1. how rows become examples: `read`, with `puna.evaluate.tasks.data`, which names file and line of what is wrong;
2. what is asked about each example: `requests`, from `compose`, which puts shots or a chat around the question;
3. what an answer is worth: `score`, a few numbers for each example, of which `metrics` makes a few for the task.

The families do most of that: `choice.MultipleChoice`, `continuation.OneContinuation`; a task then only reads. A new
kind gets a line in `table.TASKS`, by which recipes find it; its fields (with attribute docstrings) are its settings.
Everything is a pure function of the settings and the data, so that a run can be repeated and continued.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.evaluate.statistics.intervals import estimate, wilson
from puna.evaluate.tasks.data import is_hub
from puna.evaluate.tasks.request import Answer, Prompt, Request
from puna.runtime.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One question and what is known of it."""

    id: str
    """Its name within the task, the same in every run, so that models can be compared question by question."""
    where: str
    """File and line that it came from."""
    prompt: str
    """The question, without shots; `target` or a choice goes on right behind it."""
    target: str
    """What an ideal model would go on with, blank in front included; shots end in it."""
    choices: tuple[str, ...] = ()
    """Answers to choose from, as long as they count: without the blank in front."""
    gold: int = -1
    """The place of the right one in `choices`."""
    group: str = ""
    """Subject, category or the like, of which metrics are reported, too. Shots come from the same group."""
    cluster: str = ""
    """Examples with one passage share it, as their scores go together; absent where each stands for itself."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else the task's scorer needs."""


@dataclass(frozen=True, slots=True)
class Score:
    """What came of one example."""

    values: dict[str, float]
    """Name -> number; right or wrong is 1 or 0. The same names for every example of a task."""
    record: dict[str, Any]
    """What samples.jsonl shows of it besides: what the model chose or said, log-likelihoods."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number about a model."""

    value: float
    low: float | None
    """The interval's ends; None where nothing is known about them."""
    high: float | None
    standard_error: float | None
    count: int
    """Examples that it rests on."""
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Settings that all tasks have, and what they have to say."""

    kind: str
    """Its name in a recipe."""
    name: str | None = None
    """What results call it; its kind where absent. Two tasks of a run need different names."""
    shots: int = 0
    """Solved examples in front of each question."""
    limit: int | None = None
    """Ask only the first so many questions of each group; all where absent."""
    seed: int = 0
    """Of the choice of shots, and of drawn answers."""
    chat: bool = False
    """Ask through the model's chat template: each shot is a question and an answer, and the model answers the last."""

    def __post_init__(self) -> None:
        if self.shots < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(
                f"shots is {self.shots} and limit {self.limit}; they have to be at least 0 and at least 1."
            )

    @property
    def title(self) -> str:
        """What results call it."""
        return self.name or self.kind

    @abstractmethod
    def read(self, data: Path | None) -> list[Example]:
        """The questions, in a fixed order, all of them.

        Args:
            data: folder of benchmark data; None where the user named none.

        Raises:
            InputError: they are not there, or one is malformed; the message names file and line.
        """

    def inputs(self, data: Path | None) -> list[Path]:
        """What its questions are read from, for the record."""
        return [] if data is None or is_hub(data) else [data]

    def read_shots(self, data: Path | None) -> list[Example] | None:
        """Examples to take shots from, in the order in which they are taken; None: the questions, by the seed."""
        return None

    def describe(self, example: Example) -> str:
        """What stands in front of shots and question."""
        return ""

    def compose(self, example: Example, shots: Sequence[Example]) -> Prompt:
        """Description, shots and question."""
        description = self.describe(example)
        if not self.chat:
            return description + "".join(f"{shot.prompt}{shot.target}\n\n" for shot in shots) + example.prompt
        turns = [(shot.prompt, shot.target.strip()) for shot in shots]
        users = [question for question, _ in turns] + [example.prompt]
        users[0] = description + users[0]
        messages: list[dict[str, str]] = []
        for i, question in enumerate(users):
            messages.append({"role": "user", "content": question})
            if i < len(turns):
                messages.append({"role": "assistant", "content": turns[i][1]})
        return tuple(messages)

    @abstractmethod
    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """What is asked about an example."""

    def follow_up(self, example: Example, answers: Sequence[Answer]) -> list[Request]:
        """What is asked next, given all answers so far; asked again until nothing is, as in conversations of turns."""
        return []

    @abstractmethod
    def score(self, example: Example, answers: Sequence[Answer]) -> Score:
        """What the answers to one example's requests are worth."""

    def score_all(
        self, examples: Sequence[Example], answers: Sequence[Sequence[Answer]], kept: Path | None = None
    ) -> list[Score]:
        """`score` of each example, for tasks that do better with all at once (programs to run, a judge to ask).

        Args:
            kept: file of answers that models have given (`AnswerCache`), where a judge's are kept as well.
        """
        return [self.score(example, given) for example, given in zip(examples, answers, strict=True)]

    def metrics(self, examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, Metric]:
        """The numbers about the model, the most telling first: here, the mean of each value."""
        return means(examples, scores)


def means(examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, Metric]:
    """Mean of each value over the examples, with a 95 % interval: Wilson's where all are 0 or 1 and none are clustered,
    else Student's t over clusters."""
    columns: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        for name, value in score.values.items():
            columns[name].append(value)
    clusters = [example.cluster or example.id for example in examples]
    return {name: mean_metric(values, clusters) for name, values in columns.items()}


def mean_metric(values: Sequence[float], clusters: Sequence[str], *, higher_is_better: bool = True) -> Metric:
    """Mean and interval of one number an example."""
    found = estimate(values, clusters)
    low, high = found.interval
    if set(values) <= {0.0, 1.0} and len(set(clusters)) == len(clusters):
        low, high = wilson(int(sum(values)), len(values))
    elif found.standard_error == float("inf"):
        return Metric(found.mean, None, None, None, found.count, higher_is_better)
    error = None if found.standard_error == float("inf") else found.standard_error
    return Metric(found.mean, low, high, error, found.count, higher_is_better)


def checked(task: Task, examples: Sequence[Example]) -> list[Example]:
    """The examples that are asked: the first `limit` of each group.

    Raises:
        InputError: there is none, two have one id, or one could not tell good from bad: no question, choices that are
            equal or empty, a right answer that is not among them.
    """
    if not examples:
        raise InputError(f"Task {task.title} has no question: its data are empty.")
    seen: dict[str, str] = {}
    for example in examples:
        if example.id in seen:
            raise InputError(f"{example.where}: its id {example.id!r} is that of {seen[example.id]}, too.")
        seen[example.id] = example.where
        if example.choices:
            _check_choices(example)
    counts: dict[str, int] = defaultdict(int)
    kept = []
    for example in examples:
        counts[example.group] += 1
        if task.limit is None or counts[example.group] <= task.limit:
            kept.append(example)
    return kept


def _check_choices(example: Example) -> None:
    if len(example.choices) < 2:
        raise InputError(f"{example.where}: a choice needs at least two answers, but there is {len(example.choices)}.")
    for i, choice in enumerate(example.choices):
        if not choice.strip():
            raise InputError(f"{example.where}: answer {i} of {len(example.choices)} is empty.")
        if choice in example.choices[:i]:
            raise InputError(
                f"{example.where}: the answer {choice!r} stands there twice (as {example.choices.index(choice)} and "
                f"{i}), so no model can tell which one is meant. Correct the line or take it out."
            )
    if not 0 <= example.gold < len(example.choices):
        raise InputError(
            f"{example.where}: the right answer is number {example.gold}, counted from 0, but there are "
            f"{len(example.choices)} answers."
        )
