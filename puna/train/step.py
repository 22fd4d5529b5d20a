"""One optimiser step, the same for every method."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from puna.batches.packing import TokenBatch
from puna.runtime.errors import InputError
from puna.train.config import TrainConfig
from puna.train.loss import Loss
from puna.train.schedule import learning_rate_ratio
from puna.train.state import TrainState


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured."""

    loss: float
    """Mean over the step's units, before the update."""
    grad_norm: float
    """Global norm of the mean loss's gradient, before it is cut down."""
    learning_rate: float
    """The learning rate of this update."""
    num_units: int
    """What the loss counted: tokens with a label, for language models."""


def train_step(state: TrainState, batches: Sequence[TokenBatch], loss: Loss, config: TrainConfig) -> StepResult:
    """Add up the gradients of the micro-batches, divide once by the number of units, clip, update.

    Raises:
        InputError: the loss or its gradient is not finite; nothing has been updated then.
    """
    total, count = 0.0, 0
    for batch in batches:
        part = loss(state.model, batch)
        part.total.backward()  # type: ignore[no-untyped-call]
        total += part.total.item()
        count += part.count
    if not count:
        raise InputError(f"No token of the batch of step {state.step + 1} is a training target.")

    groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    torch._foreach_mul_(gradients, 1 / count)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm).item()
    if not math.isfinite(total) or not math.isfinite(grad_norm):
        state.model.zero_grad()
        raise InputError(
            f"In step {state.step + 1} the loss is {total / count} and its gradient's norm {grad_norm}: training has "
            f"diverged. The weights of step {state.step} are untouched and the last checkpoint is good; try a lower "
            "optimizer.learning_rate or a longer schedule.warmup_steps."
        )

    learning_rate = config.optimizer.learning_rate * learning_rate_ratio(state.step, config.steps, config.schedule)
    for group in groups:
        group["lr"] = learning_rate
    for optimizer in state.optimizers:
        optimizer.step()
    state.model.zero_grad()
    state.step += 1
    return StepResult(total / count, grad_norm, learning_rate, count)
