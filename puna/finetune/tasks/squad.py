"""Questions about texts in the form of SQuAD 1.1 and 2.0."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna.batches.tables import text_lines
from puna.runtime.errors import InputError
from puna.runtime.progress import say


class MisplacedError(InputError):
    """An answer does not stand in the text where it should."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a text."""

    id: str
    """What the file calls it."""
    where: str
    """File and id, for errors."""
    text: str
    """The question."""
    context: str
    """The text."""
    answers: list[tuple[int, str]]
    """(first character in the context, answer); none where the text does not answer."""


def read_squad(
    path: Path, *, labelled: bool = True, misplaced: Literal["refuse", "leave_out"] = "refuse"
) -> Iterator[Question]:
    """The questions of a file in the form of SQuAD.

    Args:
        labelled: whether there have to be answers; they are not looked at otherwise.
        misplaced: what becomes of questions whose answers do not stand where they should.

    Raises:
        InputError: another form; no question; or an answer does not stand where it should, with the question's id.
    """
    text = "".join(line for _, line in text_lines(path))
    try:
        articles = json.loads(text)["data"]
        count = left_out = 0
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    count += 1
                    try:
                        yield _question(path, paragraph["context"], asked, labelled)
                    except MisplacedError:
                        if misplaced == "refuse":
                            raise
                        left_out += 1
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not in the form of SQuAD (data, paragraphs, qas, answers): {error!r}.") from error
    if count == left_out:
        raise InputError(f"{path} holds no question{' whose answer stands where it should' if count else ''}.")
    if left_out:
        say(
            f"{left_out:,} of {count:,} questions in {path} have answers that do not stand where they should: left out."
        )


def _question(path: Path, context: str, asked: dict[str, Any], labelled: bool) -> Question:
    where = f"{path}, question {asked['id']}"
    if not context.strip():
        raise InputError(f"{where}: the text is empty.")
    if not labelled or asked.get("is_impossible"):
        return Question(str(asked["id"]), where, asked["question"], context, [])
    answers = [(answer["answer_start"], answer["text"]) for answer in asked["answers"]]
    for begin, answer in answers:
        found = context[begin : begin + len(answer)]
        if not answer or found != answer:
            raise MisplacedError(
                f"{where}: the answer is {answer!r}, but at answer_start ({begin}) the text has {found!r}. Correct it, "
                "or set task.misplaced=leave_out."
            )
    return Question(str(asked["id"]), where, asked["question"], context, answers)
