"""One optimiser step, the same for every method."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from puna.batches.packing import TokenBatch
from puna.parallel.mesh import Mesh
from puna.runtime.seeds import derive_seed
from puna.train.anomaly import SpikeLimits, judge
from puna.train.config import TrainConfig
from puna.train.loss import Loss
from puna.train.schedule import learning_rate_ratio
from puna.train.state import TrainState


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured. It stays on the device until someone asks, and waits for the device then."""

    measured: Tensor
    """Loss, norm of the gradient, units and verdict, float64 [4]; see the properties."""
    learning_rate: float
    """The learning rate of this update, for parameters with no factor of their own."""

    @property
    def loss(self) -> float:
        """Mean over the step's units, before the update."""
        return self.measured[0].item()

    @property
    def grad_norm(self) -> float:
        """Global norm of the mean loss's gradient, before it is cut down."""
        return self.measured[1].item()

    @property
    def num_units(self) -> int:
        """What the loss counted: tokens with a label, for language models."""
        return int(self.measured[2].item())

    @property
    def verdict(self) -> int:
        """An index into `puna.train.anomaly.VERDICTS`; the update was left out unless it is 0."""
        return int(self.measured[3].item())


def train_step(state: TrainState, batches: Sequence[TokenBatch], loss: Loss, config: TrainConfig) -> StepResult:
    """Add up the gradients of the micro-batches, divide once by the number of units, clip, update.

    Where the step is bad (`puna.train.anomaly`), parameters and optimiser state stay as they are; that is decided on
    the device.

    Args:
        state: changed in place; its `step` rises in any case.
        batches: this process's micro-batches; as many of the same shape on every process.
        loss: what to minimise.
        config: the run.
    """
    # What is drawn at random while computing (dropout) follows from the step and the rows, not from what came before.
    torch.manual_seed(derive_seed(config.seed, "step", state.step, state.layout.own_rows(0, config.batch_rows).start))
    total, units = sum_of_losses(state, batches, loss)
    groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"] if p.grad is not None]
    torch._foreach_mul_([p.grad for p in parameters], 1 / units)
    grad_norm = _clip(parameters, config.optimizer.max_grad_norm, state.layout.mesh)
    limits = SpikeLimits(config.faults.spike_deviations, config.faults.spike_settle_steps)
    verdict, state.statistics = judge(state.statistics.to(total.device), units, total / units, grad_norm, limits)

    learning_rate = config.optimizer.learning_rate * learning_rate_ratio(state.step, config.steps, config.schedule)
    for group in groups:
        group["lr"] = learning_rate * group["rate"]
    for optimizer in state.optimizers:
        _update(optimizer, leave_out=verdict > 0)
    if state.after_update is not None and not verdict.item():
        state.after_update(state.step)
    state.model.zero_grad()
    state.step += 1
    return StepResult(torch.stack([total / units, grad_norm.double(), units, verdict]), learning_rate)


def sum_of_losses(state: TrainState, batches: Sequence[TokenBatch], loss: Loss) -> tuple[Tensor, Tensor]:
    """The loss summed over the micro-batches of all processes, and its number of units; both float64 scalars.

    Where gradients are enabled, they are added to the parameters'.
    """
    own = own_sum_of_losses(state, batches, loss)
    both = state.layout.mesh.sum(own if state.layout.counts else own.zero_())
    return both[0], both[1]


def own_sum_of_losses(state: TrainState, batches: Sequence[TokenBatch], loss: Loss) -> Tensor:
    """The part of `sum_of_losses` that this process computes, float64 [2]."""
    layout, backward = state.layout, torch.is_grad_enabled()
    total, count = torch.zeros((), dtype=torch.float64, device=batches[0].ids_BT.device), 0
    with layout.around_passes():
        if layout.pipeline is not None:
            part_total, count = layout.pipeline.run(batches, loss, backward=backward)
            total += 0 if part_total is None else part_total
        else:
            for number, batch in enumerate(batches, start=1):
                layout.before_backward(state.model, last=number == len(batches))
                part = loss(state.model, batch)
                if backward:
                    part.total.backward()  # type: ignore[no-untyped-call]
                total += part.total.detach()
                count += part.count
    return torch.stack([total, total.new_tensor(count)])


def _update(optimizer: Optimizer, leave_out: Tensor) -> None:
    """Step, or do nothing at all where the flag is set.

    Fused optimisers look at it on the device, as they do for `torch.amp.GradScaler`; for others the host has to.
    """
    if not hasattr(optimizer, "_step_supports_amp_scaling"):
        if not leave_out.item():
            optimizer.step()
        return
    optimizer.grad_scale, optimizer.found_inf = None, leave_out.float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def _clip(parameters: list[Tensor], max_norm: float, mesh: Mesh) -> Tensor:
    """Scale the gradients of all processes down to one global norm; return what it was."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if mesh.size("pipeline") > 1:
        norm = norm.square()
        dist.all_reduce(norm, group=mesh.axis("pipeline").get_group())
        norm = norm.sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
