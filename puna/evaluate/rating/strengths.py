"""How strong models are, by who wins against whom: Bradley-Terry with ties, and Elo.

Shapes: R resamples, N ratings, K models, P pairs of models, M ratings of a resample; for O and D see `logit`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puna.evaluate.rating.logit import fit_choices, resample
from puna.evaluate.rating.records import Rating
from puna.evaluate.statistics.intervals import Interval

ELO_MEAN = 1000.0
ELO_SCALE = 400 / math.log(10)
"""Elo points for a nat of log-odds: who is 400 points above wins ten times as often as they lose."""
_ELO_FACTOR = 16.0


@dataclass(frozen=True, slots=True)
class Strength:
    """How strong one model is beside the others. Points are Elo's, 1000 for the mean of all."""

    model: str
    bradley_terry: float
    """Points by the Bradley-Terry model, which knows no order of time."""
    interval: Interval
    """In which 95 % of resamples have them; prompts are drawn, each with all that was said of it."""
    elo: float
    """Points after all ratings, one after the other in a drawn order, each moving two models by up to 16 points; the
    mean over orders. It lags behind where ratings are few."""
    elo_interval: Interval
    wins: int
    ties: int
    losses: int


def strengths(ratings: Sequence[Rating], resamples: int = 1000, seed: int = 0) -> list[Strength]:
    """Every model's strength, the strongest first.

    Ties are the model's third outcome (R. R. Davidson 1970, "On Extending the Bradley-Terry Model to Accommodate Ties
    in Paired Comparison Experiments", equation 2.5); for Elo they are half a win. That both are bad is a tie. How much
    better an answer was does not count. Models that were never compared, not even by way of others, have intervals that
    say so: they are far too wide.

    Raises:
        ValueError: there is no rating.
    """
    if not ratings:
        raise ValueError("There is no rating to measure strengths by.")
    models = sorted({name for rating in ratings for name in (rating.left, rating.right)})
    number = {name: index for index, name in enumerate(models)}
    left_N = np.array([number[rating.left] for rating in ratings])
    right_N = np.array([number[rating.right] for rating in ratings])
    score_N = np.array([score_of_left(rating) for rating in ratings])
    weights_RN = resample([repr(rating.prompt) for rating in ratings], resamples, seed)

    points_RK = ELO_MEAN + ELO_SCALE * _bradley_terry(left_N, right_N, score_N, weights_RN, len(models))
    rng = np.random.default_rng(seed + 1)
    elo_RK = _elo(left_N, right_N, score_N, weights_RN[1:], len(models), rng)
    orders_RK = _elo(left_N, right_N, score_N, np.ones_like(weights_RN[:100]), len(models), rng)
    found = []
    for name, k in number.items():
        own_N = np.concatenate([score_N[left_N == k], 1 - score_N[right_N == k]])
        tally = [int((own_N == value).sum()) for value in (1.0, 0.5, 0.0)]
        found.append(
            Strength(
                name,
                float(points_RK[0, k]),
                _middle(points_RK[1:, k]),
                float(orders_RK[:, k].mean()),
                _middle(elo_RK[:, k]),
                *tally,
            )
        )
    return sorted(found, key=lambda each: -each.bradley_terry)


def score_of_left(rating: Rating) -> float:
    """1 if the left answer is better, 0 if the right one is, else one half."""
    return {"left": 1.0, "right": 0.0, None: 0.5}[rating.better]


def _bradley_terry(
    left_N: NDArray[np.int64],
    right_N: NDArray[np.int64],
    score_N: NDArray[np.float64],
    weights_RN: NDArray[np.float64],
    num_models: int,
) -> NDArray[np.float64]:
    """Log-strengths of each resample, with mean 0.

    Davidson's model: the outcomes left, tie, right have log-probabilities d / 2, a, -d / 2 up to a constant, where d is
    the difference of the two log-strengths, and the last parameter, a, says how common ties are.
    """
    # Ratings of the same two models with the same outcome count together: one observation for each pair of models.
    pairs, pair_N = np.unique(np.stack([left_N, right_N], axis=1), axis=0, return_inverse=True)
    outcome_N = np.array([2 - round(2 * score) for score in score_N])
    is_NPO = np.zeros((len(score_N), len(pairs), 3))
    is_NPO[np.arange(len(score_N)), pair_N.ravel(), outcome_N] = 1
    counts_RPO = np.tensordot(weights_RN, is_NPO, axes=1)
    features_POD = np.zeros((len(pairs), 3, num_models + 1))
    for row, (left, right) in enumerate(pairs):
        features_POD[row, 0, [left, right]] = 0.5, -0.5
        features_POD[row, 1, num_models] = 1
        features_POD[row, 2, [left, right]] = -0.5, 0.5
    strengths_RK = fit_choices(features_POD, counts_RPO)[:, :num_models]
    centred: NDArray[np.float64] = strengths_RK - strengths_RK.mean(1, keepdims=True)
    return centred


def _elo(
    left_N: NDArray[np.int64],
    right_N: NDArray[np.int64],
    score_N: NDArray[np.float64],
    weights_RN: NDArray[np.float64],
    num_models: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Points after all ratings of each resample, in an order of its own."""
    points_RK = np.full((len(weights_RN), num_models), ELO_MEAN)
    drawn = [rng.permutation(np.repeat(np.arange(len(left_N)), weights_N.astype(int))) for weights_N in weights_RN]
    orders_RM = np.full((len(drawn), max(map(len, drawn))), -1)  # resamples of whole prompts differ in length
    for row, order in enumerate(drawn):
        orders_RM[row, : len(order)] = order
    for rating_R in orders_RM.T:
        here = np.flatnonzero(rating_R >= 0)
        left, right = left_N[rating_R[here]], right_N[rating_R[here]]
        expected = 1 / (1 + np.exp((points_RK[here, right] - points_RK[here, left]) / ELO_SCALE))
        change = _ELO_FACTOR * (score_N[rating_R[here]] - expected)
        points_RK[here, left] += change
        points_RK[here, right] -= change
    return points_RK


def _middle(values: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high))
