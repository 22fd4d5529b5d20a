"""What a benchmark's accuracy will be, in two steps (Llama 3, arXiv:2407.21783, section 3.2.1).

Compute predicts the negative log-likelihood of the right answer, a straight line over log compute; the likelihood
predicts accuracy, a sigmoid. The second step may use models that the first does not, such as older ones that were
trained with more compute.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from puna.pretrain.scaling.runs import Floats, read_rows
from puna.runtime.errors import InputError


@dataclass(frozen=True, eq=False)
class Scores:
    """Models measured on a benchmark; NaN where a value is not known."""

    compute: Floats
    """Training FLOPs."""
    nll: Floats
    """Negative log-likelihood of the right answer, normalised as the user likes (per character, for example)."""
    accuracy: Floats
    """0 to 1."""


@dataclass(frozen=True)
class TwoSteps:
    """Compute -> negative log-likelihood -> accuracy."""

    intercept: float
    """Negative log-likelihood at 1 FLOP, extrapolated."""
    slope: float
    """Its change for ten times the compute."""
    floor: float
    """Accuracy by chance."""
    ceiling: float
    """Accuracy at best."""
    middle: float
    """Negative log-likelihood half-way between."""
    steepness: float
    """How fast accuracy falls with it there."""

    def nll(self, compute: Floats | float) -> Floats:
        """Predicted negative log-likelihood of the right answer."""
        return np.asarray(self.intercept + self.slope * np.log10(compute))

    def accuracy_at(self, nll: Floats | float) -> Floats:
        """Predicted accuracy at a negative log-likelihood."""
        exponent = np.clip(self.steepness * (np.asarray(nll) - self.middle), -500, 500)
        return np.asarray(self.floor + (self.ceiling - self.floor) / (1 + np.exp(exponent)))

    def accuracy(self, compute: Floats | float) -> Floats:
        """Predicted accuracy of a model of least loss trained with `compute` FLOPs."""
        return self.accuracy_at(self.nll(compute))


def read_scores(path: Path) -> Scores:
    """Columns compute, nll and accuracy of a .csv, .json or .jsonl file; compute or accuracy may be empty.

    Raises:
        InputError: a column is absent, or a value is not a number in its range.
    """
    rows = read_rows(path)
    if missing := {"compute", "nll", "accuracy"} - set(rows[0]):
        raise InputError(
            f"{path} has no column {', '.join(sorted(missing))}; it needs compute, nll and accuracy, where compute or "
            "accuracy may be empty in some rows."
        )

    def column(name: str, low: float, high: float) -> Floats:
        values = []
        for number, row in enumerate(rows, start=1):
            text = row.get(name)
            try:
                value = float("nan") if text in ("", None) and name != "nll" else float(text)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                value = float("inf")
            if not (np.isnan(value) or low <= value <= high):
                raise InputError(
                    f"{path}, row {number}: {name} is {text!r}; it has to be between {low:g} and {high:g}."
                )
            values.append(value)
        return np.array(values)

    return Scores(column("compute", 1, 1e40), column("nll", 0, 1e6), column("accuracy", 0, 1))


def fit_two_steps(scores: Scores, floor: float) -> TwoSteps:
    """Fit both steps by least squares; `floor` is the accuracy of guessing.

    Raises:
        InputError: too few models for either step.
    """
    first = ~np.isnan(scores.compute)
    second = ~np.isnan(scores.accuracy)
    if first.sum() < 3 or second.sum() < 4:
        raise InputError(
            f"{first.sum()} models have compute and {second.sum()} have accuracy; the first step needs at least 3, the "
            "second 4."
        )
    slope, intercept = np.polyfit(np.log10(scores.compute[first]), scores.nll[first], 1)
    nll, accuracy = scores.nll[second], scores.accuracy[second]
    spread = max(float(np.ptp(nll)), 1e-9)

    def residuals(x: Floats) -> Floats:
        return TwoSteps(intercept, slope, floor, x[0], x[1], np.exp(x[2])).accuracy_at(nll) - accuracy

    start = [min(1.0, float(accuracy.max()) + 0.05), float(np.median(nll)), np.log(4 / spread)]
    bounds = ([floor, nll.min() - spread, np.log(0.1 / spread)], [1.0 + 1e-9, nll.max() + spread, np.log(1e3 / spread)])
    x = least_squares(residuals, np.clip(start, *bounds), bounds=bounds).x
    return TwoSteps(float(intercept), float(slope), floor, float(x[0]), float(x[1]), float(np.exp(x[2])))
