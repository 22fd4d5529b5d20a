"""Tensor parallelism: every matrix split by columns, then by rows, so that each layer talks twice.

With sequence parallelism, what lies between the products (norms, residual stream) is split by position.
"""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from puna.model.transformer import Transformer
from puna.parallel.config import ParallelConfig


def shard_tensors(model: Transformer, config: ParallelConfig, mesh: DeviceMesh) -> None:
    """Split every parameter of `model` over the processes of `mesh`, and add the exchanges that this needs.

    What goes in and out of the model, of its layers and of `attend` stays plain tensors: all positions and this
    process's heads inside attention; this process's positions between the layers (all of them without
    sequence parallelism).
    """
    split = config.sequence_parallel
    between = Shard(1) if split else Replicate()
    norm = SequenceParallel(use_local_output=True) if split else _Replicated()
    vocabulary = Shard(-1) if config.loss_parallel else Replicate()
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "norm": norm,
        "output": ColwiseParallel(
            input_layouts=between, output_layouts=vocabulary, use_local_output=not config.loss_parallel
        ),
    }
    layer_plan: dict[str, ParallelStyle] = {
        "attention_norm": norm,
        "attention": PrepareModuleInput(
            input_layouts=(between, None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        "attention.query": ColwiseParallel(),
        "attention.key": ColwiseParallel(),
        "attention.value": ColwiseParallel(),
        "attention.output": RowwiseParallel(output_layouts=between),
        "feed_forward_norm": norm,
        "feed_forward": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        "feed_forward.gate": ColwiseParallel(),
        "feed_forward.up": ColwiseParallel(),
        "feed_forward.down": RowwiseParallel(output_layouts=between),
    }
    if model.config.qk_norm:
        heads = SequenceParallel(sequence_dim=2, use_local_output=True)
        layer_plan |= {"attention.query_norm": heads, "attention.key_norm": heads}
    # src_data_rank=None: every process has the same whole parameters, and keeps its part of them.
    tied = model.config.tie_embeddings
    for layer in model.layers:
        if next(layer.parameters(), None) is not None:
            parallelize_module(layer, mesh, layer_plan, src_data_rank=None)
    own = {name: style for name, style in plan.items() if any(True for _ in getattr(model, name).parameters())}
    parallelize_module(model, mesh, own, src_data_rank=None)
    if tied:
        model.output.weight = model.embedding.weight


class _Replicated(ParallelStyle):
    """The whole module on every process, with parameters that say so: torch clips no mixture of kinds."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def spread(module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[Tensor, ...]:
            return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)

        def local(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.to_local()

        return distribute_module(module, device_mesh, None, spread, local)  # type: ignore[arg-type]
