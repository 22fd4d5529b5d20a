"""What is measured of a reward model: whether it agrees with people, knows how sure it is, and likes long answers.

Shapes: N answers, P pairs.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puna.align.reward_loss import compared, levels, rewards
from puna.align.watch import HeldOutWatch
from puna.batches.preference_rows import PreferenceBatch
from puna.batches.preferences import STRENGTHS
from puna.evaluate.statistics.intervals import wilson
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.files import write_text
from puna.runtime.page import new_figure, to_svg
from puna.runtime.progress import say

RELIABILITY_FILE = "reliability.svg"


@dataclass(frozen=True, slots=True)
class Compared:
    """What a reward model makes of held-out preferences."""

    margin_P: Tensor
    """By how much it gives the answer more that people found better."""
    level_P: Tensor
    """How much better they found it, as an index into STRENGTHS."""
    longer_P: Tensor
    """How many tokens longer the better answer is."""
    rewards_N: Tensor
    """All rewards."""
    lengths_N: Tensor
    """All lengths, in tokens."""

    @classmethod
    def of(cls, rewards_N: Tensor, batch: PreferenceBatch) -> "Compared":
        """From the rewards of a batch's answers."""
        judged = compared(batch)
        better_P, worse_P, _ = judged.pairs()
        lengths_N = judged.answers.lengths_N
        return cls(
            rewards_N[better_P] - rewards_N[worse_P],
            levels(batch)[better_P],
            lengths_N[better_P] - lengths_N[worse_P],
            rewards_N,
            lengths_N,
        )

    @classmethod
    def joined(cls, parts: list["Compared"]) -> "Compared":
        """Several batches as one, on the CPU."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]).cpu() for name in cls.__slots__))


class RewardWatch(HeldOutWatch):
    """How often a reward model agrees with people, and whether it likes long answers."""

    compared: Compared
    """What it made of the held-out preferences when last asked."""

    def _measure(self, model: Transformer) -> tuple[dict[str, float], list[str]]:
        parts = [Compared.of(rewards(model, batch), batch) for batch in self._batches(model)]
        self.compared = found = Compared.joined(parts)
        right_P = (found.margin_P > 0).float()
        rewards_and_lengths = torch.stack((found.rewards_N, found.lengths_N))
        values = {
            "accuracy": float(right_P.mean()),
            "margin": float(found.margin_P.mean()),
            "reward_deviation": float(found.rewards_N.std()),
            "length_correlation": float(rewards_and_lengths.corrcoef()[0, 1].nan_to_num()),
            "calibration_error": calibration_error(found.margin_P.sigmoid()),
        }
        groups = [
            ("accuracy, better answer longer", found.longer_P > 0),
            ("accuracy, better answer shorter", found.longer_P < 0),
        ]
        if found.level_P.any():  # somebody said how much better
            groups += [(f"accuracy, {name}", found.level_P == level) for level, name in enumerate(STRENGTHS)]
        lines = [f"{name:36} {right_P[of].mean():.4f} of {int(of.sum()):,}" for name, of in groups if of.any()]
        return values, lines

    def draw(self, folder: Path) -> None:
        """Write reliability.svg: how often the reward model is right by how sure it is, and its rewards by length."""
        try:
            figure = new_figure(9, 4)
        except InputError as error:
            say(f"There is no {RELIABILITY_FILE}. {error}")
            return
        found = self.compared
        sure, by_length = figure.subplots(1, 2)
        bins = reliability(found.margin_P.sigmoid())
        sure.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--", label="as often as it says")
        shares = [each.share_right for each in bins]
        low = [each.share_right - each.low for each in bins]
        high = [each.high - each.share_right for each in bins]
        sure.errorbar([each.confidence for each in bins], shares, (low, high), marker="o", capsize=3, label="measured")
        for each in bins:
            sure.annotate(f"{each.count:,}", (each.confidence, 0.02), ha="center", fontsize="small")
        sure.set(xlabel="probability of the answer it likes better", ylabel="share in which people do too")
        sure.set(xlim=(0.48, 1.02), ylim=(0, 1.05))
        sure.legend(loc="lower right", bbox_to_anchor=(1, 0.08))
        by_length.scatter(found.lengths_N, found.rewards_N, s=8, alpha=0.4)
        by_length.set(xlabel="answer's length, tokens", ylabel="reward")
        figure.tight_layout()
        write_text(folder / RELIABILITY_FILE, to_svg(figure))


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of which a reward model is about equally sure."""

    confidence: float
    """Mean probability that it gives the likelier order."""
    share_right: float
    """Share of the pairs in which people say the same."""
    low: float
    """Lower end of its 95 % interval (Wilson)."""
    high: float
    """Upper end."""
    count: int
    """Pairs."""


def reliability(probability_P: Tensor, bins: int = 10) -> list[Bin]:
    """Pairs by how sure a reward model is, from 0.5 to 1; bins without a pair are left out.

    Args:
        probability_P: that it gives the order which people found.
    """
    confidence_P = torch.maximum(probability_P, 1 - probability_P)
    right_P = probability_P > 0.5
    bin_P = ((confidence_P - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    found = []
    for number in bin_P.unique().tolist():  # type: ignore[no-untyped-call]
        own_P = bin_P == number
        right, count = int(right_P[own_P].sum()), int(own_P.sum())
        found.append(Bin(float(confidence_P[own_P].mean()), right / count, *wilson(right, count), count))
    return found


def calibration_error(probability_P: Tensor, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3): how far the probability of the
    likelier order is from the share in which it is right."""
    gaps = [abs(each.share_right - each.confidence) * each.count for each in reliability(probability_P, bins)]
    return sum(gaps) / len(probability_P)
