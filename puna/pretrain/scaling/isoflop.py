"""IsoFLOP profiles: of several models trained with the same compute, which is best? (Hoffmann et al. 2022, approach 2)

At each budget a parabola is fitted to the loss over log parameters; its lowest point is the best model. Powers of
compute are fitted to those (arXiv:2203.15556, section 3.2; Llama 3, arXiv:2407.21783, section 3.2.1).
"""

from dataclasses import dataclass

import numpy as np

from puna.pretrain.scaling.runs import Floats, Runs
from puna.runtime.errors import InputError


@dataclass(frozen=True)
class Profile:
    """The runs of one budget and the parabola through them."""

    compute: float
    """Training FLOPs."""
    parameters: float
    """Of the best model."""
    loss: float
    """Of the best model, in nats per token."""
    num_runs: int
    """Runs of this budget."""
    coefficients: tuple[float, float, float]
    """Loss as a polynomial in log parameters, highest power first."""


@dataclass(frozen=True)
class PowerLaw:
    """scale * compute ^ exponent."""

    scale: float
    """In the unit of what it predicts."""
    exponent: float
    """Of compute."""

    def __call__(self, compute: float) -> float:
        """The prediction at `compute` FLOPs."""
        return float(self.scale * compute**self.exponent)


@dataclass(frozen=True)
class IsoFlop:
    """Profiles and what follows from them."""

    profiles: tuple[Profile, ...]
    """By compute."""
    left_out: tuple[float, ...]
    """Budgets with fewer than three runs, or whose parabola has no lowest point among the runs' sizes."""
    parameters: PowerLaw
    """Best parameters by compute; the best tokens are compute / (6 * parameters)."""


def profiles(runs: Runs) -> tuple[tuple[Profile, ...], tuple[float, ...]]:
    """A parabola for each budget (equal compute to a hundredth), and the budgets that have none."""
    found, left_out = [], []
    budgets = np.round(np.log(runs.compute), 2)
    for budget in np.unique(budgets):
        group = runs.take(np.flatnonzero(budgets == budget))
        compute = float(np.exp(np.log(group.compute).mean()))
        log_n = np.log(group.parameters)
        if len(np.unique(log_n)) < 3:
            left_out.append(compute)
            continue
        curve = np.polyfit(log_n, group.loss, 2)
        lowest = -curve[1] / (2 * curve[0])
        if curve[0] <= 0 or not log_n.min() <= lowest <= log_n.max():
            left_out.append(compute)
            continue
        a, b, c = (float(value) for value in curve)
        found.append(Profile(compute, float(np.exp(lowest)), float(np.polyval(curve, lowest)), len(group), (a, b, c)))
    return tuple(found), tuple(left_out)


def has_profiles(runs: Runs) -> bool:
    """Whether most of the runs were made for IsoFLOP profiles, and not by chance of about equal compute."""
    found, _ = profiles(runs)
    return len(found) > 1 and 2 * sum(profile.num_runs for profile in found) > len(runs)


def fit_isoflop(runs: Runs) -> IsoFlop:
    """Profiles, and best parameters as a power of compute.

    Raises:
        InputError: fewer than two budgets have a best model.
    """
    found, left_out = profiles(runs)
    if len(found) < 2:
        raise InputError(
            f"Only {len(found)} of {len(found) + len(left_out)} budgets have a best model among their runs. IsoFLOP "
            "profiles need at least two budgets, each with three or more sizes on both sides of the best."
        )
    return IsoFlop(found, left_out, _power(found))


def resample(runs: Runs, count: int, seed: int) -> tuple[PowerLaw, ...]:
    """`count` power laws fitted to runs drawn with replacement within each budget."""
    generator = np.random.default_rng(seed)
    budgets = np.round(np.log(runs.compute), 2)
    groups = [np.flatnonzero(budgets == budget) for budget in np.unique(budgets)]
    laws: list[PowerLaw] = []
    for _ in range(20 * count):
        chosen = np.concatenate([generator.choice(group, size=len(group)) for group in groups])
        found, _ = profiles(runs.take(chosen))
        if len(found) >= 2:
            laws.append(_power(found))
        if len(laws) == count:
            break
    return tuple(laws)


def _power(found: tuple[Profile, ...]) -> PowerLaw:
    log_c: Floats = np.log([profile.compute for profile in found])
    log_n: Floats = np.log([profile.parameters for profile in found])
    exponent, offset = np.polyfit(log_c, log_n, 1)
    return PowerLaw(float(np.exp(offset)), float(exponent))
