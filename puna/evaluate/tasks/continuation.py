"""The likelihood of one right continuation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from puna.evaluate.tasks.request import Answer, Continuation, Likelihood, Request
from puna.evaluate.tasks.task import Example, Metric, Score, Task, means


@dataclass(frozen=True, kw_only=True)
class OneContinuation(Task):
    """Scores the one right continuation of each text.

    - accuracy: how often greedy decoding would give exactly it;
    - perplexity: exp of the mean negative log-likelihood of whole continuations (not of tokens, as in lm-eval).
    """

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """The one continuation."""
        return [Continuation(self.compose(example, shots), example.target.lstrip() if self.chat else example.target)]

    def score(self, example: Example, answers: Sequence[Answer]) -> Score:
        """Whether it is greedy, and its likelihood."""
        (answer,) = cast(Sequence[Likelihood], answers)
        values = {"accuracy": float(answer.greedy), "log_likelihood": answer.log_likelihood}
        return Score(values, {"num_tokens": answer.num_tokens})

    def metrics(self, examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, Metric]:
        """Accuracy and perplexity."""
        found = means(examples, scores)
        return {"accuracy": found["accuracy"], "perplexity": exponential(found["log_likelihood"], -1)}


def exponential(metric: Metric, factor: float) -> Metric:
    """exp(factor * metric) of a mean, with the ends of its interval, and the standard error by the delta method."""
    value = _exp(factor * metric.value)
    if metric.low is None or metric.high is None or metric.standard_error is None:
        return Metric(value, None, None, None, metric.count, higher_is_better=False)
    low, high = sorted((_exp(factor * metric.low), _exp(factor * metric.high)))
    return Metric(value, low, high, abs(factor) * value * metric.standard_error, metric.count, higher_is_better=False)


def _exp(power: float) -> float:
    """e to a power; infinite where no float is so large, as for the "words" of a text without blanks."""
    try:
        return math.exp(power)
    except OverflowError:
        return math.inf
