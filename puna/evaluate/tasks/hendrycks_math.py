"""MATH: problems of mathematics competitions (Hendrycks et al. 2021, arXiv:2103.03874)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from puna.evaluate.algebra import equivalent_all
from puna.evaluate.maths import between_dollars, equal_strings, last_boxed
from puna.evaluate.scorers import same_maths
from puna.evaluate.tasks.generation import GeneratedAnswers, summed_up
from puna.evaluate.tasks.hub import Published, read_questions
from puna.evaluate.tasks.request import Answer, Generated
from puna.evaluate.tasks.task import Example, Score


@dataclass(frozen=True, kw_only=True)
class HendrycksMath(GeneratedAnswers):
    """MATH. Reads math.jsonl.gz; groups are its categories.

    Problem: We roll a fair 6-sided die 5 times.  What is the probability that we get a 6 in at most 2 of the rolls?
    Answer: \\frac{625}{648}

    - accuracy: the answer's last \\boxed{}, or all of it, is the reference (`puna.evaluate.scorers.same_maths`);
    - exact_match: what stands between its first and last dollar sign is, as in lm-eval's hendrycks_math;
    - equivalent: with `algebra`, the answer means the reference (`puna.evaluate.algebra`).
    """

    kind: Literal["math"] = "math"
    """Its name."""
    solutions: bool = False
    """Shots show whole solutions, which end in \\boxed{}, rather than bare answers."""
    algebra: bool = False
    """Also compare by computer algebra, which needs math-verify."""
    until: tuple[str, ...] = ("Problem:",)
    """An answer in plain text ends before the first of these; a chat's ends with the assistant's turn."""

    def read(self, data: Path | None) -> list[Example]:
        """The problems."""
        return [
            Example(
                id=row.where.rpartition(" ")[2],
                where=row.where,
                prompt=f"Problem: {row.get('context', str)}\n{'Solution' if self.solutions else 'Answer'}:",
                target=" " + row.get("chain_of_thought" if self.solutions else "answer", str),
                group=row.get("category", str),
                extra={"answer": row.get("answer", str)},
            )
            for row in read_questions(data, "math.jsonl.gz", PUBLISHED)
        ]

    def values(self, example: Example, answer: str) -> dict[str, float]:
        """Both ways to find and compare the final answer."""
        reference = example.extra["answer"]
        return {
            "accuracy": float(same_maths(answer.strip(), reference)),
            "exact_match": float(equal_strings(between_dollars(answer), reference)),
        }

    def score_all(
        self, examples: Sequence[Example], answers: Sequence[Sequence[Answer]], kept: Path | None = None
    ) -> list[Score]:
        """Asks computer algebra about all answers that strings and numbers leave open, if it is to be asked."""
        if not self.algebra:
            return super().score_all(examples, answers)
        given = [cast(Sequence[Generated], own) for own in answers]
        values = [
            [self.values(example, answer.text) for answer in own] for example, own in zip(examples, given, strict=True)
        ]
        flat = [
            (answer.text, example.extra["answer"], value)
            for example, own, of_own in zip(examples, given, values, strict=True)
            for answer, value in zip(own, of_own, strict=True)
        ]
        left = [(text, reference) for text, reference, value in flat if not value["accuracy"]]
        verdicts = iter(equivalent_all(left))
        for _, _, value in flat:
            value["equivalent"] = value["accuracy"] or float(next(verdicts))
        return [
            summed_up(own, of_own, {"reference": example.target})
            for example, own, of_own in zip(examples, given, values, strict=True)
        ]


_CATEGORIES = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def _from_hub(row: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    solution = row["solution"]
    answer = last_boxed(solution)
    return {"context": row["problem"], "answer": answer, "chain_of_thought": solution, "category": configuration}


PUBLISHED = Published("EleutherAI/hendrycks_math", "test", _from_hub, _CATEGORIES)
