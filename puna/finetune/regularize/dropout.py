"""Dropout (Srivastava et al. 2014) put on a model from outside: of embeddings and of residual branches.

Which numbers are dropped follows from the seed, the row's number and the place in the model. So neither the size of
micro-batches nor an interruption changes them, and a layer that is computed again in the backward pass (activation
checkpointing) drops the same.

Shapes: B rows, T tokens, D model dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from puna.batches.packing import TokenBatch
from puna.finetune.numbered import row_numbers
from puna.model.transformer import Transformer
from puna.runtime.seeds import derive_seed
from puna.train.loss import Loss, LossSum


def add_dropout(model: Transformer, *, residual: float, embedding: float, seed: int) -> Callable[[Loss], Loss]:
    """Make a model drop numbers in training mode; every loss has to be wrapped by the result from then on.

    A wrapped loss takes batches of `puna.finetune.numbered.NumberedRows`.

    Args:
        model: gets hooks, which do nothing in evaluation mode.
        residual: share of the numbers dropped from what attention and feed-forward add in each layer, before it is
            added; the others are scaled up by 1 / (1 - residual).
        embedding: the same of what the embedding gives.
        seed: of what is dropped.
    """
    rows: list[int] = []

    def drop(place: str, rate: float, module: nn.Module, inputs: Any, x_BTD: Tensor) -> Tensor:
        return x_BTD * kept(x_BTD, rows, rate, derive_seed(seed, place)) if module.training else x_BTD

    if embedding:
        model.embedding.register_forward_hook(partial(drop, "embedding", embedding))
    if residual:
        for number, layer in enumerate(model.layers):
            for branch in ("attention", "feed_forward"):
                hook = partial(drop, f"{number}.{branch}", residual)
                layer.get_submodule(branch).register_forward_hook(hook)

    def with_dropout(loss: Loss) -> Loss:
        def dropping(model: Transformer, batch: TokenBatch) -> LossSum:
            if model.training:
                rows[:] = row_numbers(batch)
            return loss(model, batch)

        return dropping

    return with_dropout


def kept(x_BTD: Tensor, rows: list[int], rate: float, seed: int) -> Tensor:
    """0 where a number is dropped, 1 / (1 - rate) elsewhere, shape [B, T, D]; drawn on the device of `x_BTD`."""
    generator = torch.Generator(x_BTD.device)
    masks = []
    for row in rows:
        generator.manual_seed(derive_seed(seed, "dropout", row))
        masks.append(torch.rand(x_BTD.shape[1:], generator=generator, device=x_BTD.device) >= rate)
    return torch.stack(masks).to(x_BTD.dtype) / (1 - rate)
