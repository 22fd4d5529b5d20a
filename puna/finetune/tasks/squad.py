"""Questions about texts in the form of SQuAD 1.1 and 2.0."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.batches.tables import text_lines
from puna.runtime.errors import InputError


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


def read_squad(path: Path, *, labelled: bool = True) -> Iterator[Question]:
    """The questions of a file in the form of SQuAD.

    Args:
        labelled: whether there have to be answers; they are not looked at otherwise.

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
                    yield _question(path, paragraph["context"], asked, labelled)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not in the form of SQuAD (data, paragraphs, qas, answers): {error!r}.") from error
    if not count:
        raise InputError(f"{path} holds no question.")


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
            raise InputError(
                f"{where}: the answer is {answer!r}, but at answer_start ({begin}) the text has {found!r}."
            )
    return Question(str(asked["id"]), where, asked["question"], context, answers)
