"""Changing what a model's embedding gives, from outside.

Shapes: B rows, T tokens (virtual ones of prompt tuning included), D model dimension.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from puna.model.transformer import Transformer
from puna.peft.virtual import forward_arguments


@contextmanager
def changed_embeddings(model: Transformer, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """For the time of a `with`, let `change(x_BTD, documents_BT)` take the place of the embeddings x_BTD.

    Args:
        change: is given the document of each token, too, as `puna.batches.packing.TokenBatch` has it.
    """
    documents_BT = torch.empty(0)

    def see(model: Transformer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal documents_BT
        # Behind the hooks of virtual tokens, which change these arguments.
        ids_BT, _, attend, _ = forward_arguments(*args, **kwargs)
        documents_BT = getattr(attend, "documents_BT", torch.zeros_like(ids_BT))

    def apply(module: Any, inputs: Any, x_BTD: Tensor) -> Tensor:
        return change(x_BTD, documents_BT)

    seeing = model.register_forward_pre_hook(see, with_kwargs=True)
    changing = model.embedding.register_forward_hook(apply)
    try:
        yield
    finally:
        seeing.remove()
        changing.remove()
