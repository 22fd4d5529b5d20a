"""What is minimised, token by token or answer by answer.

Shapes: any, the same for all arguments of a function; for `policy_loss`, tokens, or answers whose log-probabilities
are those of all their tokens together.
"""

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def divergence(logprobs: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """An estimate of KL(policy || reference) from a token that the policy drew (Schulman 2020, "Approximating KL
    divergence", joschu.net/blog/kl-approx.html).

    Args:
        estimator: k1 is unbiased and may be negative, k2 has a smaller variance and a bias, k3 is unbiased and never
            negative.
    """
    log_ratio = logprobs - reference
    match estimator:
        case "k1":
            return log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return torch.expm1(-log_ratio) + log_ratio


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """The clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, equation 7), to be minimised.

    Args:
        logprobs: by the policy that is trained.
        old: by the one that drew.
        low, high: how far the ratio of the two may fall below 1, or rise above.
    """
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def is_clipped(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Where `policy_loss` has no gradient any more."""
    ratio = (logprobs - old).exp()
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of the values, not to be lowered by moving them further than `clip` from those at the
    time of drawing (as in OpenAI's baselines and InstructGPT)."""
    clipped = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def adapted_weight(weight: float, divergence: float, target: float, answers: int, horizon: int) -> float:
    """The weight of the divergence after a rollout (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    Args:
        divergence: from the reference, in nats for an answer.
        target: what it should be.
        answers: that were drawn.
        horizon: answers in which a divergence 20 % too high raises the weight by a fifth or so.
    """
    error = min(max(divergence / target - 1, -0.2), 0.2)
    return weight * (1 + error * answers / horizon)
