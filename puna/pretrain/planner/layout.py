"""How a model and a batch are spread over ranks, as integers; and which ways are worth looking at."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from puna.model.config import LlamaConfig
from puna.parallel.config import ParallelConfig
from puna.pretrain.planner.cluster import Cluster

Checkpointing = Literal["none", "selective", "alternate", "full"]
"""What the backward pass finds: everything; the results of attention and of all matrix products, as
`puna.parallel.activations` keeps them; of attention and of every second product, as torchtitan does; nothing but each
layer's input. The rest is computed again."""


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism and the size of a micro-batch.

    Ranks are numbered with tensor parallelism innermost, then context, then shard and replicate, then pipeline: the
    chattiest dimension has the fastest links (Llama 3, arXiv:2407.21783, section 3.3.2, has pipeline before data).
    """

    tensor: int = 1
    """Ranks that split each matrix (and, between the matrices, the sequence)."""
    context: int = 1
    """Ranks that split the sequence in attention."""
    shard: int = 1
    """Ranks that split parameters, gradients and optimiser state and train on rows of their own (FSDP)."""
    replicate: int = 1
    """Copies of all that, training on rows of their own."""
    pipeline: int = 1
    """Ranks that each hold some of the layers."""
    pipeline_chunks: int = 1
    """Pieces of the model on each pipeline rank; 1 is 1F1B, more is interleaved 1F1B."""
    micro_batch_rows: int = 1
    """Rows in one forward pass."""
    checkpointing: Checkpointing = "none"
    """What is computed again in the backward pass."""
    reshard: bool = True
    """Whether gathered parameters are freed after each forward and gathered again for the backward pass."""

    @property
    def num_ranks(self) -> int:
        """GPUs that it takes."""
        return self.tensor * self.context * self.shard * self.replicate * self.pipeline

    @property
    def data(self) -> int:
        """Parts that the batch's rows are split into."""
        return self.shard * self.replicate

    @property
    def state_shards(self) -> int:
        """Parts that parameters, gradients and optimiser state are split into; context ranks hold shards too, where
        there are any."""
        return 1 if self.shard == 1 else self.shard * self.context

    @property
    def state_copies(self) -> int:
        """Ranks that hold the same part."""
        return self.data * self.context // self.state_shards

    def to_parallel(self) -> ParallelConfig:
        """The same for `train.parallel` of a recipe; its `train.micro_batch_rows` is `micro_batch_rows`."""
        assert self.checkpointing != "alternate", "not among Puna's own"
        return ParallelConfig(
            data=self.replicate,
            shard=self.shard,
            tensor=self.tensor,
            context=self.context,
            pipeline=self.pipeline,
            schedule="interleaved" if self.pipeline_chunks > 1 else "1f1b",
            stages_per_rank=max(2, self.pipeline_chunks),
            activation_checkpointing=self.checkpointing,
        )

    def __str__(self) -> str:
        pipeline = f"{self.pipeline}x{self.pipeline_chunks}" if self.pipeline_chunks > 1 else self.pipeline
        degrees = {
            "TP": self.tensor,
            "CP": self.context,
            "PP": pipeline,
            "FSDP": self.shard,
            "DP": self.replicate,
        }
        return " ".join(f"{name}{degree}" for name, degree in degrees.items() if degree != 1) or "one rank"


@dataclass(frozen=True)
class Choices:
    """Which layouts to consider; an empty list leaves the choice to the planner."""

    tensor: tuple[int, ...] = ()
    """Degrees of tensor parallelism; empty: powers of two up to a node."""
    context: tuple[int, ...] = ()
    """Degrees of context parallelism; empty: powers of two, for rows of 16,384 tokens and more."""
    pipeline: tuple[int, ...] = ()
    """Degrees of pipeline parallelism; empty: powers of two."""
    shard: tuple[int, ...] = ()
    """Degrees of sharding (FSDP); empty: none, within a node, and over all ranks that hold the same layers."""
    micro_batch_rows: tuple[int, ...] = (1, 2, 4, 8)
    """Rows in one forward pass."""
    checkpointing: tuple[Checkpointing, ...] = ("none", "selective", "full")
    """Kinds of activation checkpointing."""


def layouts(
    model: LlamaConfig, cluster: Cluster, batch_rows: int, row_length: int, choices: Choices
) -> Iterator[Layout]:
    """Every layout that uses all GPUs, divides model and batch evenly, and is among the choices."""
    powers = [2**n for n in range(cluster.num_gpus.bit_length())]
    tensor_degrees = choices.tensor or [n for n in powers if n <= cluster.gpus_per_node]
    context_degrees = choices.context or [n for n in powers if n == 1 or row_length // n >= 8192]
    for tensor in tensor_degrees:
        if model.num_kv_heads % tensor or model.hidden_dim % tensor or row_length % tensor:
            continue
        for context in context_degrees:
            if row_length % (2 * context) and context > 1:
                continue
            for pipeline in choices.pipeline or [n for n in powers if n <= model.num_layers]:
                held = tensor * context * pipeline
                if cluster.num_gpus % held or pipeline > model.num_layers:
                    continue
                yield from _with_data(model, cluster, batch_rows, choices, tensor, context, pipeline)


def _with_data(
    model: LlamaConfig, cluster: Cluster, batch_rows: int, choices: Choices, tensor: int, context: int, pipeline: int
) -> Iterator[Layout]:
    data = cluster.num_gpus // (tensor * context * pipeline)
    if batch_rows % data:
        return
    within_node = max(1, cluster.gpus_per_node // (tensor * context))
    for shard in sorted(set(choices.shard or (1, min(data, within_node), data))):
        if data % shard:
            continue
        for rows in choices.micro_batch_rows:
            micro_batches, rest = divmod(batch_rows // data, rows)
            if rest or micro_batches == 0:
                continue
            # Interleaving hands out micro-batches in groups of as many as there are ranks.
            for chunks in _chunks(model, pipeline) if micro_batches % pipeline == 0 else [1]:
                for checkpointing in choices.checkpointing:
                    for reshard in (True, False) if shard > 1 and pipeline == 1 else (False,):
                        yield Layout(
                            tensor=tensor,
                            context=context,
                            shard=shard,
                            replicate=data // shard,
                            pipeline=pipeline,
                            pipeline_chunks=chunks,
                            micro_batch_rows=rows,
                            checkpointing=checkpointing,
                            reshard=reshard,
                        )


def _chunks(model: LlamaConfig, pipeline: int) -> list[int]:
    """Numbers of pieces per pipeline rank that leave at least one layer to each."""
    if pipeline == 1:
        return [1]
    most = -(-model.num_layers // pipeline)
    return [n for n in (1, 2, 4, 8) if n <= most]
