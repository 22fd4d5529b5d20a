"""Steps that must not count: a loss or gradient that is not finite, or far above what was usual.

The judgement is made on the device, from running statistics that live there, so that no step waits for the host; the
host reads it later. Every rank comes to the same one, because loss and gradient norm are those of the whole batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VERDICTS = (
    "good",
    "no token is a training target",
    "the loss is not finite",
    "the gradient is not finite",
    "the loss spikes",
    "the gradient spikes",
)
"""What the numbers mean that `judge` returns."""

_MEMORY = 0.98
"""What a running mean keeps at each step: it looks back over about 50 steps."""
_SMALLEST_LOSS_DEVIATION = 0.05
"""Deviations of the loss count as at least this share of its mean, and as this many nats: neither a very even loss nor
one near zero, where data is known by heart, is a reason for a false alarm."""
_SMALLEST_NORM_DEVIATION = 0.3
"""The same of the logarithm of the gradient's norm, absolute."""

_SMALLEST_NORM = 1e-300
"""In place of a norm of 0, which has no logarithm."""


@dataclass(frozen=True)
class SpikeLimits:
    """What counts as a spike."""

    deviations: float
    """This many standard deviations above the running mean; 0 means nothing does."""
    settle_steps: int
    """Not before the statistics hold this many steps."""


def fresh_statistics(device: torch.device | None = None) -> Tensor:
    """Of no step yet: their number, then mean and variance of the loss, and of the logarithm of the gradient's norm."""
    return torch.zeros(5, dtype=torch.float64, device=device)


@torch.no_grad()
def judge(
    statistics: Tensor, units: Tensor, loss: Tensor, grad_norm: Tensor, limits: SpikeLimits
) -> tuple[Tensor, Tensor]:
    """Judge one step without waiting for the device.

    Args:
        statistics: of the good steps so far, from `fresh_statistics`.
        units: how many the loss is the mean of, a scalar.
        loss: of the step, a scalar.
        grad_norm: of its gradient, a scalar.
        limits: what counts as a spike.

    Returns:
        The verdict, an index into `VERDICTS` as a float64 scalar, and the statistics with this step if it is good.
    """
    number, means, variances = statistics[0], statistics[1::2], statistics[2::2]
    measured = torch.stack([loss.double(), grad_norm.double()])
    values = torch.stack([measured[0], measured[1].clamp_min(_SMALLEST_NORM).log()])
    smallest_loss = _SMALLEST_LOSS_DEVIATION * means[0].abs().clamp_min(1)
    smallest = torch.stack([smallest_loss, means.new_tensor(_SMALLEST_NORM_DEVIATION)])
    limit = means + limits.deviations * torch.maximum(variances.sqrt(), smallest)
    spikes = (values > limit) & (number >= limits.settle_steps) & (limits.deviations > 0)
    wrong = torch.cat([(units == 0)[None], ~measured.isfinite(), spikes])
    verdict = torch.where(wrong.any(), 1.0 + wrong.double().argmax(), 0.0)

    weight = torch.maximum(1 / (number + 1), torch.full_like(number, 1 - _MEMORY))
    offsets = values - means
    new_means = means + weight * offsets
    new_variances = (1 - weight) * (variances + weight * offsets**2)
    updated = torch.cat([(number + 1)[None], torch.stack([new_means, new_variances], dim=1).flatten()])
    return verdict, torch.where(verdict == 0, updated, statistics)


def naive_judge(
    statistics: Sequence[float], units: float, loss: float, grad_norm: float, limits: SpikeLimits
) -> tuple[int, list[float]]:
    """The readable twin of `judge`, on the host."""
    number, loss_mean, loss_variance, norm_mean, norm_variance = statistics
    log_norm = math.log(max(grad_norm, _SMALLEST_NORM)) if math.isfinite(grad_norm) else math.nan
    settled = limits.deviations > 0 and number >= limits.settle_steps
    loss_deviation = max(math.sqrt(loss_variance), _SMALLEST_LOSS_DEVIATION * max(abs(loss_mean), 1))
    norm_deviation = max(math.sqrt(norm_variance), _SMALLEST_NORM_DEVIATION)
    if units == 0:
        return 1, list(statistics)
    if not math.isfinite(loss):
        return 2, list(statistics)
    if not math.isfinite(grad_norm):
        return 3, list(statistics)
    if settled and loss > loss_mean + limits.deviations * loss_deviation:
        return 4, list(statistics)
    if settled and log_norm > norm_mean + limits.deviations * norm_deviation:
        return 5, list(statistics)
    weight = max(1 / (number + 1), 1 - _MEMORY)
    updated = [number + 1]
    for value, mean, variance in ((loss, loss_mean, loss_variance), (log_norm, norm_mean, norm_variance)):
        offset = value - mean
        updated += [mean + weight * offset, (1 - weight) * (variance + weight * offset**2)]
    return 0, updated
