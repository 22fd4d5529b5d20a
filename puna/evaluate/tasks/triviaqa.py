"""TriviaQA: questions of quizzes, asked without the pages that answer them (Joshi et al. 2017, arXiv:1705.03551)."""

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna.evaluate.scorers import f1, mentions
from puna.evaluate.tasks.generation import GeneratedAnswers
from puna.evaluate.tasks.hub import Published, read_questions
from puna.evaluate.tasks.task import Example

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class TriviaQa(GeneratedAnswers):
    """TriviaQA. Reads triviaqa_sm_sub.jsonl.gz.

    Question: What type of animal is a dik-dik?
    Answer: Antelope (also: Antelopes, Botswanan Antelopes, Antilopina, Hybrid antelope)

    - exact_match: the answer is one of the names, but for case and punctuation, as in lm-eval;
    - mentioned: one of the names stands in it, as suits a chat's whole sentences;
    - f1: the words in common with the best of the names, see `puna.evaluate.scorers.f1`.
    """

    kind: Literal["triviaqa"] = "triviaqa"
    """Its name."""
    max_tokens: int = 32
    """Cut answers off here."""
    until: tuple[str, ...] = ("\n", ".", ",")
    """An answer in plain text ends before the first of these; a chat's ends with the assistant's turn."""

    def read(self, data: Path | None) -> list[Example]:
        """The questions, and all names of what they ask for."""
        return [
            Example(
                id=row.where.rpartition(" ")[2],
                where=row.where,
                prompt=row.get("context", str),
                target=f" {row.get('answer', str)}",
                extra={"aliases": row.texts("aliases")},
            )
            for row in read_questions(data, "triviaqa_sm_sub.jsonl.gz", PUBLISHED)
        ]

    def values(self, example: Example, answer: str) -> dict[str, float]:
        """Three measures, from strict to kind."""
        names = (example.target.strip(), *example.extra["aliases"])
        return {
            "exact_match": float(_comparable(answer.strip()) in set(map(_comparable, names))),
            "mentioned": float(mentions(answer, names)),
            "f1": f1(answer, names),
        }


def _comparable(text: str) -> str:
    return text.lower().translate(_PUNCTUATION)


def _from_hub(row: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    answer = row["answer"]
    return {"context": f"Question: {row['question']}\nAnswer:", "answer": answer["value"], "aliases": answer["aliases"]}


PUBLISHED = Published("mandarjoshi/trivia_qa", "validation", _from_hub, ("rc.nocontext",))
