"""Two models on the same questions: what differs is known better than either score.

Sources: E. Miller 2024 (arXiv:2411.00640), section 4.2, paired standard errors; Q. McNemar 1947, "Note on the Sampling
Error of the Difference Between Correlated Proportions"; M. W. Fagerland et al. 2013, "The McNemar test for binary
matched-pairs data", for the mid-p value; B. Efron 1987, "Better Bootstrap Confidence Intervals".
"""

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats  # type: ignore[import-untyped]

from puna.evaluate.statistics.intervals import Estimate, Interval, cluster_sums, estimate


def mcnemar(ours: ArrayLike, theirs: ArrayLike, method: Literal["exact", "mid-p", "chi2"] = "exact") -> float:
    """Probability of so uneven a split, or a more uneven one, of the questions that only one model has right, if both
    were equally good.

    Args:
        ours: right (true, 1) or wrong for each question.
        theirs: the other model's, for the same questions in the same order.
        method: `exact` never claims too much; `mid-p` is less timid and keeps its level in practice; `chi2` is the
            textbook's approximation, without continuity correction, for many questions.

    Raises:
        ValueError: the two are not as many, or something else than right and wrong is among them.
    """
    first, second = _pair(ours, theirs)
    if not np.isin(np.concatenate([first, second]), (0, 1)).all():
        raise ValueError("McNemar's test needs right and wrong only; for scores use paired_difference or bootstrap.")
    only_ours, only_theirs = int((first > second).sum()), int((first < second).sum())
    uneven = only_ours + only_theirs
    if uneven == 0:
        return 1.0
    if method == "chi2":
        return float(stats.chi2.sf((only_ours - only_theirs) ** 2 / uneven, 1))
    if method == "exact":
        return float(stats.binomtest(only_ours, uneven).pvalue)
    fewer = min(only_ours, only_theirs)
    return float(2 * stats.binom.cdf(fewer, uneven, 0.5) - stats.binom.pmf(fewer, uneven, 0.5))


def paired_difference(
    ours: ArrayLike, theirs: ArrayLike, clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Estimate:
    """The mean of ours minus theirs, question by question; arguments as those of `estimate`.

    Raises:
        ValueError: the two are not as many, or as for `estimate`.
    """
    first, second = _pair(ours, theirs)
    return estimate(first - second, clusters, confidence)


def bootstrap(
    ours: ArrayLike,
    theirs: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """An interval of the mean of ours minus theirs that assumes no distribution.

    Whole clusters are drawn where they are given. Otherwise as `bootstrap_ratio`.
    """
    first, second = _pair(ours, theirs)
    sums, sizes = cluster_sums(first - second, clusters), cluster_sums(np.ones(len(first)), clusters)
    return bootstrap_ratio(sums, sizes, confidence, resamples, seed)


def bootstrap_ratio(
    parts: ArrayLike, wholes: ArrayLike, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Interval:
    """A bias-corrected and accelerated interval of sum(parts) / sum(wholes), such as bits over bytes of documents.

    The same seed gives the same interval.

    Raises:
        ValueError: the two are not as many, or fewer than two.
    """
    sums, sizes = _pair(parts, wholes)
    if len(sums) < 2:
        raise ValueError("A bootstrap needs at least two questions, or two clusters.")
    means = sums / sizes
    if (means == means[0]).all():  # nothing varies: scipy would warn, and give not-a-number
        return Interval(float(means[0]), float(means[0]))
    found = stats.bootstrap(
        (sums, sizes),
        _ratio,
        paired=True,
        vectorized=True,
        batch=64,
        confidence_level=confidence,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def _ratio(sums: NDArray[np.float64], sizes: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    total: NDArray[np.float64] = sums.sum(axis) / sizes.sum(axis)
    return total


def _pair(ours: ArrayLike, theirs: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"A pair needs the same questions for both: {len(first)} are ours, {len(second)} theirs.")
    return first, second
