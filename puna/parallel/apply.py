"""Where a model becomes a parallel one. The order matters, and is visible in `parallelize`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import loss_parallel

from puna.batches.packing import TokenBatch
from puna.model.transformer import Transformer
from puna.parallel.activations import checkpoint_activations
from puna.parallel.config import ParallelConfig
from puna.parallel.context import gather_context, own_positions
from puna.parallel.float8 import use_float8
from puna.parallel.mesh import Mesh
from puna.parallel.pipeline import Pipeline, Stage, split_model
from puna.parallel.tensor import shard_tensors
from puna.runtime.errors import InputError


def compile_layers(model: Transformer) -> None:
    """Compile each layer with torch.compile, once for all of them.

    Layers differ in their number alone. The compiler would take it for a constant, compile every layer anew, and give
    up at the ninth, which then runs as it is written.
    """
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for layer in model.layers:
        layer.compile()


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What one optimiser step works on, all processes together."""

    batch_rows: int
    """Rows of the step."""
    micro_batch_rows: int
    """At most so many in one pass of one process."""
    row_length: int
    """Tokens in a row."""


@dataclass(frozen=True)
class Layout:
    """How a model lies on the processes, and which part of a batch is this one's. By default there is one process."""

    mesh: Mesh = field(default_factory=Mesh)
    """The processes."""
    pipeline: Pipeline | None = None
    """Runs the passes, where there are stages."""
    loss_parallel: bool = False
    """Whether logits are shared by vocabulary."""

    def own_rows(self, first: int, count: int) -> range:
        """The rows of this process, of `count` from number `first` on; `count` divides by their number."""
        share = count // self.mesh.size("rows")
        start = first + share * self.mesh.rank("rows")
        return range(start, start + share)

    def own_positions(self, batch: TokenBatch) -> TokenBatch:
        """The positions of this process, of whole rows."""
        size = self.mesh.size("context")
        return batch if size == 1 else own_positions(batch, self.mesh.rank("context"), size)

    @property
    def counts(self) -> bool:
        """Whether what this process measures is its own; those of the axis `tensor` all measure the same."""
        return self.mesh.rank("tensor") == 0

    def around_passes(self) -> AbstractContextManager[None]:
        """Has to be around each forward pass and its backward pass."""
        return loss_parallel() if self.loss_parallel else nullcontext()

    def before_backward(self, model: nn.Module, *, last: bool) -> None:
        """Exchange gradients after the last micro-batch of a step only, as far as memory allows.

        What every process has whole can wait; a shard cannot, for the whole would have to be kept.
        """
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or self.mesh.size("shard") > 1)
            model.set_requires_all_reduce(last)


def parallelize(
    model: Transformer,
    config: ParallelConfig,
    mesh: Mesh,
    shape: StepShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    float8: bool,
    compile: bool,
) -> Layout:
    """Lay `model` out on the processes of `mesh`, in place, and move it to `device`.

    Args:
        model: whole, and the same on every process.
        config: who shares what.
        mesh: the processes.
        shape: of a step.
        device: this process's.
        dtype: of the activations; weights that are gathered for a layer come in it.
        float8: multiply in float8 inside the layers.
        compile: each layer with torch.compile.

    Raises:
        InputError: something does not divide; says what, and by how many.
    """
    check(model, config, mesh, shape)
    if float8 and mesh.size("tensor") > 1:
        raise InputError("train.precision 'fp8' does not go together with train.parallel.tensor: use shard, or 'bf16'.")
    if config.activation_checkpointing == "budget" and not compile:
        raise InputError(
            "train.parallel.activation_checkpointing 'budget' is the compiler's: set train.compile = true."
        )
    stages: list[Stage] = []
    if mesh.size("pipeline") > 1:
        stages = split_model(model, config, mesh.axis("pipeline"))
    if mesh.size("tensor") > 1:
        shard_tensors(model, config, mesh.axis("tensor"))
    if float8:
        use_float8(model, device)
    checkpoint_activations(model, config)
    if compile:
        compile_layers(model)
    if mesh.size("context") > 1:
        for part in [stage.model for stage in stages] or [model]:
            gather_context(part, mesh.axis("context"))
    if mesh.size("replicate") * mesh.size("shard") > 1:
        shard_data(stages or [model], mesh, dtype)
    model.to(device)
    pipeline = None
    if stages:
        rows = shape.batch_rows // mesh.size("rows")
        micro_rows = min(rows, shape.micro_batch_rows)
        length = shape.row_length // mesh.size("context")
        pipeline = Pipeline(
            stages,
            config,
            mesh.axis("pipeline"),
            device=device,
            micro_batches=rows // micro_rows,
            rows=micro_rows,
            length=length,
            boundary=length // (mesh.size("tensor") if config.sequence_parallel else 1),
            dim=model.config.dim,
            dtype=dtype,
        )
    return Layout(mesh, pipeline, mesh.size("tensor") > 1 and config.loss_parallel)


def shard_data(roots: Sequence[nn.Module], mesh: Mesh, dtype: torch.dtype) -> None:
    """Share parameters, gradients and optimiser state over the axis `shard`, copies of them over `replicate` (FSDP2,
    Zhao et al. 2023, arXiv:2304.11277).

    Gradients are sums over processes, not means: the one division is in `puna.train.step`.
    """
    copies, sharded = mesh.size("replicate") > 1, mesh.size("shard") > 1
    assert mesh.parameters is not None
    axes = mesh.parameters["replicate", "shard"] if copies else mesh.parameters["shard"]
    # What is not shared need not be gathered again; the passes of a pipeline would gather it once each.
    reshard = sharded and mesh.size("pipeline") == 1
    layers = MixedPrecisionPolicy(
        param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    rest = MixedPrecisionPolicy(cast_forward_inputs=False)
    for root in roots:
        model = root.model if isinstance(root, Stage) else root
        for layer in model.layers:  # type: ignore[union-attr]
            if next(layer.parameters(), None) is not None:
                fully_shard(layer, mesh=axes, reshard_after_forward=reshard, mp_policy=layers)
        fully_shard(root, mesh=axes, reshard_after_forward=reshard, mp_policy=rest)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def check(model: Transformer, config: ParallelConfig, mesh: Mesh, shape: StepShape) -> None:
    """Refuse a layout that does not fit the model or the batch.

    Raises:
        InputError: says which number, and what to do.
    """
    rows, context, tensor = mesh.size("rows"), mesh.size("context"), mesh.size("tensor")

    def divides(what: str, number: int, by: int, why: str) -> None:
        if number % by:
            raise InputError(
                f"{what} is {number:,}, which {by} does not divide ({why}). Change it, or the layout in train.parallel."
            )

    divides("train.batch_rows", shape.batch_rows, rows, "data x shard processes take equal parts of the rows")
    if mesh.size("pipeline") > 1:
        own = shape.batch_rows // rows
        micro_rows = min(own, shape.micro_batch_rows)
        divides("The number of rows for each pipeline", own, micro_rows, "train.micro_batch_rows, all of one size")
    if context > 1:
        divides("train.row_length", shape.row_length, 2 * context, "a context process takes two chunks of a row")
    if tensor > 1:
        divides("num_heads", model.config.num_heads, tensor, "tensor processes take equal parts of the heads")
        divides("num_kv_heads", model.config.num_kv_heads, tensor, "tensor processes take equal parts of the heads")
        divides("hidden_dim", model.config.hidden_dim, tensor, "tensor processes take equal parts of the feed-forward")
        if config.sequence_parallel:
            what = "train.row_length" if context == 1 else f"train.row_length / {context}"
            divides(what, shape.row_length // context, tensor, "sequence_parallel shares positions")
    if mesh.size("pipeline") * context * tensor > 1:
        strange = [name for name, _ in model.named_children() if name not in ("embedding", "layers", "norm", "output")]
        if strange:
            raise InputError(
                f"The run adds {', '.join(strange)} to the model, which works with the layouts data and shard only. "
                "Set train.parallel.pipeline, context and tensor to 1."
            )
