"""MBPP: small programs, right when their tests pass (Austin et al. 2021, arXiv:2108.07732)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import comb
from pathlib import Path
from textwrap import dedent, indent
from typing import Literal, cast

from puna.evaluate.sandbox.run import Limits, Outcome, check_protections, run_all, with_tests
from puna.evaluate.tasks.data import Row, data_file, read_rows
from puna.evaluate.tasks.generation import GeneratedAnswers, lower_is_better, summed_up
from puna.evaluate.tasks.request import Answer, Generated, Prompt
from puna.evaluate.tasks.task import Example, Metric, Score
from puna.runtime.progress import say

_FENCED = re.compile(r"```(?:\w+)?[ \t]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)
_INSTRUCTION = "Complete this Python function. Answer with the whole function in a code block.\n\n"


@dataclass(frozen=True, kw_only=True)
class Mbpp(GeneratedAnswers):
    """MBPP in its sanitised form, each problem the head of a function. Reads mbpp/mbpp_sanitized.jsonl.

        def similar_elements(test_tup1, test_tup2):
            '''
            Write a function to find the shared elements from the given two lists.
            '''
          + res = tuple(set(test_tup1) & set(test_tup2))
          + return (res)

    The programs run in `puna.evaluate.sandbox`. pass@k is the probability that one of k answers passes all tests,
    estimated without bias from `samples` answers (`pass_at_k`).
    """

    kind: Literal["mbpp"] = "mbpp"
    """Its name."""
    max_tokens: int = 256
    """Cut answers off here."""
    k: tuple[int, ...] = ()
    """Report pass@k for each of these besides pass@1; at most `samples`."""
    limits: Limits = field(default_factory=Limits)
    """What each program may use up."""
    allow_unsafe: bool = False
    """Run programs also where this machine cannot hold them."""
    until: tuple[str, ...] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n'''", '\n"""', "\n```")
    """An answer in plain text ends before the first of these; a chat's ends with the assistant's turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(1 <= k <= self.samples for k in self.k):
            raise ValueError(f"k is {self.k}; each has to be at least 1 and at most samples, which is {self.samples}.")

    def read(self, data: Path | None) -> list[Example]:
        """The problems.

        Raises:
            InputError: as always; or this machine cannot hold programs, and they are not to be run without.
        """
        say(
            "Programs run whether or not this machine can hold them (allow_unsafe)."
            if self.allow_unsafe
            else check_protections()
        )
        return [
            Example(
                id=row.get("task_id", str),
                where=row.where,
                prompt=row.get("prompt", str),
                target=_fitted(row.get("canonical_solution", str)),
                extra={"tests": _tests(row)},
            )
            for row in read_rows(data_file(data, "mbpp/mbpp_sanitized.jsonl"))
        ]

    def compose(self, example: Example, shots: Sequence[Example]) -> Prompt:
        """Heads of functions as they are; in a chat with words around them, and code blocks."""
        if not self.chat:
            return super().compose(example, shots)
        messages = []
        for shot in shots:
            solution = f"```python\n{shot.prompt}{shot.target}\n```"
            messages += [_ask(shot), {"role": "assistant", "content": solution}]
        return (*messages, _ask(example))

    def values(self, example: Example, answer: str) -> dict[str, float]:
        """Whether it passes."""
        return _verdict(*run_all([self.program(example, answer)], self.limits, 1, allow_unsafe=self.allow_unsafe))

    def score_all(
        self, examples: Sequence[Example], answers: Sequence[Sequence[Answer]], kept: Path | None = None
    ) -> list[Score]:
        """Run all programs side by side, and count those that pass."""
        given = [cast(Sequence[Generated], own) for own in answers]
        pairs = zip(examples, given, strict=True)
        programs = [self.program(example, answer.text) for example, own in pairs for answer in own]
        outcomes = iter(run_all(programs, self.limits, allow_unsafe=self.allow_unsafe))
        return [self._scored(own, list(islice(outcomes, len(own)))) for own in given]

    def program(self, example: Example, answer: str) -> str:
        """The answer with what it is an answer to, and its tests."""
        if self.chat:
            # The whole function takes the place of the empty one; what the head imports stays.
            found = _FENCED.search(answer)
            solution = f"{example.prompt}\n{found[1] if found else answer}"
        else:
            solution = example.prompt + answer
        return with_tests(solution, example.extra["tests"])

    def _scored(self, answers: Sequence[Generated], outcomes: Sequence[Outcome]) -> Score:
        statuses = [outcome.status for outcome in outcomes]
        record = {"outcomes": statuses, "outputs": [outcome.output[-500:] for outcome in outcomes]}
        score = summed_up(answers, [_verdict(outcome) for outcome in outcomes], record)
        num_passed = statuses.count("passed")
        estimates = {f"pass@{k}": pass_at_k(len(outcomes), num_passed, k) for k in self.k}
        return Score(score.values | estimates, score.record)

    def metrics(self, examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, Metric]:
        """pass@k, and the share of programs that a limit stopped."""
        return lower_is_better(super().metrics(examples, scores), "stopped")


def _ask(example: Example) -> dict[str, str]:
    return {"role": "user", "content": f"{_INSTRUCTION}```python\n{example.prompt.rstrip()}\n```"}


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The probability that at least one of k answers passes, where `num_passed` of `num_samples` drawn ones did.

    1 - C(n - c, k) / C(n, k), unbiased: Chen et al. 2021 (arXiv:2107.03374), equation 1.

    >>> round(pass_at_k(4, 1, 2), 6)
    0.5
    """
    return 1 - comb(num_samples - num_passed, k) / comb(num_samples, k)


def _tests(row: Row) -> str:
    """The published tests, called; their function gets a name that no solution has, and what they need imported."""
    tests = row.get("test", str).replace("def check(", "def check_solution(", 1)
    return f"import math\n{tests}\ncheck_solution({row.get('entry_point', str)})\n"


def _fitted(solution: str) -> str:
    """A published solution with its first block four blanks deep, as the head's docstring is: it comes with tabs or two
    blanks, which Python does not take behind four."""
    lines = solution.expandtabs(4).splitlines()
    end = next((n for n, line in enumerate(lines) if line[:1].strip()), len(lines))
    body = indent(dedent("\n".join(lines[:end])), "    ")
    return "\n".join([body, *lines[end:]]).rstrip()


def _verdict(outcome: Outcome) -> dict[str, float]:
    """Whether it passed, and whether a limit stopped it."""
    return {"pass@1": float(outcome.status == "passed"), "stopped": float(outcome.status not in ("passed", "failed"))}
