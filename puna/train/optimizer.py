"""The optimisers, what each updates, and what it decays."""

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from puna.model.transformer import Transformer
from puna.train.config import OptimizerConfig


def build_optimizers(model: Transformer, config: OptimizerConfig) -> list[Optimizer]:
    """The optimisers of all parameters that are trained; each is in exactly one.

    Decay is for the weights of linear layers only. Norms and biases have no scale to shrink, and a row of the embedding
    that no token of a batch touches should not shrink either. A weight that is tied to the embedding counts as a linear
    layer's.
    """
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    hidden = {id(module.weight) for module in model.layers.modules() if isinstance(module, nn.Linear)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    by_muon = [p for p in trained if id(p) in hidden] if config.kind == "muon" else []
    rest = [p for p in trained if config.kind != "muon" or id(p) not in hidden]
    optimizers: list[Optimizer] = []
    if by_muon:
        optimizers.append(
            Muon(
                by_muon,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    groups = [
        {"params": [p for p in rest if id(p) in linear], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if id(p) not in linear], "weight_decay": 0.0},
    ]
    if rest:
        optimizers.append(
            AdamW(
                [group for group in groups if group["params"]],
                lr=config.learning_rate,
                betas=(config.beta1, config.beta2),
                eps=config.epsilon,
                fused=True,
            )
        )
    return optimizers
