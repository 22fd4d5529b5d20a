"""How far a model's confidence is from how often it is right."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from puna.evaluate.tasks.task import Metric

_RESAMPLES = 1000


def calibration_error(confidences: Sequence[float], right: Sequence[float], bins: int = 10) -> Metric:
    """Expected calibration error: |confidence - accuracy| of answers of like confidence, weighted by how many they are
    (Guo et al. 2017, arXiv:1706.04599, equation 3; bins of equal width).

    The interval is the middle 95 % over resampled questions; the error of few questions is biased upwards.

    >>> calibration_error([0.9, 0.9, 0.9, 0.9], [1, 1, 1, 0]).value
    0.15
    """
    confidences_N, right_N = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    bins_N = np.clip(np.ceil(confidences_N * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps_N = confidences_N - right_N
    value = round(_error(gaps_N, bins_N, bins), 12)
    count = len(gaps_N)
    if count == 1:
        return Metric(value, None, None, None, count, higher_is_better=False)
    drawn = np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))
    resampled = [_error(gaps_N[rows], bins_N[rows], bins) for rows in drawn]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Metric(value, float(low), float(high), float(np.std(resampled, ddof=1)), count, higher_is_better=False)


def _error(gaps_N: NDArray[np.float64], bins_N: NDArray[np.int64], bins: int) -> float:
    # A bin's count times |mean gap| is |sum of gaps|.
    return float(np.abs(np.bincount(bins_N, weights=gaps_N, minlength=bins)).sum() / len(gaps_N))
