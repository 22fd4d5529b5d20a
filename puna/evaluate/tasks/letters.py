"""Questions answered by the letter of an answer, as in MMLU: what its family shares."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from puna.evaluate.tasks.choice import MultipleChoice
from puna.evaluate.tasks.data import Row, data_file, is_hub, read_archive
from puna.evaluate.tasks.hub import Published, hub_rows
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
    def published(self, folder: str) -> Published:
        """What of the hub is in place of a folder of the archive; its rows say their "subject", too."""

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
        by_subject = self._of_hub(folder) if is_hub(data) else self._of_archive(data, folder)
        if unknown := [subject for subject in self.subjects if subject not in by_subject]:
            source = self.published(folder).repository if is_hub(data) else self.archive
            raise InputError(
                f"{source} holds no {self.questions} file of {unknown[0]!r}. Subjects: {', '.join(by_subject)}."
            )
        wanted = self.subjects or tuple(by_subject)
        return [_example(row, subject, self.answer_cue) for subject in wanted for row in by_subject[subject]]

    def _of_archive(self, data: Path | None, folder: str) -> dict[str, Iterable[Row]]:
        texts = read_archive(data_file(data, self.archive))
        files = {PurePosixPath(name).stem.removesuffix(f"_{folder}"): name for name in texts if _in(name, folder)}
        return {subject: self.rows(texts[name], f"{self.archive}: {name}") for subject, name in files.items()}

    def _of_hub(self, folder: str) -> dict[str, Iterable[Row]]:
        found: dict[str, list[Row]] = defaultdict(list)
        for row in hub_rows(self.published(folder), self.archive, self.subjects):
            found[row.get("subject", str)].append(row)
        return {subject: found[subject] for subject in sorted(found)}


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
