"""Tasks of one's own, from a local file and ten lines of TOML."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puna.evaluate.tasks.choice import MultipleChoice
from puna.evaluate.tasks.continuation import OneContinuation
from puna.evaluate.tasks.data import Row, read_rows
from puna.evaluate.tasks.task import Example, Task
from puna.evaluate.tasks.template import fill
from puna.runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CustomTask(Task):
    """What tasks from a file of one's own share.

    In templates, {column} stands for the value in that column of a row.
    """

    file: Path
    """JSON Lines, CSV or TSV, gzipped if .gz follows. Where the task has a TOML file of its own, relative to that."""
    shots_file: Path | None = None
    """Solved examples, of the same columns, taken in their order; absent: other questions of `file`, by the seed."""
    prompt: str
    """Template of the question, up to where the model goes on."""
    preamble: str = ""
    """What stands in front of shots and question, line ends included."""
    group: str | None = None
    """Column of a subject or category, of which accuracy is given, too, and from which shots come."""
    cluster: str | None = None
    """Column that is equal where questions share a passage, so that intervals take it into account."""

    def describe(self, example: Example) -> str:
        """The preamble."""
        return self.preamble

    def read(self, data: Path | None) -> list[Example]:
        """The rows of `file`."""
        return [self.example(row) for row in read_rows(self.file)]

    def inputs(self, data: Path | None) -> list[Path]:
        """The files."""
        return [path for path in (self.file, self.shots_file) if path is not None]

    def read_shots(self, data: Path | None) -> list[Example] | None:
        """The rows of `shots_file`."""
        return None if self.shots_file is None else [self.example(row) for row in read_rows(self.shots_file)]

    @abstractmethod
    def example(self, row: Row) -> Example:
        """What a row says."""

    def finish(self, row: Row, target: str, choices: tuple[str, ...] = (), gold: int = -1) -> Example:
        """The example of a row, but for what its kind makes of it."""
        return Example(
            id=row.where.rpartition(" ")[2],
            where=row.where,
            prompt=fill(self.prompt, row),
            target=target,
            choices=choices,
            gold=gold,
            group=fill(f"{{{self.group}}}", row) if self.group else "",
            cluster=fill(f"{{{self.cluster}}}", row) if self.cluster else "",
        )


@dataclass(frozen=True, kw_only=True)
class CustomChoice(CustomTask, MultipleChoice):
    """Multiple choice from a file of your own. Say, capitals.toml beside capitals.csv:

        kind = "choice"
        file = "capitals.csv"
        prompt = "Question: What is the capital of {country}?\\nAnswer:"
        choices = ["{first}", "{second}", "{third}"]
        answer = "right"
        shots = 2

    and `tasks = ["capitals.toml"]` of `puna evaluate`.
    """

    kind: Literal["choice"] = "choice"
    """Its name."""
    choices: str | tuple[str, ...]
    """Templates of the answers, without the blank in front; or the column that holds a list of them."""
    answer: str
    """Column of the right one: its place counted from 0, its letter (A, B, ...), or its whole text."""

    def example(self, row: Row) -> Example:
        """Prompt and choices filled in."""
        if isinstance(self.choices, str):
            choices = row.texts(self.choices)
        else:
            choices = tuple(fill(choice, row) for choice in self.choices)
        gold = _place(row, self.answer, choices)
        return self.finish(row, f" {choices[gold]}", choices, gold)


@dataclass(frozen=True, kw_only=True)
class CustomContinuation(CustomTask, OneContinuation):
    """How likely one right continuation is, and whether it is what the model would say, from a file of your own:

    kind = "continuation"
    file = "proverbs.jsonl"
    prompt = "{beginning}"
    answer = " {end}"
    """

    kind: Literal["continuation"] = "continuation"
    """Its name."""
    answer: str
    """Template of the continuation, with the blank in front that belongs there."""

    def example(self, row: Row) -> Example:
        """Prompt and answer filled in."""
        return self.finish(row, fill(self.answer, row))


def _place(row: Row, column: str, choices: tuple[str, ...]) -> int:
    """Which of the choices a column says is right."""
    value = row.values.get(column)
    text = str(value).strip()
    if text in choices and not isinstance(value, int):
        return choices.index(text)
    if text.isdecimal():
        place = int(text)
    elif len(text) == 1 and text.upper().isascii() and text.isalpha():
        place = ord(text.upper()) - ord("A")
    else:
        raise InputError(
            f"{row.where}: {column!r} is {value!r}, which is none of the answers ({', '.join(map(repr, choices))}), "
            "no letter and no number of one."
        )
    if not 0 <= place < len(choices):
        raise InputError(
            f"{row.where}: {column!r} is {value!r}, but there are only {len(choices)} answers; numbers count from 0, "
            "letters from A."
        )
    return place
