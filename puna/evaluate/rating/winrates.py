"""How often one model's answers are better than another's, by kind of request, and with length taken into account.

Shapes: R resamples, N ratings; for O and D see `logit`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from puna.evaluate.rating.logit import fit_choices, resample
from puna.evaluate.rating.records import Rating
from puna.evaluate.rating.strengths import score_of_left
from puna.evaluate.statistics.intervals import Estimate, Interval, estimate, wilson


@dataclass(frozen=True, slots=True)
class Tally:
    """What came of comparisons. One that several have rated counts once, by what most of them say."""

    category: str
    """Kind of request; empty for all."""
    wins: int
    ties: int
    losses: int

    @property
    def total(self) -> int:
        """Comparisons."""
        return self.wins + self.ties + self.losses

    @property
    def wins_interval(self) -> Interval:
        """Of the share of comparisons won (Wilson)."""
        return wilson(self.wins, self.total)

    @property
    def losses_interval(self) -> Interval:
        """Of the share of comparisons lost (Wilson)."""
        return wilson(self.losses, self.total)


@dataclass(frozen=True, slots=True)
class WinRate:
    """One model beside another."""

    model: str
    other: str
    overall: Tally
    by_category: tuple[Tally, ...]
    """In the order of their names; empty where prompts have no category."""
    rate: Estimate
    """Share of comparisons won, a tie being half of one, with prompts as clusters."""
    controlled: float
    """The same if both models' answers were equally long."""
    controlled_interval: Interval
    """In which 95 % of resamples of prompts have it."""
    length: float
    """Mean length of the model's answers, in characters."""
    other_length: float


def win_rates(ratings: Sequence[Rating], resamples: int = 1000, seed: int = 0) -> list[WinRate]:
    """Every two models that were compared, in the order of their names."""
    by_pair: dict[tuple[str, str], list[Rating]] = defaultdict(list)
    for rating in ratings:
        by_pair[min(rating.left, rating.right), max(rating.left, rating.right)].append(rating)
    models = sorted({name for pair in by_pair for name in pair})
    return [
        _win_rate(model, other, by_pair[model, other], resamples, seed)
        for model, other in combinations(models, 2)
        if (model, other) in by_pair
    ]


def length_controlled(
    scores: Sequence[float], lengths: Sequence[float], other_lengths: Sequence[float], prompts: Sequence[str],
    resamples: int = 1000, seed: int = 0,
) -> tuple[float, Interval]:  # fmt: skip
    """The win rate there would be if answers were equally long, and its interval.

    A logistic regression of the score on the model and on tanh of the difference in length over its standard deviation;
    the rate is read off where that difference is 0 (Y. Dubois et al. 2024, "Length-Controlled AlpacaEval",
    arXiv:2404.04475, section 3). Their third term, how hard each instruction is, needs many models and is left out.

    Args:
        scores: of the model in each rating: 1 won, 0 lost, 0.5 tied.
        lengths: of its answers.
        other_lengths: of the answers that they were compared with.
        prompts: names each rating's prompt; whole prompts are drawn.
    """
    score_N = np.asarray(scores, np.float64)
    longer_N = np.asarray(lengths, np.float64) - np.asarray(other_lengths, np.float64)
    # The deviation is around 0, not around the mean: models that are always longer by the same would give 0.
    scale = float(np.sqrt((longer_N**2).mean())) or 1.0
    features_NOD = np.zeros((len(score_N), 2, 2))
    features_NOD[:, 0, 0] = 1
    features_NOD[:, 0, 1] = np.tanh(longer_N / scale)
    counts_NO = np.stack([score_N, 1 - score_N], axis=1)
    weights_RN = resample(prompts, resamples, seed)
    parameters_RD = fit_choices(features_NOD, weights_RN[:, :, None] * counts_NO)
    rates_R = 1 / (1 + np.exp(-parameters_RD[:, 0]))
    low, high = np.quantile(rates_R[1:], [0.025, 0.975])
    return float(rates_R[0]), Interval(float(low), float(high))


def _win_rate(model: str, other: str, ratings: Sequence[Rating], resamples: int, seed: int) -> WinRate:
    scores = [_score(rating, model) for rating in ratings]
    prompts = [repr(rating.prompt) for rating in ratings]
    own, others = ([len(_answer(rating, name)) for rating in ratings] for name in (model, other))
    controlled, interval = length_controlled(scores, own, others, prompts, resamples, seed)
    categories = sorted({rating.category for rating in ratings if rating.category})
    return WinRate(
        model,
        other,
        _tally("", ratings, model),
        tuple(_tally(name, [each for each in ratings if each.category == name], model) for name in categories),
        estimate(scores, prompts),
        controlled,
        interval,
        float(np.mean(own)),
        float(np.mean(others)),
    )


def _tally(category: str, ratings: Sequence[Rating], model: str) -> Tally:
    by_item: dict[str, list[float]] = defaultdict(list)
    for rating in ratings:
        by_item[rating.item].append(_score(rating, model))
    outcomes = [_most(scores) for scores in by_item.values()]
    return Tally(category, outcomes.count(1.0), outcomes.count(0.5), outcomes.count(0.0))


def _most(scores: Sequence[float]) -> float:
    """What most say; a tie if as many say one thing as another."""
    counts = {value: list(scores).count(value) for value in (1.0, 0.5, 0.0)}
    most = [value for value, count in counts.items() if count == max(counts.values())]
    return most[0] if len(most) == 1 else 0.5


def _score(rating: Rating, model: str) -> float:
    return score_of_left(rating) if rating.left == model else 1 - score_of_left(rating)


def _answer(rating: Rating, model: str) -> str:
    return rating.left_answer if rating.left == model else rating.right_answer
