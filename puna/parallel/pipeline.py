"""Pipeline parallelism: consecutive layers on different processes, and micro-batches that flow through them.

The order of passes is torch.distributed.pipelining's. What is here cuts the model and lets any loss run on it: each
stage is the same `Transformer` with a stand-in for every part that it does not hold, so that names and mathematics are
the model's own; on each stage the loss makes its one call of the model, whose beginning is replaced by what came from
the stage before, and whose end by what goes to the one after.

Shapes: B rows of a micro-batch, T positions that a process holds, D model dimension; 1 is one.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import _PipelineSchedule

from puna.batches.packing import TokenBatch
from puna.model.transformer import Transformer
from puna.parallel.config import ParallelConfig, Schedule
from puna.runtime.errors import InputError

_CLASSES: dict[Schedule, type[_PipelineSchedule]] = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero-bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
V_SHAPED = ("zbv", "dualpipev")
"""Schedules whose stages go down through the processes and up again."""


class SummedLoss(Protocol):
    """What a loss returns, see `puna.train.loss.LossSum`."""

    @property
    def total(self) -> Tensor: ...

    @property
    def count(self) -> int: ...


AnyLoss = Callable[[Transformer, Any], SummedLoss]


class Absent(nn.Module):
    """In place of a layer or norm that another process holds: passes its input on."""

    def forward(self, x: Tensor, *context: object) -> Tensor:
        return x


def own_stages(config: ParallelConfig, rank: int) -> list[int]:
    """The stages that a process of the pipeline holds, first to last."""
    size = config.pipeline
    if config.schedule in V_SHAPED:
        return [rank, 2 * size - 1 - rank]
    per_rank = config.stages_per_rank if config.schedule in ("interleaved", "zero-bubble") else 1
    return [rank + size * n for n in range(per_rank)]


def num_stages(config: ParallelConfig) -> int:
    """Stages of all processes together."""
    return config.pipeline * len(own_stages(config, 0))


def layers_of_stage(num_layers: int, stage: int, stages: int) -> range:
    """Even shares; the first and last stage, which have the embedding and the output too, get the smaller ones."""
    sizes = [num_layers // stages] * stages
    inner_first = sorted(range(stages), key=lambda n: (n in (0, stages - 1), n))
    for n in inner_first[: num_layers % stages]:
        sizes[n] += 1
    start = sum(sizes[:stage])
    return range(start, start + sizes[stage])


class Stage(nn.Module):
    """Some layers of a model. The first stage takes token ids, the last gives the loss; between them go hidden states.

    Args:
        model: all that this process holds.
        index: which stage.
        stages: how many there are.
    """

    def __init__(self, model: Transformer, index: int, stages: int) -> None:
        super().__init__()
        with torch.device("meta"):
            part = Transformer(model.config)
        part.compute_dtype = model.compute_dtype
        own = layers_of_stage(len(model.layers), index, stages)
        part.layers = nn.ModuleList(layer if n in own else Absent() for n, layer in enumerate(model.layers))
        self.is_last = index == stages - 1
        part.embedding = Absent() if index else model.embedding  # type: ignore[assignment]
        part.norm = model.norm if self.is_last else Absent()  # type: ignore[assignment]
        part.output = model.output if self.is_last else Absent()  # type: ignore[assignment]
        part.register_forward_pre_hook(self._take_incoming, with_kwargs=True)
        if not self.is_last:
            part.register_forward_hook(self._keep_outgoing)
        self.model = part
        self.loss: AnyLoss | None = None
        self.batch_type: type[TokenBatch] = TokenBatch
        self._states: list[Tensor] = []

    def forward(self, incoming: Tensor, **columns: Tensor) -> Tensor:
        """Hidden states of a micro-batch, or at the last stage the sum of its losses."""
        assert self.loss is not None
        self._states = [incoming]
        part = self.loss(self.model, self.batch_type(**columns))
        return torch.stack([part.total]) if self.is_last else self._states.pop()

    def _take_incoming(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(("ids_BT", "positions_BT", "attend", "head"), args, strict=False)) | kwargs
        if not self._states:
            raise InputError("This objective calls the model more than once for a batch: it needs pipeline = 1.")
        given["ids_BT"] = self._states.pop()
        if not self.is_last:
            given["head"] = lambda h_BTD, output: h_BTD
        return (), given

    def _keep_outgoing(self, module: nn.Module, args: object, h_BTD: Tensor) -> Tensor:
        self._states = [h_BTD]
        return h_BTD.new_zeros((), dtype=torch.float32)


def split_model(model: Transformer, config: ParallelConfig, mesh: DeviceMesh) -> list[Stage]:
    """Take the layers of other processes out of `model`, and make the stages of this one, which share its parts.

    Raises:
        InputError: fewer layers than stages, or tied embeddings.
    """
    stages = num_stages(config)
    if len(model.layers) < stages:
        raise InputError(
            f"The model has {len(model.layers)} layers, fewer than the {stages} stages of train.parallel.pipeline = "
            f"{config.pipeline} with schedule = {config.schedule!r}. Lower pipeline or stages_per_rank."
        )
    if model.config.tie_embeddings:
        raise InputError(
            "The model's embedding is its output projection too (tie_embeddings), but the two ends of a pipeline are "
            "on different processes. Use train.parallel.shard or tensor in place of pipeline."
        )
    mine = own_stages(config, mesh.get_local_rank())
    kept = {n for stage in mine for n in layers_of_stage(len(model.layers), stage, stages)}
    model.layers = nn.ModuleList(layer if n in kept else Absent() for n, layer in enumerate(model.layers))
    if 0 not in mine:
        model.embedding = Absent()  # type: ignore[assignment]
    if stages - 1 not in mine:
        model.norm, model.output = Absent(), Absent()  # type: ignore[assignment]
    return [Stage(model, stage, stages) for stage in mine]


class Pipeline:
    """Forward and backward passes of whole steps through the stages.

    Args:
        stages: of this process.
        config: with the schedule.
        mesh: the processes of this pipeline.
        device: what they compute on.
        micro_batches: in each step.
        rows: of each micro-batch.
        length: positions of a row that one process is given.
        boundary: positions of a row between the stages; fewer with sequence parallelism.
        dim: of the hidden states.
        dtype: of the hidden states.

    Raises:
        InputError: the schedule cannot run with so few micro-batches.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        config: ParallelConfig,
        mesh: DeviceMesh,
        *,
        device: torch.device,
        micro_batches: int,
        rows: int,
        length: int,
        boundary: int,
        dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.stages, total = list(stages), num_stages(config)
        indices = own_stages(config, mesh.get_local_rank())
        self._has_first, self._has_last = 0 in indices, total - 1 in indices
        hidden = torch.empty(rows, boundary, dim, dtype=dtype, device="meta").requires_grad_()
        ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
        loss = torch.empty(1, device="meta").requires_grad_()

        def build(name: Schedule) -> Any:
            parts = [
                PipelineStage(
                    stage,
                    index,
                    total,
                    device,
                    input_args=ids if index == 0 else hidden,
                    output_args=loss if index == total - 1 else hidden,
                    group=mesh.get_group(),
                )
                for stage, index in zip(self.stages, indices, strict=True)
            ]
            kind: Any = _CLASSES[name]
            one = issubclass(kind, schedules.PipelineScheduleSingle)
            return kind(parts[0] if one else parts, micro_batches, loss_fn=_sum, scale_grads=False)

        try:
            self._schedule = build(config.schedule)
        except ValueError as error:
            raise InputError(
                f"The pipeline schedule {config.schedule!r} with {total} stages cannot run {micro_batches} "
                f"micro-batches a step ({error}). Change train.batch_rows or train.micro_batch_rows, or take another "
                "train.parallel.schedule."
            ) from error
        # torch's V-shaped schedules fail where backward passes are left out.
        self._always_backward = config.schedule in V_SHAPED

    def run(self, batches: Sequence[TokenBatch], loss: AnyLoss, *, backward: bool) -> tuple[Tensor | None, int]:
        """Sum of the losses of a step's micro-batches, and the number of units; both only where the last stage is, None
        and 0 elsewhere."""
        kind = type(batches[0])
        for stage in self.stages:
            stage.loss, stage.batch_type = loss, kind
        columns = {field.name: torch.cat([getattr(part, field.name) for part in batches]) for field in fields(kind)}
        ids_BT = columns["ids_BT"]
        losses: list[Tensor] = []
        train = backward or self._always_backward
        act = partial(self._schedule.step, return_outputs=False) if train else self._schedule.eval
        with torch.set_grad_enabled(train):
            act(
                *([ids_BT] if self._has_first else []),
                target=ids_BT if self._has_last else None,
                losses=losses if self._has_last else None,
                **columns,
            )
        if train and not backward:
            for stage in self.stages:
                stage.zero_grad()
        if not self._has_last:
            return None, 0
        return torch.stack([part.detach() for part in losses]).double().sum(), sum(part.num_targets for part in batches)


def _sum(losses_1: Tensor, target: Tensor) -> Tensor:
    """The last stage gives the loss already, as one row, because torch joins rows."""
    return losses_1.sum()
