"""Answers that the model writes, greedily or drawn several times, each scored by itself."""

import statistics
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from puna.evaluate.statistics.seeds import estimate_over_seeds
from puna.evaluate.tasks.request import Answer, Generated, Generation, Request
from puna.evaluate.tasks.task import Example, Metric, Score, Task
from puna.runtime.seeds import derive_seed

CUT_OFF = "cut_off"


@dataclass(frozen=True, kw_only=True)
class GeneratedAnswers(Task):
    """The model goes on after the question; what it says is scored.

    Every task also reports `cut_off`, the share of answers that had not come to an end after `max_tokens`. With
    several samples, a question counts with the mean of its answers, and the first metric's spread is reported: the
    standard deviation of its value from one draw of all answers to the next.
    """

    max_tokens: int = 256
    """Cut answers off here."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above that, answers are drawn."""
    top_p: float = 1.0
    """Of the tokens, draw among the fewest whose probabilities sum to this."""
    samples: int = 1
    """Answers to each question; several need a temperature."""
    until: tuple[str, ...] = ()
    """An answer in plain text ends before the first of these; a chat's ends with the assistant's turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1 or self.samples < 1:
            raise ValueError("max_tokens and samples have to be at least 1.")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples need a temperature above 0: without, they are all the same.")

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """The question, once for each sample."""
        prompt = self.compose(example, shots)
        return [
            Generation(
                prompt,
                self.max_tokens,
                () if self.chat else self.until,
                self.temperature,
                self.top_p,
                derive_seed(self.seed, "answer", example.id, sample),
            )
            for sample in range(self.samples)
        ]

    @abstractmethod
    def values(self, example: Example, answer: str) -> dict[str, float]:
        """What one answer is worth, the most telling first."""

    def score(self, example: Example, answers: Sequence[Answer]) -> Score:
        """The mean of each value over the answers."""
        given = cast(Sequence[Generated], answers)
        return summed_up(given, [self.values(example, answer.text) for answer in given], {"reference": example.target})

    def metrics(self, examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, Metric]:
        """Means; where answers were drawn several times, the spread of the first from draw to draw."""
        found = lower_is_better(super().metrics(examples, scores), CUT_OFF)
        if self.samples > 1 and len(examples) > 1:
            first = next(iter(found))
            by_sample = [score.record["by_sample"][first] for score in scores]
            spread = statistics.stdev(estimate_over_seeds(by_sample).means)
            found[f"{first}_spread"] = Metric(spread, None, None, None, self.samples, higher_is_better=False)
        return found


def summed_up(
    answers: Sequence[Generated], values: Sequence[Mapping[str, float]], record: Mapping[str, Any] | None = None
) -> Score:
    """One question's score from those of its answers: means, the share that was cut off, and what was said.

    Args:
        values: of each answer.
        record: what else samples.jsonl shows.
    """
    by_sample = {name: [value[name] for value in values] for name in values[0]}
    by_sample[CUT_OFF] = [float(not answer.finished) for answer in answers]
    means = {name: statistics.fmean(column) for name, column in by_sample.items()}
    said = {"answers": [answer.text for answer in answers]}
    return Score(means, said | dict(record or {}) | ({"by_sample": by_sample} if len(answers) > 1 else {}))


def lower_is_better(metrics: Mapping[str, Metric], *names: str) -> dict[str, Metric]:
    """The metrics, of which some are better when they are lower."""
    return {
        name: replace(metric, higher_is_better=False) if name in names else metric for name, metric in metrics.items()
    }
