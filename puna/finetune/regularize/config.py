"""The settings against over-fitting and forgetting."""

from dataclasses import dataclass
from pathlib import Path

EARLIER_LOSS = "earlier/loss"
"""Curve of the loss on earlier data, in nats per token."""


@dataclass(frozen=True)
class AdversaryConfig:
    """Train on embeddings that are changed so as to raise the loss, as well as on the true ones."""

    epsilon: float = 1.0
    """Length of the change of one text, in units in which its embeddings have a mean square of 1."""
    steps: int = 1
    """Gradients that the change is found by: 1 is FGM (Miyato et al. 2017, arXiv:1605.07725), more are PGD (Madry et
    al. 2018, arXiv:1706.06083); each costs a forward and about half a backward pass."""
    step_size: float = 0.5
    """Length of one of several steps, in the same units; with one step it is `epsilon`."""
    weight: float = 1.0
    """Factor of the loss on changed embeddings, which is added to the other."""

    def __post_init__(self) -> None:
        if self.epsilon <= 0 or self.step_size <= 0 or self.weight <= 0:
            raise ValueError("The adversary's epsilon, step_size and weight have to be above 0.")
        if self.steps < 1:
            raise ValueError(f"The adversary's steps are {self.steps}; there has to be at least 1.")


@dataclass(frozen=True)
class EWCConfig:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796): hold on to what earlier data needs."""

    strength: float = 1.0
    """Factor of the penalty: at 1, a nat per token lost on earlier data weighs as much as one won on the new, as far as
    the diagonal of the Fisher information foresees it."""
    fisher: Path | None = None
    """fisher.safetensors beside the model that this training starts from (`regularization.fisher_rows`); absent, the
    Fisher information is estimated on `earlier.train`."""
    rows: int = 256
    """Rows of `earlier.train` to estimate it on."""

    def __post_init__(self) -> None:
        if self.strength <= 0:
            raise ValueError(f"The strength of EWC is {self.strength}; it has to be above 0.")
        if self.rows < 1:
            raise ValueError(f"EWC estimates on {self.rows} rows; there has to be at least 1.")


@dataclass(frozen=True)
class RegularizationConfig:
    """Against over-fitting and forgetting. Everything drawn at random follows from the seed and the row's number."""

    residual_dropout: float = 0.0
    """Share of the numbers that is dropped from what attention and feed-forward add in each layer."""
    embedding_dropout: float = 0.0
    """Share of the numbers that is dropped from the embeddings."""
    layer_decay: float = 1.0
    """Each layer learns at this share of the rate of the layer above it, the topmost at this share of the head's, the
    embedding of the first layer's (Howard and Ruder 2018, arXiv:1801.06146, section 3.2). 1 is no difference; 0.9 is
    usual."""
    rdrop: float = 0.0
    """Factor of the divergence between two passes under different dropout (R-Drop, Liang et al. 2021,
    arXiv:2106.14448); 1 to 5 are usual, 0 is none. Each pass then has twice train.micro_batch_rows rows."""
    adversary: AdversaryConfig | None = None
    """Adversarial training on the embeddings."""
    ewc: EWCConfig | None = None
    """A penalty on changing what earlier data needs."""
    fisher_rows: int = 0
    """At the end, estimate on so many training rows what this training's data needs, and write fisher.safetensors
    beside the model, for a later training's `ewc.fisher`; 0 does not."""

    def __post_init__(self) -> None:
        for name in ("residual_dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 0 and less than 1.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it has to be above 0 and at most 1.")
        if self.rdrop < 0 or self.fisher_rows < 0:
            raise ValueError("rdrop and fisher_rows cannot be negative.")

    @property
    def drops(self) -> bool:
        """Whether there is dropout."""
        return bool(self.residual_dropout or self.embedding_dropout)


@dataclass(frozen=True)
class EarlierConfig:
    """What the model has learnt before, and should not forget; each file is a folder of token shards that
    `puna tokenize` made, or conversations."""

    train: Path | None = None
    """To learn from again: for `replay_share`, and for `regularization.ewc`."""
    replay_share: float = 0.0
    """Share of the training that goes to rows of it: of the rows, for conversations; of the loss, for a task."""
    held_out: Path | None = None
    """To measure forgetting on: how much the loss on it, in nats per token, rises from before training to after."""
    measured_rows: int = 128
    """Rows of it to measure."""
    task_model: Path | None = None
    """Model directory with a head, of a task that the model learnt before: how well that head does on this training's
    model is measured before and after, on `task_data`."""
    task_data: Path | None = None
    """Labelled examples of that task, in the form that it was trained on."""

    def __post_init__(self) -> None:
        if not 0 <= self.replay_share < 1:
            raise ValueError(f"earlier.replay_share is {self.replay_share}; it has to be at least 0 and less than 1.")
        if self.replay_share and self.train is None:
            raise ValueError("earlier.replay_share needs earlier.train: what to learn from again.")
        if (self.task_model is None) != (self.task_data is None):
            raise ValueError("earlier.task_model and earlier.task_data go together: a head, and what to measure it on.")
        if self.measured_rows < 1:
            raise ValueError(f"earlier.measured_rows is {self.measured_rows}; it has to be at least 1.")

    @property
    def is_measured(self) -> bool:
        """Whether there is something to measure forgetting on."""
        return self.held_out is not None or self.task_data is not None
