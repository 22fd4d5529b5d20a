"""How far raters agree who saw the same two answers."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from puna.evaluate.rating.records import Rating
from puna.evaluate.statistics.intervals import Estimate, estimate
from puna.runtime.errors import InputError


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of comparisons that several raters have rated."""

    num_comparisons: int
    """Rated by at least two."""
    num_raters: int
    """Who have rated at least one of these."""
    raw: Estimate
    """Share of pairs of raters who say the same: the one is better, the other, a tie, or both bad. One value for each
    comparison, the mean over its pairs."""
    by_chance: float
    """The same share if everybody had said what they said about answers drawn at random."""
    alpha: float
    """Krippendorff's alpha of these four verdicts: 1 is perfect, 0 is chance. Not a number where all are alike."""
    alpha_of_strength: float
    """Krippendorff's alpha for ordered values, of how much better which one is; without those that are both bad."""

    def as_results(self) -> dict[str, float]:
        """For a manifest; what is not a number is left out."""
        found = {
            "agreement_num_comparisons": self.num_comparisons,
            "agreement_raw": self.raw.mean,
            "agreement_alpha": self.alpha,
            "agreement_alpha_of_strength": self.alpha_of_strength,
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def __str__(self) -> str:
        return (
            f"{self.num_raters} raters agree in {self.raw.mean:.0%} of the {self.num_comparisons:,} comparisons that "
            f"several have rated ({self.by_chance:.0%} by chance; Krippendorff's alpha {self.alpha:.2f}, with "
            f"strengths {self.alpha_of_strength:.2f})."
        )


def agreement(ratings: Sequence[Rating]) -> Agreement | None:
    """How far raters agree; None where no comparison has been rated twice.

    Sides do not matter: a verdict counts for the answer, wherever it stood. Source of alpha: K. Krippendorff 2011,
    "Computing Krippendorff's Alpha-Reliability".

    Raises:
        InputError: the package krippendorff is absent.
    """
    by_item: dict[str, list[Rating]] = defaultdict(list)
    for rating in ratings:
        by_item[rating.item].append(rating)
    several = [own for own in by_item.values() if len(own) > 1]
    if not several:
        return None
    signed = [[_signed(rating, own[0]) for rating in own] for own in several]
    kinds = [[value if value is None else int(np.sign(value)) for value in own] for own in signed]
    raw = [float(np.mean([one == other for one, other in combinations(own, 2)])) for own in kinds]
    alpha, expected = _alpha([[2 if kind is None else kind for kind in own] for own in kinds], "nominal")
    ordered = [[value for value in own if value is not None] for own in signed]
    alpha_of_strength, _ = _alpha([own for own in ordered if len(own) > 1], "ordinal")
    raters = {rating.rater for own in several for rating in own}
    return Agreement(len(several), len(raters), estimate(raw), expected, alpha, alpha_of_strength)


def _signed(rating: Rating, first: Rating) -> int | None:
    """The verdict with the answers on the sides where the first rater saw them; None if both are bad."""
    if rating.verdict == "both_bad":
        return None
    same = (rating.left, rating.left_answer) == (first.left, first.left_answer)
    return rating.verdict if same else -rating.verdict


def _alpha(values: Sequence[Sequence[int]], level: Literal["nominal", "ordinal"]) -> tuple[float, float]:
    """Krippendorff's alpha of the values given to each comparison, and the agreement by chance that it is measured
    from."""
    try:
        import krippendorff
    except ImportError as error:
        raise InputError("Agreement between raters needs krippendorff: pip install 'puna[serve]'.") from error
    domain = sorted({value for own in values for value in own})
    counts = np.array([[list(own).count(value) for value in domain] for own in values])
    if len(domain) < 2:
        return float("nan"), 1.0
    total_V = counts.sum(0)
    by_chance = float((total_V * (total_V - 1)).sum() / (total_V.sum() * (total_V.sum() - 1)))
    alpha = krippendorff.alpha(value_counts=counts, value_domain=domain, level_of_measurement=level)
    return float(alpha), by_chance
