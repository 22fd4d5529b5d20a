"""Bytes on a rank, by kind.

Per token and layer, what our `Transformer` keeps for the backward pass is written out here line by line; the tests
compare it, byte for byte, with what autograd saves when the real model runs on meta tensors.

Letters: D model dimension, Q query dimension (heads * head dimension), G key/value dimension, F feed-forward dimension,
V vocabulary, H heads.
"""

from dataclasses import dataclass, replace
from typing import Literal

from puna.model.config import LlamaConfig
from puna.pretrain.planner.layout import Layout

Precision = Literal["bf16", "float8"]
_ELEMENT = 2
"""Bytes of an activation."""


@dataclass(frozen=True)
class Numerics:
    """What the training step computes with; the same for every layout of a plan."""

    precision: Precision = "bf16"
    """Of the products within layers; `float8` still keeps bfloat16 activations. The output projection is bfloat16."""
    compile: bool = True
    """Layers compiled: element-wise operations are fused, and less is kept for the backward pass."""
    chunked_loss: bool = True
    """The loss never holds all logits (`puna.train.cross_entropy`); with tensor parallelism it does, in parts."""
    async_tensor: bool = False
    """Tensor parallelism's collectives are pipelined with the products beside them."""
    optimizer_bytes: int = 8
    """Bytes of optimiser state for a parameter: 8 is AdamW in float32, 4 in bfloat16, 2 in 8 bits."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of one layer and of the two ends of the model."""

    attention: int
    """Of the four attention projections, biases included."""
    feed_forward: int
    """Of the three feed-forward projections."""
    norms: int
    """Of a layer's norms, which tensor parallelism does not split."""
    embedding: int
    """V * D."""
    output: int
    """V * D, or 0 where the output projection is the embedding."""
    final_norm: int
    """D."""

    @classmethod
    def of(cls, model: LlamaConfig) -> "Sizes":
        """The sizes of `model`; they add up to `puna.model.accounting.count_parameters`."""
        query, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        vocabulary = model.vocab_size * model.dim
        return cls(
            attention=model.dim * (2 * query + 2 * kv) + (query + 2 * kv if model.qkv_bias else 0),
            feed_forward=3 * model.dim * model.hidden_dim,
            norms=2 * model.dim + (2 * model.head_dim if model.qk_norm else 0),
            embedding=vocabulary,
            output=0 if model.tie_embeddings else vocabulary,
            final_norm=model.dim,
        )

    def layer(self, tensor: int) -> float:
        """Parameters of a layer on one tensor-parallel rank."""
        return (self.attention + self.feed_forward) / tensor + self.norms


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank, by kind."""

    parameters: float
    """The rank's shard, float32."""
    gradients: float
    """Of that shard, float32."""
    optimizer: float
    """State of that shard."""
    activations: float
    """Kept for the backward pass, of all micro-batches in flight, with the layer that is being computed again."""
    logits: float
    """Around the loss, on the last pipeline rank."""
    gathered: float
    """Parameters gathered for computing, and gradients not yet reduced."""

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds."""

    rank: int
    """Its number."""
    layers: int
    """How many."""
    first: bool
    """Has the embedding."""
    last: bool
    """Has the final norm, the output projection and the loss."""


def stages(model: LlamaConfig, layout: Layout) -> tuple[Stage, ...]:
    """The pipeline ranks that can be the fullest or the slowest: the first, a middle one, the last.

    Layers are spread evenly; where that does not come out, the first and last rank, which also hold the embedding and
    the output, have fewer (Llama 3, arXiv:2407.21783, section 3.3.2).
    """
    if layout.pipeline == 1:
        return (Stage(0, model.num_layers, True, True),)
    most = -(-model.num_layers // layout.pipeline)
    missing = most * layout.pipeline - model.num_layers
    first = Stage(0, most - (missing > 1), True, False)
    last = Stage(layout.pipeline - 1, most - (missing > 0), False, True)
    middle = Stage(1, most, False, False)
    return (first, last) if layout.pipeline == 2 else (first, middle, last)


def saved_bytes_per_token(model: LlamaConfig, layout: Layout, numerics: Numerics) -> float:
    """Bytes that one layer keeps for the backward pass, per token of the rank's part of a row."""
    d, f = model.dim, model.hidden_dim
    q, g = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    tensor = layout.tensor
    input_bytes = _ELEMENT * d / tensor
    if layout.checkpointing == "full":
        return input_bytes
    fused_attention = (_ELEMENT * q + 4 * model.num_heads) / tensor
    joined = _is_joined(layout)
    if layout.checkpointing == "selective":
        return input_bytes + fused_attention + _ELEMENT * (q + 2 * g + 2 * f + 2 * d) / tensor
    if layout.checkpointing == "alternate":
        # Products in order: query, key, value, output, gate, up, down; joined: query-key-value, output, gate-up, down.
        products = (q + 2 * g + 2 * f) if joined else (q + g + f + d)
        return input_bytes + fused_attention + _ELEMENT * products / tensor
    if numerics.compile:
        # Fused norms keep their input; gate and up are kept, and their product is made again.
        kept = q + 2 * g * layout.context + 2 * f + 2 * d
        return 2 * input_bytes + fused_attention + _ELEMENT * kept / tensor
    # A norm keeps its input and its inverse root mean square in float32, and the normalised input; then comes its
    # output, which all tensor-parallel ranks need whole.
    norm = (4 * d + 4 + _ELEMENT * d) / tensor + _ELEMENT * d
    head_norms = 0.0
    if model.qk_norm:
        head_norms = ((4 + _ELEMENT) * (q + g) + 4 * (model.num_heads + model.num_kv_heads)) / tensor
    value = (q + 2 * g) if joined else g  # a view of the joined product keeps all of it alive
    keys_and_values = g + value if layout.context == 1 else 2 * g * layout.context
    swiglu = 4 * f  # gate, silu(gate), up, and their product
    return 2 * norm + head_norms + fused_attention + _ELEMENT * (q + keys_and_values + swiglu) / tensor


def weight_copies(model: LlamaConfig, layout: Layout, numerics: Numerics) -> float:
    """Bytes of weights that a layer copies for a forward pass and keeps for the backward pass.

    A rank that holds whole float32 weights casts them to bfloat16 at each use; gathered shards are bfloat16 already.
    """
    if layout.checkpointing != "none" or numerics.compile or layout.state_shards > 1:
        return 0.0
    sizes = Sizes.of(model)
    biases = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim if model.qkv_bias else 0
    return _ELEMENT * ((sizes.attention + sizes.feed_forward - biases) / layout.tensor + sizes.norms)


def _is_joined(layout: Layout) -> bool:
    """Whether projections of the same input are one product: only where nothing is sharded (`transformer.project`)."""
    return layout.tensor * layout.state_shards == 1


def chunks_in_flight(layout: Layout, micro_batches: int, rank: int) -> int:
    """Pieces of the model, of `pipeline_chunks` on this pipeline rank, whose activations are held at once.

    1F1B holds one micro-batch for each rank from this one on; interleaved 1F1B warms up longer (Narayanan et al. 2021,
    arXiv:2104.04473, section 2.2).
    """
    p, v = layout.pipeline, layout.pipeline_chunks
    warm_up = p - rank - 1 if v == 1 else 2 * (p - rank - 1) + (v - 1) * p
    return min(warm_up + 1, micro_batches * v)


def rank_memory(model: LlamaConfig, layout: Layout, numerics: Numerics, batch_rows: int, row_length: int) -> Memory:
    """Memory of the fullest rank."""
    micro_batches = batch_rows // layout.data // layout.micro_batch_rows
    tokens = layout.micro_batch_rows * row_length / layout.context
    held = [_stage_memory(model, layout, numerics, stage, micro_batches, tokens) for stage in stages(model, layout)]
    return max(held, key=lambda memory: memory.total)


def _stage_memory(
    model: LlamaConfig,
    layout: Layout,
    numerics: Numerics,
    stage: Stage,
    micro_batches: int,
    tokens: float,
) -> Memory:
    sizes = Sizes.of(model)
    layer = sizes.layer(layout.tensor)
    end = (sizes.embedding + sizes.output) if stage.first and stage.last else 0
    if not (stage.first and stage.last):
        end = sizes.embedding if stage.first else (sizes.output or sizes.embedding) if stage.last else 0
    ends = end / layout.tensor + (sizes.final_norm if stage.last else 0)
    whole = stage.layers * layer + ends
    shards = layout.state_shards
    own = whole / shards

    saved = saved_bytes_per_token(model, layout, numerics) * tokens
    copies = weight_copies(model, layout, numerics)
    in_flight = chunks_in_flight(layout, micro_batches, stage.rank) / layout.pipeline_chunks
    kept = stage.layers * (saved * in_flight + copies)
    final = logits = 0.0
    if stage.last:
        # The final norm's own, and its output, of one micro-batch.
        final = (4 * model.dim + 4 + 2 * _ELEMENT * model.dim) * tokens / layout.tensor
        # The output projection in bfloat16, and
        logits = _ELEMENT * model.vocab_size * model.dim / layout.tensor
        if layout.tensor > 1:  # whole hidden states, and torch's parallel loss on a share of all logits
            logits += _ELEMENT * tokens * model.dim + 16 * tokens * model.vocab_size / layout.tensor
        elif numerics.chunked_loss:  # gradients of the hidden states and of the output projection
            logits += _ELEMENT * tokens * model.dim + 4 * model.vocab_size * model.dim
        else:  # in float32: log-probabilities, their gradient, and that of the logits
            logits += 12 * tokens * model.vocab_size
    again = 0.0
    if layout.checkpointing != "none":
        # What was kept is used again.
        again = saved_bytes_per_token(model, replace(layout, checkpointing="none"), numerics) * tokens - saved

    # Gradients of the widest activations: of gate, up, and their product.
    again += 3 * _ELEMENT * tokens * model.hidden_dim / layout.tensor
    if layout.tensor > 1:  # and that of a half layer's input, whole until it is added up
        again += _ELEMENT * tokens * model.dim

    # What is gathered while the loss is computed: both ends in float32 and the layer fetched ahead in bfloat16. In the
    # backward pass there are the layer in use and the gradients of the ends too. A layer's gradients wait in float32 to
    # be reduced while the layer before is at work, in the place of its activations if those were more.
    at_loss = 4 * ends + _ELEMENT * layer
    in_backward = 2 * (4 * ends + _ELEMENT * layer) + max(0.0, 4 * layer - saved)
    if not layout.reshard:
        unreduced = 4 * whole if micro_batches > 1 else 4 * layer
        at_loss = in_backward = _ELEMENT * (whole + ends) + unreduced
    if shards == 1:
        at_loss = in_backward = 0.0
    gradients = 4 * own
    if stage.first and layout.data * layout.context == 1:
        # DTensor gives an embedding that is split by vocabulary its whole gradient. FSDP2 cuts it at once.
        gradients += 4 * sizes.embedding * (1 - 1 / layout.tensor)
    state = Memory(4 * own, gradients, numerics.optimizer_bytes * own, kept, 0.0, 0.0)
    loss_phase = replace(state, activations=kept + final, logits=logits, gathered=at_loss)
    backward_phase = replace(state, activations=kept + again, gathered=in_backward)
    return max(loss_phase, backward_phase, key=lambda memory: memory.total)
