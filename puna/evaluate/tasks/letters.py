"""Questions answered by the letter of an answer, as in MMLU: what its family shares."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from puna.evaluate.tasks.choice import MultipleChoice
from puna.evaluate.tasks.data import Row, data_file, read_archive
from puna.evaluate.tasks.task import Example, Metric, Score
from puna.runtime.errors import InputError

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True, kw_only=True)
class AnswerLetter(MultipleChoice):
    """Subjects in an archive of CSV files: dev/ holds the shots of each, another folder the questions."""

    subjects: tuple[str, ...] = ()
    """Only these, such as "anatomy"; all where absent."""

    archive: ClassVar[str]
    questions: ClassVar[str]
    answer_cue: ClassVar[str]

    @abstractmethod
    def rows(self, text: str, name: str) -> Iterator[Row]:
        """The rows of one file, with columns question, A, B, C, D and answer."""

    def read(self, data: Path | None) -> list[Example]:
        """Questions by subject."""
        return self._examples(data, self.questions)

    def read_shots(self, data: Path | None) -> list[Example]:
        """The published shots, in their order."""
        return self._examples(data, "dev")

    def metrics(self, examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, Metric]:
        """Without the accuracies by length: letters are as long as each other."""
        found = super().metrics(examples, scores)
        return {name: found[name] for name in ("accuracy", "calibration_error")}

    def _examples(self, data: Path | None, folder: str) -> list[Example]:
        texts = read_archive(data_file(data, self.archive))
        files = {PurePosixPath(name).stem.removesuffix(f"_{folder}"): name for name in texts if _in(name, folder)}
        if unknown := [subject for subject in self.subjects if subject not in files]:
            raise InputError(
                f"{self.archive} holds no {self.questions} file of {unknown[0]!r}. Subjects: {', '.join(files)}."
            )
        wanted = self.subjects or tuple(files)
        return [
            _example(row, subject, self.answer_cue)
            for subject in wanted
            for row in self.rows(texts[files[subject]], f"{self.archive}: {files[subject]}")
        ]


def _in(name: str, folder: str) -> bool:
    return PurePosixPath(name).parent.name == folder and name.endswith(".csv")


def _example(row: Row, subject: str, cue: str) -> Example:
    answer = row.get("answer", str).strip()
    if answer not in LETTERS:
        raise InputError(f"{row.where}: the right answer is {answer!r}, but has to be one of {', '.join(LETTERS)}.")
    return Example(
        id=row.where.rpartition(": ")[2],
        where=row.where,
        prompt=lettered(row.get("question", str), [row.get(letter, str) for letter in LETTERS], cue),
        target=f" {answer}",
        choices=LETTERS,
        gold=LETTERS.index(answer),
        group=subject,
    )


def lettered(question: str, answers: Sequence[str], cue: str) -> str:
    """The question, its answers behind their letters, and what asks for a letter."""
    lines = [f"{letter}. {answer}" for letter, answer in zip(LETTERS, answers, strict=True)]
    return "\n".join([question.strip(), *lines, cue])
