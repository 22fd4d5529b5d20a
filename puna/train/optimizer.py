"""The optimiser and what it decays."""

import torch
from torch import nn

from puna.train.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with decay for the weights of linear layers only.

    Norms and biases have no scale to shrink, and a row of the embedding that no token of a batch touches should not
    shrink either. A weight that is tied to the embedding counts as a linear layer's.
    """
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
