"""How many processes share what. Nothing here changes what a run computes, beyond rounding."""

from dataclasses import dataclass
from typing import Literal

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv", "dualpipev"]
"""Orders of forward and backward passes in a pipeline."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that `torchrun` started share one training; without `torchrun` there is one.

    The product of the five degrees is the number of processes.
    """

    data: int = 0
    """Copies of the model, each trained on other rows; 0 means as many as there are processes left."""
    shard: int = 1
    """Processes that share the parameters, gradients and optimiser state of one copy, each on other rows (FSDP2; with
    `data` above 1, hybrid sharding)."""
    tensor: int = 1
    """Processes that share every matrix product (tensor parallelism, Shoeybi et al. 2019, arXiv:1909.08053)."""
    context: int = 1
    """Processes that share every row, for long rows (Llama 3, arXiv:2407.21783, section 3.3.2)."""
    pipeline: int = 1
    """Processes that each hold some of the layers."""
    sequence_parallel: bool = True
    """With `tensor`: share what lies between the products too, by position (Korthikanti et al. 2022,
    arXiv:2205.05198)."""
    loss_parallel: bool = True
    """With `tensor`: keep the logits shared by vocabulary, so that no process holds a whole row of them."""
    schedule: Schedule = "1f1b"
    """With `pipeline`: the order of passes. `gpipe` and `1f1b` have one stage on each process; `interleaved` and
    `zero-bubble` have `stages_per_rank`; `zbv` and `dualpipev` have two, and the last stage is beside the first."""
    stages_per_rank: int = 2
    """With the schedules `interleaved` and `zero-bubble`: stages on each process; more make the bubble smaller and
    the messages more."""
    activation_checkpointing: Literal["none", "full", "selective", "budget"] = "none"
    """What the backward pass computes again instead of keeping: `full` whole layers, `selective` all but the products
    and attention within them, `budget` what the compiler finds cheapest (needs train.compile)."""
    activation_budget: float = 0.5
    """With `budget`: share of the activations' memory that may be used; 1 keeps all of them."""

    def __post_init__(self) -> None:
        for name in ("shard", "tensor", "context", "pipeline", "stages_per_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; it has to be at least 1.")
        if self.data < 0:
            raise ValueError(f"parallel.data is {self.data}; it has to be at least 1, or 0 for all that are left.")
        if not 0 <= self.activation_budget <= 1:
            raise ValueError(f"parallel.activation_budget is {self.activation_budget}; it is a share, from 0 to 1.")
