"""Several answers to each question: what of the spread is luck of the draw, and what would stay with endless draws.

Source: E. Miller 2024 (arXiv:2411.00640), section 3.1; the split is the one-way analysis of variance with
random effects.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from puna.evaluate.statistics.intervals import Estimate, estimate


@dataclass(frozen=True, slots=True)
class SeedsEstimate:
    """A mean over questions and seeds, and where its uncertainty comes from."""

    estimate: Estimate
    """Of the questions' means over seeds; more seeds make `standard_error` smaller only down to `floor`."""
    within: float
    """Variance of one question's values over seeds, averaged over questions."""
    between: float
    """Variance of the questions' true means, the luck of the draw taken off; at least 0."""
    floor: float
    """Standard error that endless seeds would leave, as there are only so many questions (independent ones)."""
    means: tuple[float, ...]
    """Mean over questions for each seed."""


def estimate_over_seeds(
    values: ArrayLike, clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> SeedsEstimate:
    """The mean of values[question, seed].

    Args:
        values: one row a question, one column a seed, at least two of each.
        clusters: the name of each question's cluster, as for `estimate`.
        confidence: of the interval.

    Raises:
        ValueError: not a table of at least two questions and two seeds, or as for `estimate`.
    """
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or min(table.shape) < 2:
        raise ValueError("Variance over seeds needs a table of at least two questions (rows) and two seeds (columns).")
    num_questions, num_seeds = table.shape
    means = table.mean(1)
    within = float(table.var(1, ddof=1).mean())
    between = max(float(means.var(ddof=1)) - within / num_seeds, 0.0)
    return SeedsEstimate(
        estimate(means, clusters, confidence),
        within,
        between,
        math.sqrt(between / num_questions),
        tuple(table.mean(0).tolist()),
    )
