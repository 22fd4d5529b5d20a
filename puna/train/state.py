"""What a run has to remember to go on as if it had never stopped."""

from dataclasses import dataclass

import torch

from puna.model.transformer import Transformer


@dataclass
class TrainState:
    """Mutable state of one run. The position in the data follows from `step`, see `puna.batches.packing`."""

    model: Transformer
    """With float32 parameters."""
    optimizers: list[torch.optim.Optimizer]
    """Each parameter that is trained is in exactly one."""
    step: int = 0
    """Optimiser steps done."""
