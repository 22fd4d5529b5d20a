"""How much better than expected each token of an answer was: pure functions of rewards and values.

Shapes: N answers, P prompts, S answers to each, L tokens of the longest answer. `mask_NL` is true where an answer has a
token; tokens stand on the left.
"""

import torch
from torch import Tensor


def shaped_rewards(rewards_N: Tensor, divergence_NL: Tensor, mask_NL: Tensor, weight: float) -> Tensor:
    """The reward of each token, [N, L]: minus the weighted divergence from the reference, and at the last token the
    answer's own (InstructGPT, arXiv:2203.02155, equation 2; Llama 2, arXiv:2307.09288, section 3.2.3).

    Args:
        divergence_NL: an estimate for each token, such as log policy - log reference.
    """
    shaped_NL = -weight * divergence_NL * mask_NL
    last_N1 = mask_NL.sum(1, keepdim=True) - 1
    return shaped_NL.scatter_add(1, last_N1, rewards_N[:, None])


def generalized_advantages(
    rewards_NL: Tensor, values_NL: Tensor, mask_NL: Tensor, discount: float, trace: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, equation 16).

    Args:
        values_NL: what was expected before each token.
        discount: the paper's gamma.
        trace: the paper's lambda.

    Returns:
        The advantage of each token, and the return that its value should have been; both [N, L], 0 outside the mask.
    """
    values_NL = values_NL * mask_NL
    ahead_N = torch.zeros_like(values_NL[:, 0])
    next_value_N = torch.zeros_like(ahead_N)
    columns = []
    for place in reversed(range(values_NL.shape[1])):
        surprise_N = rewards_NL[:, place] + discount * next_value_N - values_NL[:, place]
        ahead_N = (surprise_N + discount * trace * ahead_N) * mask_NL[:, place]
        next_value_N = values_NL[:, place]
        columns.append(ahead_N)
    advantages_NL = torch.stack(columns[::-1], dim=1)
    return advantages_NL, advantages_NL + values_NL


def whiten(values_NL: Tensor, mask_NL: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the mask; 0 outside."""
    chosen = values_NL[mask_NL]
    if len(chosen) < 2:
        return torch.zeros_like(values_NL)
    return (values_NL - chosen.mean()) * torch.rsqrt(chosen.var() + 1e-8) * mask_NL


def group_relative(rewards_PS: Tensor, *, scale: bool) -> Tensor:
    """A reward above the mean of all answers to its prompt, [P, S] (DeepSeekMath, arXiv:2402.03300, section 4.1.2).

    Args:
        scale: divide by the group's standard deviation. That gives prompts which are nearly always or nearly never
            answered well a greater weight; Dr. GRPO (Liu et al. 2025, arXiv:2503.20783, section 3.1) leaves it out.
    """
    centred_PS = rewards_PS - rewards_PS.mean(1, keepdim=True)
    return centred_PS / (rewards_PS.std(1, keepdim=True) + 1e-4) if scale else centred_PS


def leave_one_out(rewards_PS: Tensor) -> Tensor:
    """A reward above the mean of the other answers to its prompt, [P, S] (Ahmadian et al. 2024, arXiv:2402.14740,
    equation 8)."""
    others_PS = (rewards_PS.sum(1, keepdim=True) - rewards_PS) / (rewards_PS.shape[1] - 1)
    return rewards_PS - others_PS


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """The share of the returns' variance that the values foresaw: 1 at best, below 0 where a constant does better."""
    variance = returns.var(correction=0)
    return float("nan") if variance == 0 else float(1 - (returns - values).var(correction=0) / variance)
