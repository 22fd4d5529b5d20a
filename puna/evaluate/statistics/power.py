"""How many questions it takes to see a difference between two models; `puna power`.

Source: E. Miller 2024 (arXiv:2411.00640), section 5, equation 9.
"""

import math
from dataclasses import dataclass

from scipy import stats  # type: ignore[import-untyped]

from puna.runtime.progress import say


def questions_needed(difference: float, variance: float, power: float = 0.8, confidence: float = 0.95) -> int:
    """Independent questions that show a true difference with a chance of `power`.

    Args:
        difference: between the two models' true mean scores.
        variance: of the difference on one question, over questions and over draws of the answer: Miller's
            omega^2 + sigma_A^2 / K_A + sigma_B^2 / K_B. `variance_of_disagreement` gives it for right and wrong; a
            pilot's is count * standard_error**2 of its `paired_difference`, which also accounts for clusters.
        power: chance of an interval without 0, if the true difference is `difference`.
        confidence: of that interval.

    Raises:
        ValueError: no difference, a negative variance, or a chance that is not between 0 and 1.

    >>> questions_needed(0.03, variance=1 / 9)
    969
    """
    if difference == 0:
        raise ValueError("A difference of 0 cannot be seen by any number of questions.")
    return max(2, math.ceil(_quantiles(power, confidence) ** 2 * _checked(variance) / difference**2))


def smallest_difference(num_questions: int, variance: float, power: float = 0.8, confidence: float = 0.95) -> float:
    """The true difference that so many independent questions show with a chance of `power`; see `questions_needed`.

    Raises:
        ValueError: fewer than two questions, a negative variance, or a chance that is not between 0 and 1.

    >>> round(smallest_difference(969, variance=1 / 9), 4)
    0.03
    """
    if num_questions < 2:
        raise ValueError(f"{num_questions} questions show nothing; it takes at least 2.")
    return _quantiles(power, confidence) * math.sqrt(_checked(variance) / num_questions)


def variance_of_disagreement(disagreement: float, difference: float = 0.0) -> float:
    """Variance of the difference on one question, where each answer is right or wrong.

    Args:
        disagreement: share of questions that exactly one of the two models has right.
        difference: between their accuracies.

    Raises:
        ValueError: the difference is larger than the disagreement that it rests on, or that is no share.
    """
    if not abs(difference) <= disagreement <= 1:
        raise ValueError(f"Models that disagree on {disagreement} of the questions cannot differ by {difference}.")
    return disagreement - difference**2


def _quantiles(power: float, confidence: float) -> float:
    if not (0 < power < 1 and 0 < confidence < 1):
        raise ValueError(f"power ({power}) and confidence ({confidence}) have to be between 0 and 1.")
    return float(stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power))


def _checked(variance: float) -> float:
    if variance < 0:
        raise ValueError(f"A variance cannot be negative, as {variance} is.")
    return variance


@dataclass(frozen=True, kw_only=True)
class PowerConfig:
    """Say how many questions show a difference, or what difference a number of questions shows."""

    difference: float = 0.03
    """Difference in accuracy that you want to see: 0.03 is three percent."""
    questions: int = 1000
    """Questions that you have."""
    disagreement: float = 0.2
    """Share of the questions that exactly one of the two models has right; `puna compare` reports it. Two sizes of one
    family often disagree on a fifth."""
    power: float = 0.8
    """Chance of seeing the difference if it is there."""
    confidence: float = 0.95
    """Of the interval that has to leave out 0."""

    def __post_init__(self) -> None:
        variance = variance_of_disagreement(self.disagreement, self.difference)
        questions_needed(self.difference, variance, self.power, self.confidence)
        smallest_difference(self.questions, variance, self.power, self.confidence)


def main(config: PowerConfig) -> None:
    """Print both answers."""
    variance = variance_of_disagreement(config.disagreement, config.difference)
    needed = questions_needed(config.difference, variance, config.power, config.confidence)
    smallest = smallest_difference(config.questions, config.disagreement, config.power, config.confidence)
    say(
        f"Two models that disagree on {config.disagreement:.0%} of the questions: a difference of "
        f"{config.difference:.2%} shows with a chance of {config.power:.0%} in {needed:,} questions; "
        f"{config.questions:,} questions show one of {smallest:.2%}."
    )
