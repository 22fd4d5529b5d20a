"""L(N, D) = E + A / N^alpha + B / D^beta, fitted to runs (Hoffmann et al. 2022, arXiv:2203.15556, section 3.3)."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize  # type: ignore[import-untyped]

from puna.pretrain.scaling.runs import Floats, Runs
from puna.runtime.errors import InputError

DELTA = 1e-3
"""Where the Huber loss goes from square to linear, in nats (same section)."""
_NUM_COEFFICIENTS = 5
_HALVES = np.arange(0, 2.5, 0.5)
_STARTS = np.array(
    list(itertools.product(np.arange(0, 30, 5), np.arange(0, 30, 5), _HALVES - 1, _HALVES, _HALVES)), dtype=np.float64
)
"""Log A, log B, log E, alpha, beta: the grid of Hoffmann et al., appendix D.3."""


@dataclass(frozen=True)
class Law:
    """Coefficients of L(N, D), in nats per token, parameters and tokens."""

    irreducible: float
    """E: the loss of an infinite model after infinite data."""
    parameter_scale: float
    """A."""
    data_scale: float
    """B."""
    parameter_exponent: float
    """alpha."""
    data_exponent: float
    """beta."""

    def loss(self, parameters: Floats | float, tokens: Floats | float) -> Floats:
        """Predicted loss, in nats per token."""
        return np.asarray(
            self.irreducible
            + self.parameter_scale / np.asarray(parameters) ** self.parameter_exponent
            + self.data_scale / np.asarray(tokens) ** self.data_exponent
        )

    def best_split(self, compute: float) -> tuple[float, float]:
        """Parameters and tokens of least loss where 6 * parameters * tokens = `compute` FLOPs (equation 4)."""
        alpha, beta = self.parameter_exponent, self.data_exponent
        balance = (alpha * self.parameter_scale / (beta * self.data_scale)) ** (1 / (alpha + beta))
        parameters = balance * (compute / 6) ** (beta / (alpha + beta))
        return parameters, compute / (6 * parameters)

    @property
    def logarithms(self) -> Floats:
        """The coefficients as they are fitted: log A, log B, log E, alpha, beta."""
        scales = np.log([self.parameter_scale, self.data_scale, self.irreducible])
        return np.array([*scales, self.parameter_exponent, self.data_exponent])

    @classmethod
    def of(cls, logarithms: Floats) -> "Law":
        """The inverse of `logarithms`."""
        log_a, log_b, log_e, alpha, beta = (float(value) for value in logarithms)
        return cls(float(np.exp(log_e)), float(np.exp(log_a)), float(np.exp(log_b)), alpha, beta)


HOFFMANN = Law(1.69, 406.4, 410.7, 0.34, 0.28)
"""As published by Hoffmann et al., section 3.3."""
BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)
"""Fitted to points read off that paper's figure 4 by Besiroglu et al. 2024 (arXiv:2404.10102), table 1."""


@dataclass(frozen=True)
class Fit:
    """A fitted law and how far it may be off."""

    law: Law
    """The best fit."""
    objective: float
    """Sum over runs of the Huber loss of log loss."""
    resampled: tuple[Law, ...]
    """Fits to runs drawn with replacement, as many as there are."""

    def interval(self, quantity: Callable[[Law], float], confidence: float) -> tuple[float, float]:
        """Quantiles of what `quantity` is in the resampled fits, `confidence` of which lie between."""
        values = [quantity(law) for law in self.resampled]
        low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)


def objective(law: Law, runs: Runs) -> float:
    """Sum over runs of Huber(log predicted loss - log loss)."""
    return float(_objective(law.logarithms, *_logarithms(runs))[0])


def fit(runs: Runs, *, bootstrap: int = 0, seed: int = 0, starts: int = 20) -> Fit:
    """The law that fits `runs` best.

    L-BFGS from the `starts` points of Hoffmann's grid of 4,500 that fit best as they are; from all of them it comes to
    the same, for the objective has few valleys. Resampled fits start at the best fit.

    Raises:
        InputError: too few runs, or all of one size, so that five coefficients do not follow from them.
    """
    _check(runs)
    columns = _logarithms(runs)
    heights = np.array([_objective(start, *columns)[0] for start in _STARTS])
    found = [_descend(_STARTS[number], columns) for number in np.argsort(heights, kind="stable")[:starts]]
    height, best = min(found, key=lambda pair: pair[0])
    generator = np.random.default_rng(seed)
    resampled: list[Law] = []
    while len(resampled) < bootstrap:
        chosen = generator.integers(len(runs), size=len(runs))
        again = runs.take(chosen)
        if len(set(again.parameters)) > 1 and len(set(again.tokens)) > 1:
            resampled.append(Law.of(_descend(best, _logarithms(again))[1]))
    return Fit(Law.of(best), height, tuple(resampled))


def _check(runs: Runs) -> None:
    if len(runs) <= _NUM_COEFFICIENTS:
        raise InputError(f"{len(runs)} runs cannot tell five coefficients; there have to be at least 6, better 20.")
    for what in ("parameters", "tokens"):
        values = getattr(runs, what)
        if values.max() / values.min() < 1.5:
            raise InputError(
                f"All runs have about the same number of {what} ({values.min():,.0f} to {values.max():,.0f}), so its "
                "effect cannot be told; add runs of other sizes."
            )


def _logarithms(runs: Runs) -> tuple[Floats, Floats, Floats]:
    return np.log(runs.parameters), np.log(runs.tokens), np.log(runs.loss)


def _objective(x: Floats, log_n: Floats, log_d: Floats, log_loss: Floats) -> tuple[float, Floats]:
    """The Huber sum and its gradient; log L is the log-sum-exp of its three terms' logarithms."""
    terms = np.stack([x[0] - x[3] * log_n, x[1] - x[4] * log_d, np.full_like(log_n, x[2])])
    top = terms.max(axis=0)
    parts = np.exp(terms - top)
    total = parts.sum(axis=0)
    residual = top + np.log(total) - log_loss
    size = np.abs(residual)
    height = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA)).sum()
    pull = np.clip(residual, -DELTA, DELTA) * parts / total
    by_term = pull.sum(axis=1)
    return float(height), np.array([*by_term, -(pull[0] * log_n).sum(), -(pull[1] * log_d).sum()])


def _descend(start: Floats, columns: tuple[Floats, Floats, Floats]) -> tuple[float, Floats]:
    """L-BFGS from `start`: the objective reached, and where."""
    # Heights are about 1e-3; scaled up, so that the stopping rules, which are absolute, do not stop at once.
    scale = 1e6

    def scaled(x: Floats) -> tuple[float, Floats]:
        height, slope = _objective(x, *columns)
        return scale * height, scale * slope

    result = minimize(
        scaled, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-14, "maxcor": 30}
    )
    return float(result.fun) / scale, np.asarray(result.x)
