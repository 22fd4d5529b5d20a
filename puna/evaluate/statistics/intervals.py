"""Means and shares with standard errors and intervals, also where questions come in clusters.

Sources: E. Miller 2024, "Adding Error Bars to Evals" (arXiv:2411.00640), sections 2 and 4; E. B. Wilson 1927, "Probable
Inference, the Law of Succession, and Statistical Inference".
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats  # type: ignore[import-untyped]


class Interval(NamedTuple):
    """An interval that holds the true value with the confidence that was asked for."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over questions, and how sure it is."""

    mean: float
    standard_error: float
    """Infinite if there is but one question, or one cluster: nothing is known about how questions differ."""
    interval: Interval
    """Student's t with one degree of freedom less than there are clusters."""
    count: int
    """Questions."""


def wilson(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share: never outside 0 to 1, and honest near both ends.

    Raises:
        ValueError: successes are not between 0 and total, or total is 0.

    >>> [round(end, 3) for end in wilson(8, 10)]
    [0.49, 0.943]
    """
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"{successes} of {total} is not a share of questions.")
    found = stats.binomtest(successes, total).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def estimate(values: ArrayLike, clusters: Sequence[Hashable] | None = None, confidence: float = 0.95) -> Estimate:
    """The mean of one value a question, with its standard error.

    Clusters are questions about one passage, or drawn in another way together: their values may move together, so only
    clusters count as independent (Miller 2024, equation 4, times G / (G - 1) for G clusters, so that clusters of one
    question each give the plain standard error; this is statsmodels' `cov_type="cluster"`).

    Args:
        values: a number for each question: right or wrong, a score, a difference.
        clusters: the name of each question's cluster; every question is one of its own without.
        confidence: of the interval.

    Raises:
        ValueError: there is no question, a value is not a number, or clusters are not as many as values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError("An estimate needs a list of at least one value.")
    if not np.isfinite(numbers).all():
        raise ValueError("An estimate needs finite values; at least one is infinite or not a number.")
    mean = float(numbers.mean())
    deviations = cluster_sums(numbers - mean, clusters)
    count, groups = len(numbers), len(deviations)
    if groups == 1:
        return Estimate(mean, math.inf, Interval(-math.inf, math.inf), count)
    standard_error = math.sqrt(float(deviations @ deviations) * groups / (groups - 1)) / count
    half = float(stats.t.ppf((1 + confidence) / 2, groups - 1)) * standard_error
    return Estimate(mean, standard_error, Interval(mean - half, mean + half), count)


def estimate_ratio(parts: ArrayLike, wholes: ArrayLike, confidence: float = 0.95) -> Estimate:
    """sum(parts) / sum(wholes), such as bits over bytes of documents, and its spread over documents.

    The ratio estimator: the spread of a sum of parts - ratio * wholes (Cochran 1977, "Sampling Techniques", section
    2.11), with `estimate`'s interval.

    Raises:
        ValueError: as for `estimate`, or the wholes do not add up to more than 0.
    """
    counted, sizes = np.asarray(parts, np.float64), np.asarray(wholes, np.float64)
    if len(counted) != len(sizes) or sizes.sum() <= 0:
        raise ValueError("A ratio needs as many parts as wholes, and wholes of more than 0 in all.")
    ratio = float(counted.sum() / sizes.sum())
    residuals = estimate((counted - ratio * sizes) / sizes.mean(), confidence=confidence)
    low, high = residuals.interval
    return Estimate(ratio, residuals.standard_error, Interval(ratio + low, ratio + high), len(sizes))


def cluster_sums(values: NDArray[np.float64], clusters: Sequence[Hashable] | None) -> NDArray[np.float64]:
    """The sum of each cluster's values, in order of first appearance; without clusters the values themselves.

    Raises:
        ValueError: clusters are not as many as values.
    """
    if clusters is None:
        return values
    if len(clusters) != len(values):
        raise ValueError(f"There are {len(clusters)} cluster names for {len(values)} values.")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros(len(numbers))
    np.add.at(sums, [numbers[name] for name in clusters], values)
    return sums
