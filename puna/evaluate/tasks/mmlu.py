"""MMLU: school and professional questions on 57 subjects (Hendrycks et al. 2021, arXiv:2009.03300)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from puna.evaluate.tasks.data import Row, csv_rows
from puna.evaluate.tasks.hub import Published
from puna.evaluate.tasks.letters import LETTERS, AnswerLetter
from puna.evaluate.tasks.task import Example


@dataclass(frozen=True, kw_only=True)
class Mmlu(AnswerLetter):
    """MMLU, answered by letter; 5 shots are usual. Reads mmlu/mmlu_dev_val.tar.gz, whose val part it asks.

    The following are multiple choice questions (with answers) about anatomy.

    Which of the following terms describes the body's ability to maintain its normal state?
    A. Anabolism
    B. Catabolism
    C. Tolerance
    D. Homeostasis
    Answer: D
    """

    kind: Literal["mmlu"] = "mmlu"
    """Its name."""

    archive: ClassVar[str] = "mmlu/mmlu_dev_val.tar.gz"
    questions: ClassVar[str] = "val"
    answer_cue: ClassVar[str] = "Answer:"

    def published(self, folder: str) -> Published:
        """Of all subjects at once."""
        return Published("cais/mmlu", {"val": "validation"}.get(folder, folder), _from_hub, ("all",))

    def rows(self, text: str, name: str) -> Iterator[Row]:
        """The files have no line of names."""
        return csv_rows(text, name, columns=("question", "A", "B", "C", "D", "answer"))

    def describe(self, example: Example) -> str:
        """Names the subject."""
        subject = example.group.replace("_", " ")
        return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


def _from_hub(row: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    answers = dict(zip(LETTERS, row["choices"], strict=True))
    return {"question": row["question"], "answer": LETTERS[row["answer"]], "subject": row["subject"], **answers}
