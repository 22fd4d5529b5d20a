"""What follows from ratings, of people or of a model that judges."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from puna.evaluate.rating.agreement import Agreement, agreement
from puna.evaluate.rating.records import Rating
from puna.evaluate.rating.strengths import Strength, strengths
from puna.evaluate.rating.winrates import WinRate, win_rates
from puna.runtime.errors import InputError


@dataclass(frozen=True, slots=True)
class Findings:
    """What follows from ratings."""

    ratings: tuple[Rating, ...]
    strengths: tuple[Strength, ...]
    win_rates: tuple[WinRate, ...]
    agreement: Agreement | None
    """None where no comparison was rated twice."""

    def numbers(self) -> dict[str, float]:
        """For a manifest: a flat table."""
        found: dict[str, float] = {"num_ratings": len(self.ratings)}
        found |= {f"bradley_terry_points_{each.model}": each.bradley_terry for each in self.strengths}
        for each in self.win_rates:
            name = f"{each.model}_over_{each.other}"
            found |= {f"win_rate_{name}": each.rate.mean, f"win_rate_at_equal_length_{name}": each.controlled}
        return found | (self.agreement.as_results() if self.agreement else {})

    def plain(self) -> dict[str, Any]:
        """Everything but the ratings as JSON, in which what is not a finite number is null."""
        plain: dict[str, Any] = {
            "strengths": [asdict(each) for each in self.strengths],
            "win_rates": [asdict(each) for each in self.win_rates],
            "agreement": self.agreement and asdict(self.agreement),
            "num_ratings": len(self.ratings),
        }
        found: dict[str, Any] = _finite(plain)
        return found


def find(ratings: Sequence[Rating], resamples: int = 1000, seed: int = 0) -> Findings:
    """Strengths, win rates and agreement.

    Args:
        ratings: of people, or of a model that judges.
        resamples: for intervals.
        seed: of the resampling.

    Raises:
        InputError: there is no rating, or both answers of one are the same model's.
    """
    if not ratings:
        raise InputError("Nothing has been rated, so there is nothing to say about the models.")
    for rating in ratings:
        if rating.left == rating.right:
            raise InputError(f"The rating of {rating.item} compares {rating.left} with itself.")
    return Findings(
        tuple(ratings),
        tuple(strengths(ratings, resamples, seed)),
        tuple(win_rates(ratings, resamples, seed)),
        agreement(ratings),
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
