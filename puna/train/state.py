"""What a run has to remember to go on as if it had never stopped."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from puna.model.transformer import Transformer
from puna.parallel.apply import Layout
from puna.train.anomaly import fresh_statistics


@dataclass
class TrainState:
    """Mutable state of one run."""

    model: Transformer
    """With float32 parameters."""
    optimizers: list[torch.optim.Optimizer]
    """Each parameter that is trained is in exactly one; see `puna.train.optimizer`."""
    step: int = 0
    """Optimiser steps done."""
    batch: int = 0
    """Number of the next batch; ahead of `step` where batches were left out. See `puna.batches.packing`."""
    statistics: Tensor = field(default_factory=fresh_statistics)
    """Of losses and gradients so far, see `puna.train.anomaly`."""
    layout: Layout = field(default_factory=Layout)
    """How the model lies on the processes."""
    after_update: Callable[[int], None] | None = None
    """Called with the step after each update of the parameters, whose gradients are still there."""
