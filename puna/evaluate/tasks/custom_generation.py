"""Written answers to questions of one's own, from a local file and ten lines of TOML."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from puna.evaluate.scorers import exact, f1, matches, mentions, same_maths, same_number
from puna.evaluate.tasks.custom import CustomTask
from puna.evaluate.tasks.data import Row
from puna.evaluate.tasks.generation import GeneratedAnswers
from puna.evaluate.tasks.task import Example
from puna.evaluate.tasks.template import fill

Scorer = Literal["exact", "number", "mentions", "maths", "pattern", "f1"]


@dataclass(frozen=True, kw_only=True)
class CustomGeneration(CustomTask, GeneratedAnswers):
    """Written answers from a file of your own. Say, sums.toml beside sums.jsonl:

        kind = "generation"
        file = "sums.jsonl"
        prompt = "Question: What is {a} + {b}?\\nAnswer:"
        answer = " {sum}"
        scorer = "number"
        shots = 3

    and `tasks = ["sums.toml"]` of `puna evaluate`.
    """

    kind: Literal["generation"] = "generation"
    """Its name."""
    answer: str
    """Template of the right answer, with the blank in front that shots need; of a regular expression for "pattern"."""
    scorer: Scorer = "exact"
    """When an answer is right. "exact": equal but for case, punctuation and articles; "number": its last number is the
    reference's; "mentions": the reference stands in it; "maths": its \\boxed{}, or all of it, is the reference;
    "pattern": the reference is a regular expression and finds something in it; "f1": words in common, 0 to 1."""
    until: tuple[str, ...] = ("\n",)
    """An answer in plain text ends before the first of these; a chat's ends with the assistant's turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scorer == "pattern" and self.shots:
            raise ValueError("shots end in the right answer, which a pattern is not: leave out shots, or the pattern.")

    def example(self, row: Row) -> Example:
        """Prompt and answer filled in."""
        return self.finish(row, fill(self.answer, row))

    def values(self, example: Example, answer: str) -> dict[str, float]:
        """What the scorer says."""
        return {
            "accuracy" if self.scorer != "f1" else "f1": float(_SCORERS[self.scorer](answer, example.target.strip()))
        }


_SCORERS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "number": same_number,
    "mentions": lambda answer, reference: mentions(answer, [reference]),
    "maths": lambda answer, reference: same_maths(answer.strip(), reference),
    "pattern": matches,
    "f1": lambda answer, reference: f1(answer, [reference]),
}
