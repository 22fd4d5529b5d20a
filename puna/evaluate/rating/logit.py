"""One small model of choices, fitted to many resamples of the data at once: what strengths and win rates rest on.

Shapes: R resamples, N observations, O outcomes, D parameters.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_PRIOR_SCALE = 4.0
"""Standard deviation of the normal distribution around 0 that parameters are expected in, in nats. It keeps the
strength of who has won everything finite, and hardly moves others: 4 nats are odds of 55 to 1."""
_LONGEST_STEP = 2.0
_TOLERANCE = 1e-9
_MOST_AT_ONCE = 2_000_000


def fit_choices(features_NOD: Array, counts_RNO: Array) -> Array:
    """Parameters under which each outcome's log-probability is its features' product with them, up to a constant.

    The most probable parameters, found by Newton's method; the logarithm of the probability is strictly concave.

    Args:
        features_NOD: of each outcome of each observation.
        counts_RNO: how often each was seen, in each resample; need not be whole numbers.

    Returns:
        parameters_RD.
    """
    if counts_RNO.size > _MOST_AT_ONCE and len(counts_RNO) > 1:
        return np.concatenate([fit_choices(features_NOD, part) for part in np.array_split(counts_RNO, 2)])
    precision = _PRIOR_SCALE**-2
    size = features_NOD.shape[-1]
    parameters_RD = np.zeros((len(counts_RNO), size))
    totals_RN = counts_RNO.sum(-1)
    for _ in range(200):
        logits_RNO = np.einsum("nod,rd->rno", features_NOD, parameters_RD)
        chances_RNO = np.exp(logits_RNO - logits_RNO.max(-1, keepdims=True))
        chances_RNO /= chances_RNO.sum(-1, keepdims=True)
        expected_RNO = chances_RNO * totals_RN[:, :, None]
        gradient_RD = np.einsum("nod,rno->rd", features_NOD, counts_RNO - expected_RNO) - precision * parameters_RD
        means_RND = np.einsum("nod,rno->rnd", features_NOD, chances_RNO)
        hessian_RDD = np.einsum("nod,noe,rno->rde", features_NOD, features_NOD, expected_RNO, optimize=True)
        hessian_RDD -= np.einsum("rnd,rne,rn->rde", means_RND, means_RND, totals_RN, optimize=True)
        hessian_RDD += precision * np.eye(size)
        step_RD = np.linalg.solve(hessian_RDD, gradient_RD[:, :, None])[:, :, 0]
        length_R1 = np.linalg.norm(step_RD, axis=1, keepdims=True)
        parameters_RD += step_RD * np.minimum(1, _LONGEST_STEP / np.maximum(length_R1, _TOLERANCE))
        if length_R1.max() < _TOLERANCE:
            return parameters_RD
    raise AssertionError("Newton's method has not converged")


def resample(clusters: Sequence[Hashable], resamples: int, seed: int) -> Array:
    """How often each observation is drawn when whole clusters are drawn with replacement, weights_RN; the first row is
    the data themselves."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    of_N = np.array([numbers[name] for name in clusters])
    size = len(numbers)
    drawn_RC = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), resamples)
    return np.concatenate([np.ones((1, len(of_N))), drawn_RC[:, of_N]])
