"""What a run has to remember to go on as if it had never stopped."""

from dataclasses import dataclass

import torch

from puna.model.transformer import Transformer


@dataclass
class TrainState:
    """Mutable state of one run. The position in the data follows from `step`, see `puna.batches.packing`."""

    model: Transformer
    """With float32 parameters."""
    optimizer: torch.optim.Optimizer
    """Over the parameters that are trained."""
    step: int = 0
    """Optimiser steps done."""
