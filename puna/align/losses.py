"""Losses on preferences, as functions of the log-probabilities of whole answers.

Shapes: N answers, P pairs.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model makes of answers."""

    policy_N: Tensor
    """Log-probability by the model that is trained, with gradient."""
    reference_N: Tensor
    """Log-probability by the reference model; zeros for losses without one."""
    lengths_N: Tensor
    """Tokens that were summed over."""

    def at(self, chosen: Tensor) -> "Answers":
        """Some of them, by number."""
        return Answers(self.policy_N[chosen], self.reference_N[chosen], self.lengths_N[chosen])

    @property
    def log_ratio_N(self) -> Tensor:
        """How much more probable than by the reference."""
        return self.policy_N - self.reference_N

    @property
    def mean_N(self) -> Tensor:
        """Mean log-probability of a token."""
        return self.policy_N / self.lengths_N


class PreferenceLoss(ABC):
    """The settings of a loss; each is a frozen dataclass with a `kind`.

    Attributes:
        needs_reference: whether there has to be a reference model.
        judged: whether answers are judged one by one, or compared.
    """

    needs_reference: ClassVar[bool] = True
    judged: ClassVar[bool] = False

    kind: str


class PairLoss(PreferenceLoss):
    """A loss of a better and a worse answer to the same prompt."""

    @abstractmethod
    def __call__(self, better: Answers, worse: Answers) -> Tensor:
        """The loss of each pair, [P]."""

    def rewards(self, answers: Answers) -> Tensor:
        """What the model implicitly gives for each answer, [N], in the units of the loss."""
        return answers.log_ratio_N


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; it has to be above 0.")


@dataclass(frozen=True)
class DPO(PairLoss):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, equation 7)."""

    kind: Literal["dpo"] = "dpo"
    """The loss."""
    beta: float = 0.1
    """How much staying near the reference counts."""
    label_smoothing: float = 0.0
    """Share of the preferences that are taken to be wrong (conservative DPO, Mitchell 2023)."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it has to be at least 0 and below 0.5.")

    def __call__(self, better: Answers, worse: Answers) -> Tensor:
        margin_P = self.rewards(better) - self.rewards(worse)
        smooth = self.label_smoothing
        return -(1 - smooth) * F.logsigmoid(margin_P) - smooth * F.logsigmoid(-margin_P)

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * answers.log_ratio_N


@dataclass(frozen=True)
class IPO(PairLoss):
    """Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, equation 17), which cannot be driven to
    infinity by preferences that are always the same; by mean log-probabilities, as its authors compute it."""

    kind: Literal["ipo"] = "ipo"
    """The loss."""
    beta: float = 0.1
    """The paper's tau: how much staying near the reference counts."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)

    def __call__(self, better: Answers, worse: Answers) -> Tensor:
        margin_P = self.rewards(better) - self.rewards(worse)
        return (margin_P - 1 / (2 * self.beta)).square()

    def rewards(self, answers: Answers) -> Tensor:
        return answers.log_ratio_N / answers.lengths_N


@dataclass(frozen=True)
class Hinge(PairLoss):
    """The hinge loss of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) on DPO's rewards (Liu et al. 2023,
    arXiv:2309.06657)."""

    kind: Literal["hinge"] = "hinge"
    """The loss."""
    beta: float = 0.1
    """The inverse of the margin that is asked for."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)

    def __call__(self, better: Answers, worse: Answers) -> Tensor:
        return (1 - self.rewards(better) + self.rewards(worse)).relu()

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * answers.log_ratio_N


@dataclass(frozen=True)
class SimPO(PairLoss):
    """Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, equation 6): no reference, lengths made
    equal."""

    needs_reference: ClassVar[bool] = False

    kind: Literal["simpo"] = "simpo"
    """The loss."""
    beta: float = 2.0
    """Factor of the mean log-probabilities."""
    gamma: float = 1.0
    """Margin that the better answer should have."""

    def __post_init__(self) -> None:
        _positive("beta", self.beta)

    def __call__(self, better: Answers, worse: Answers) -> Tensor:
        return -F.logsigmoid(self.rewards(better) - self.rewards(worse) - self.gamma)

    def rewards(self, answers: Answers) -> Tensor:
        return self.beta * answers.mean_N


@dataclass(frozen=True)
class ORPO(PairLoss):
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691, equation 6): no reference; the better
    answer's negative log-likelihood is the greater part of the loss."""

    needs_reference: ClassVar[bool] = False

    kind: Literal["orpo"] = "orpo"
    """The loss."""
    weight: float = 0.1
    """Factor of the odds ratio's part: the paper's lambda."""

    def __post_init__(self) -> None:
        _positive("weight", self.weight)

    def __call__(self, better: Answers, worse: Answers) -> Tensor:
        return -better.mean_N - self.weight * F.logsigmoid(self.rewards(better) - self.rewards(worse))

    def rewards(self, answers: Answers) -> Tensor:
        """Log odds of a mean token."""
        return answers.mean_N - torch.log1p(-answers.mean_N.exp())


@dataclass(frozen=True)
class KTO(PreferenceLoss):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, equation 8), from answers that are
    judged good or bad one by one."""

    judged: ClassVar[bool] = True

    kind: Literal["kto"] = "kto"
    """The loss."""
    beta: float = 0.1
    """How much staying near the reference counts."""
    good_weight: float = 1.0
    """Factor of good answers' losses; make both sums about equal where there are more of one kind."""
    bad_weight: float = 1.0
    """Factor of bad answers' losses."""

    def __post_init__(self) -> None:
        for name in ("beta", "good_weight", "bad_weight"):
            _positive(name, getattr(self, name))

    def __call__(self, answers: Answers, good_N: Tensor, divergence: Tensor) -> Tensor:
        """The loss of each answer, [N].

        Args:
            good_N: whether it was judged good.
            divergence: of the model from the reference, on answers that do not belong to their prompts; no gradient.
        """
        over_N = self.beta * (answers.log_ratio_N - divergence)
        return torch.where(
            good_N, self.good_weight * (1 - over_N.sigmoid()), self.bad_weight * (1 - (-over_N).sigmoid())
        )


LOSSES = {
    "dpo": "puna.align.losses:DPO",
    "ipo": "puna.align.losses:IPO",
    "hinge": "puna.align.losses:Hinge",
    "simpo": "puna.align.losses:SimPO",
    "orpo": "puna.align.losses:ORPO",
    "kto": "puna.align.losses:KTO",
}
"""Kind of a loss -> its class."""
