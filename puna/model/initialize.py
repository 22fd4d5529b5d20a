"""The one place that gives a fresh model its first weights."""

import math

import torch
from torch import Tensor, nn

from puna.model.transformer import RMSNorm, Transformer


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Fill every parameter of `model`; the same seed gives the same weights.

    The Llama papers do not say how; this is the common recipe: normal with standard deviation
    1 / sqrt(fan-in), cut at three deviations, and the two projections that write to the residual stream divided
    by sqrt(2 * layers) so that the stream's variance does not grow with depth (Radford et al. 2019, section 2.3).
    Embeddings start at 0.02, norms at one, biases at zero.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)

    def normal(weight: Tensor, std: float) -> None:
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)

    residual_scale = 1 / math.sqrt(2 * model.config.num_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            normal(module.weight, 0.02)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, nn.Linear):
            if module.bias is not None:
                module.bias.zero_()
            if module.weight is model.embedding.weight:
                continue
            to_residual = name.endswith(("attention.output", "feed_forward.down"))
            normal(module.weight, (residual_scale if to_residual else 1.0) / math.sqrt(module.in_features))
