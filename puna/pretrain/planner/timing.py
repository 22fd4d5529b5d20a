"""Seconds of a training step, by cause.

Products and attention are floating-point operations over a share of the peak; norms, rotations and the like are bytes
over a share of the memory's bandwidth; collectives are bytes over a share of the links'. What hides behind what is
said where it is added up.

Letters: D model dimension, Q query dimension, G key/value dimension, F feed-forward dimension, V vocabulary.
"""

from dataclasses import dataclass

from puna.model.accounting import training_flops_per_token
from puna.model.config import LlamaConfig
from puna.pretrain.planner.cluster import Cluster, Efficiency
from puna.pretrain.planner.layout import Layout
from puna.pretrain.planner.memory import Numerics, Sizes, Stage, stages

_ELEMENT = 2
"""Bytes of an activation."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest pipeline rank, by cause."""

    matmul: float
    """Matrix products, those of checkpointing included."""
    attention: float
    """Fused attention."""
    elementwise: float
    """Norms, rotations, SwiGLU, additions, the softmax of the loss."""
    tensor: float
    """Collectives of tensor parallelism, as far as visible."""
    context: float
    """Collectives of context parallelism."""
    data: float
    """Collectives of parameters and gradients, as far as computing does not hide them."""
    bubble: float
    """Waiting in the pipeline, filling and draining."""
    optimizer: float
    """The update."""

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, by kind of parallelism."""

    tensor: float
    """Activations between tensor-parallel ranks."""
    context: float
    """Keys and values between context-parallel ranks."""
    pipeline: float
    """Activations between pipeline ranks."""
    data: float
    """Parameters and gradients."""


@dataclass(frozen=True)
class _Pass:
    """Seconds of one micro-batch through one stage, forward and backward, and the bytes it sends."""

    matmul: float
    attention: float
    elementwise: float
    tensor: float
    context: float
    tensor_bytes: float
    context_bytes: float

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.elementwise + self.tensor + self.context


def model_flops_per_token(model: LlamaConfig, row_length: int) -> float:
    """The FLOPs that utilisation counts, in the convention of published figures: attention over whole rows.

    Chowdhery et al. 2022 (arXiv:2204.02311), appendix B, as Llama 3 and torchtitan count; a causal kernel computes
    half of attention's share.
    """
    return training_flops_per_token(model, mean_context=row_length)


def step_time(
    model: LlamaConfig,
    cluster: Cluster,
    layout: Layout,
    numerics: Numerics,
    efficiency: Efficiency,
    batch_rows: int,
    row_length: int,
) -> tuple[StepTime, Traffic]:
    """Seconds of a step by cause, and what the ranks of the slowest stage send."""
    micro_batches = batch_rows // layout.data // layout.micro_batch_rows
    candidates = [
        (_pass(model, cluster, layout, numerics, efficiency, stage, row_length), stage)
        for stage in stages(model, layout)
    ]
    one, stage = max(candidates, key=lambda pair: pair[0].total)
    data, optimizer, data_bytes = _data(model, cluster, layout, numerics, efficiency, stage, one, micro_batches)
    boundary = _ELEMENT * layout.micro_batch_rows * row_length / layout.context * model.dim / layout.tensor
    pipeline_bytes = 0.0
    bubble = 0.0
    if layout.pipeline > 1:
        stride = layout.tensor * layout.context * layout.data
        hop = boundary / cluster.bandwidth(layout.pipeline, stride, efficiency)
        bubble = (layout.pipeline - 1) * (one.total / layout.pipeline_chunks + 2 * hop)
        pipeline_bytes = 2 * micro_batches * layout.pipeline_chunks * boundary
    seconds = StepTime(
        matmul=micro_batches * one.matmul,
        attention=micro_batches * one.attention,
        elementwise=micro_batches * one.elementwise,
        tensor=micro_batches * one.tensor,
        context=micro_batches * one.context,
        data=data,
        bubble=bubble,
        optimizer=optimizer,
    )
    traffic = Traffic(micro_batches * one.tensor_bytes, micro_batches * one.context_bytes, pipeline_bytes, data_bytes)
    return seconds, traffic


def _pass(
    model: LlamaConfig,
    cluster: Cluster,
    layout: Layout,
    numerics: Numerics,
    efficiency: Efficiency,
    stage: Stage,
    row_length: int,
) -> _Pass:
    gpu, sizes = cluster.figures, Sizes.of(model)
    q, g = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    tokens = layout.micro_batch_rows * row_length / layout.context
    tensor = layout.tensor

    # Forward once and backward twice; checkpointing adds the forward pass again, or half of its products.
    again = {"none": 0.0, "selective": 0.0, "alternate": 0.5, "full": 1.0}[layout.checkpointing]
    rate = gpu.bf16_flops * efficiency.matmul
    layer_rate = gpu.float8_flops * efficiency.matmul_float8 if numerics.precision == "float8" else rate
    layer_flops = 2 * (sizes.attention + sizes.feed_forward) * tokens / tensor
    matmul = stage.layers * (3 + again) * layer_flops / layer_rate
    if stage.last:
        matmul += 3 * 2 * sizes.embedding * tokens / tensor / rate

    # Fused attention computes its scores again in the backward pass: 2.5 times the forward pass, not twice.
    attention_flops = 4 * q * (row_length / 2) * tokens / tensor
    full = layout.checkpointing == "full"
    attention = stage.layers * (3.5 + full) * attention_flops / (gpu.bf16_flops * efficiency.attention)

    # Bytes moved per token: norms and additions are split by sequence parallelism, the rest by heads and columns.
    if numerics.compile:
        by_sequence, by_column = 2 * 4 * model.dim + 2 * 6 * model.dim, 4 * (q + g) + 6 * model.hidden_dim
    else:
        by_sequence, by_column = 2 * 34 * model.dim + 2 * 6 * model.dim, 14 * (q + g) + 10 * model.hidden_dim
    if numerics.precision == "float8":
        # Each product's input is read for its maximum, then read and written in float8.
        by_column += 5 * (2 * model.dim * tensor + q + model.hidden_dim)
    passes = 3 + (layout.checkpointing != "none")
    moved = stage.layers * passes * (by_sequence + by_column) * tokens / tensor
    if stage.last:
        moved += (14 if numerics.chunked_loss else 30) * model.vocab_size * tokens / tensor
    elementwise = moved / (gpu.memory_bandwidth * efficiency.memory)

    tensor_bytes = context_bytes = 0.0
    if tensor > 1:
        # Gather before and reduce-scatter after attention and feed-forward; the same, swapped, in the backward pass.
        # Computed again: the gathers, and with whole layers the reductions too, whose results are kept otherwise.
        collectives = 8 + {"none": 0, "selective": 2, "alternate": 2, "full": 4}[layout.checkpointing]
        tensor_bytes = stage.layers * collectives * _ELEMENT * tokens * model.dim * (tensor - 1) / tensor
    if layout.context > 1:
        # Gather keys and values, again where checkpointing does not keep them, and reduce-scatter their gradients.
        whole = 2 * _ELEMENT * g / tensor * tokens * (layout.context - 1)
        context_bytes = stage.layers * (2 + (layout.checkpointing != "none")) * whole
    visible = efficiency.async_tensor if numerics.async_tensor else 1.0
    return _Pass(
        matmul=matmul,
        attention=attention,
        elementwise=elementwise,
        tensor=visible * tensor_bytes / cluster.bandwidth(tensor, 1, efficiency),
        context=context_bytes / cluster.bandwidth(layout.context, tensor, efficiency),
        tensor_bytes=tensor_bytes,
        context_bytes=context_bytes,
    )


def _data(
    model: LlamaConfig,
    cluster: Cluster,
    layout: Layout,
    numerics: Numerics,
    efficiency: Efficiency,
    stage: Stage,
    one: _Pass,
    micro_batches: int,
) -> tuple[float, float, float]:
    """Visible seconds of parameters' and gradients' collectives, seconds of the update, and bytes sent."""
    sizes = Sizes.of(model)
    ends = (sizes.embedding if stage.first else 0) + (sizes.output if stage.last else 0)
    whole = stage.layers * sizes.layer(layout.tensor) + ends / layout.tensor
    shards, copies = layout.state_shards, layout.state_copies
    gpu = cluster.figures
    # Read parameter, gradient and state; write parameter and state.
    optimizer = whole / shards * (12 + 2 * numerics.optimizer_bytes) / (gpu.memory_bandwidth * efficiency.memory)

    gather = _ELEMENT * whole * (shards - 1) / shards
    reduce = 4 * whole * (shards - 1) / shards
    gathers = (2 if layout.reshard else 1) * (micro_batches if layout.reshard else 1)
    shard_rate = cluster.bandwidth(shards, layout.tensor, efficiency)
    replica_bytes = 2 * 4 * whole / shards * (copies - 1) / copies
    replica_rate = cluster.bandwidth(copies, layout.tensor * shards, efficiency)
    # Collectives hide behind the computing of the micro-batches that they belong to: all of them where parameters are
    # gathered again each time, else the first forward and the last backward pass.
    seconds = (gathers * gather + reduce) / shard_rate + replica_bytes / replica_rate
    if not cluster.within_node(shards, layout.tensor):
        # One collective for each layer and each gathering or reduction, as many hops as there are ranks in the ring.
        seconds += stage.layers * (gathers + 1) * (shards - 1) * cluster.latency_seconds
    behind = one.total * (micro_batches if layout.reshard else 1)
    visible = max(0.0, seconds - efficiency.overlap * behind)
    return visible, optimizer, gathers * gather + reduce + replica_bytes
