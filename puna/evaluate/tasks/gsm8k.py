"""GSM8K: school mathematics in a few steps (Cobbe et al. 2021, arXiv:2110.14168)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puna.evaluate.tasks.generation import GeneratedAnswers
from puna.evaluate.tasks.hub import Published, read_questions
from puna.evaluate.tasks.task import Example
from puna.runtime.errors import InputError

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
_IGNORED = (",", r"\$", "(?s).*#### ", r"\.$")
_NO_ANSWER = "[invalid]"


@dataclass(frozen=True, kw_only=True)
class Gsm8k(GeneratedAnswers):
    """GSM8K. Reads gsm8k/test.jsonl.gz; shots are the first of gsm8k/train.jsonl.gz.

    Question: A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?
    Answer: It takes 2/2=<<2/2=1>>1 bolt of white fiber
    So the total amount of fabric is 2+1=<<2+1=3>>3 bolts of fabric
    #### 3

    strict_match takes the number behind the first ####, flexible_match the last number of the answer.
    """

    kind: Literal["gsm8k"] = "gsm8k"
    """Its name."""
    shots: int = 5
    """Solved examples in front of each question."""
    until: tuple[str, ...] = ("Question:", "</s>", "<|im_end|>")
    """An answer in plain text ends before the first of these; a chat's ends with the assistant's turn."""

    def read(self, data: Path | None) -> list[Example]:
        """The questions."""
        return _read(data, "test")

    def read_shots(self, data: Path | None) -> list[Example]:
        """Those of the training data."""
        return _read(data, "train")

    def values(self, example: Example, answer: str) -> dict[str, float]:
        """Both ways to find the answer's number, equal to the reference's string but for commas and the like."""
        reference = _comparable(example.target)
        strict, flexible = _STRICT.findall(answer), _FLEXIBLE.findall(answer)
        return {
            "strict_match": float(_comparable(_pick(strict, 0)) == reference),
            "flexible_match": float(_comparable(_pick(flexible, -1)) == reference),
        }


def _read(data: Path | None, part: str) -> list[Example]:
    examples = []
    published = Published("openai/gsm8k", part, lambda row, _: row, ("main",))
    for row in read_questions(data, f"gsm8k/{part}.jsonl.gz", published):
        solution = row.get("answer", str)
        if not _STRICT.search(solution):
            raise InputError(f"{row.where}: the answer does not say what it comes to, behind ####.")
        examples.append(
            Example(
                id=row.where.rpartition(" ")[2],
                where=row.where,
                prompt=f"Question: {row.get('question', str)}\nAnswer:",
                target=f" {solution}",
            )
        )
    return examples


def _pick(found: Sequence[str], place: int) -> str:
    return found[place].strip() if found else _NO_ANSWER


def _comparable(text: str) -> str:
    for pattern in _IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()
