"""Everything about training that is not the data, the model or the loss."""

from dataclasses import dataclass, field
from typing import Literal

from puna.parallel.config import ParallelConfig
from puna.runtime.devices import DeviceName


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`adamw` (Loshchilov and Hutter 2019, arXiv:1711.05101) for everything; `muon` (Jordan et al. 2024; Liu et al.
    2025, arXiv:2502.16982) for the matrices within layers, with AdamW for embeddings, output, norms and biases. Muon
    learns more from each token; its updates are scaled to AdamW's, so that learning rates carry over."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean; 0.95 as in the Llama papers."""
    epsilon: float = 1e-8
    """Added to the root of the squared gradient's mean."""
    weight_decay: float = 0.1
    """Of the weights of linear layers; norms, biases and embeddings have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    state_precision: Literal["fp32", "bf16", "int8"] = "fp32"
    """Of AdamW's two running means, which take two thirds of the memory of a float32 run: `bf16` needs half as much
    (DeepSeek-V3, arXiv:2412.19437, section 3.3.3), `int8` a quarter (Dettmers et al. 2022, arXiv:2110.02861; needs
    torchao and a compiler)."""

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it has to be positive.")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; it has to be positive.")


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves: linear warm-up, then down."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """`cosine` falls to the end; `wsd` (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395) stays at the
    peak and falls linearly over the last `decay_steps`; `constant` stays."""
    warmup_steps: int = 100
    """Steps of linear rise from zero."""
    decay_steps: int = 0
    """`wsd` only: steps of the final fall."""
    final_ratio: float = 0.1
    """The last learning rate as a share of the peak."""


@dataclass(frozen=True)
class FaultConfig:
    """What a run does about bad data, broken machines and waiting for ever."""

    spike_deviations: float = 10.0
    """A step whose loss, or the logarithm of whose gradient's norm, is this many standard deviations above its mean
    over the last 50 steps or so does not count, and its batch is left out; 0 means only what is not finite."""
    spike_settle_steps: int = 100
    """Not before so many steps, while loss and gradient are still finding their level."""
    max_rollbacks: int = 3
    """Since one checkpoint, leave out at most so many batches and go back at most so often for corrupted values; more
    is an error: training has diverged, or a machine is broken."""
    check_every: int = 1000
    """Steps between two looks for silent corruption (copies of parameters have to be equal, a micro-batch computed
    twice has to give the same bits) and for slow ranks; 0 means never. Copies are compared before checkpoints too."""
    hang_timeout_seconds: float = 1800.0
    """Training that stands still for so long is reported with the rank that the others wait for, and ended where
    torchrun starts it again; 0 means never."""

    def __post_init__(self) -> None:
        for name in ("spike_deviations", "spike_settle_steps", "max_rollbacks", "check_every", "hang_timeout_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"faults.{name} is {getattr(self, name)}; it cannot be negative.")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    steps: int = 1000
    """Optimiser steps."""
    batch_rows: int = 16
    """Rows in one optimiser step."""
    micro_batch_rows: int = 16
    """Rows in one forward and backward pass; fewer need less memory and give the same result."""
    row_length: int = 512
    """Tokens in a row."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Of the activations and products; parameters and gradients are float32 in all. `fp8` is bf16 with the products of
    the layers in float8, each scaled to its largest value (Micikevicius et al. 2022, arXiv:2209.05433; needs torchao
    and a GPU from H100 on)."""
    z_loss: float = 0.0
    """Factor of the squared log-normaliser of each prediction, added to the loss, which keeps logits from drifting
    (PaLM, arXiv:2204.02311, section 5: 1e-4)."""
    compile: bool = False
    """Compile each layer with torch.compile (needs a C++ compiler). On a CPU in float32, native kernels are as fast
    without its minutes of preparation; it is for GPUs and bfloat16, from some hundred steps on."""
    seed: int = 0
    """Of the initial weights and of the order of data."""
    device: DeviceName = "auto"
    """"auto" takes a GPU where there is one."""
    num_threads: int = 0
    """CPU threads; 0 means every core."""
    log_every: int = 10
    """Steps between two points of the curves."""
    validate_every: int = 0
    """Steps between two measurements on held-out rows; 0 means only at the end."""
    validation_rows: int = 256
    """Measure on at most this many held-out rows."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0 means only at the end."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on disk."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    wandb_project: str = ""
    """Log to this Weights & Biases project too; empty means not."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimiser."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over time."""
    faults: FaultConfig = field(default_factory=FaultConfig)
    """What to survive, and when to give up."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the processes that torchrun started share the work."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_rows", "micro_batch_rows", "row_length", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 1.")
        if self.batch_rows % self.micro_batch_rows:
            raise ValueError(
                f"batch_rows ({self.batch_rows}) has to be a multiple of micro_batch_rows ({self.micro_batch_rows})."
            )
        if self.z_loss < 0:
            raise ValueError(f"z_loss is {self.z_loss}; it cannot be negative.")
        falling = self.schedule.warmup_steps + (self.schedule.decay_steps if self.schedule.kind == "wsd" else 0)
        if falling > self.steps:
            raise ValueError(
                f"Warm-up and decay together take {falling} steps, more than the {self.steps} steps of the run."
            )
