"""What prefix and prompt tuning share: which tokens a document's tokens see, however they are packed, and their files.

Shapes: B batch, T tokens, P virtual tokens, E numbers for each of them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from puna.kernels.attend import NativeDocumentAttend
from puna.model.attend import Attend, DocumentAttend, bidirectional, causal
from puna.runtime.errors import InputError

Head = Any
"""What `Transformer.forward` takes as `head`."""


def forward_arguments(
    ids_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend = causal, head: Head = None
) -> tuple[Tensor, Tensor, Attend, Head]:
    """The arguments of `Transformer.forward`, however they were given, with positions."""
    if positions_BT is None:
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    return ids_BT, positions_BT, attend, head


def documents_of(attend: Attend, ids_BT: Tensor) -> tuple[Tensor, bool | Tensor]:
    """The document of each token, [B, T], and whether attention is causal, as `DocumentAttend` takes them.

    Raises:
        InputError: it is another context, such as one that holds a cache, in which virtual tokens have no place.
    """
    if isinstance(attend, DocumentAttend | NativeDocumentAttend):
        return attend.documents_BT, attend.causal
    if attend in (causal, bidirectional):
        return torch.zeros_like(ids_BT), attend is causal
    raise InputError(
        "Prefix and prompt tuning work in training and scoring, with documents packed or one by one; generation with a "
        "cache and context parallelism have no place for their virtual tokens. Use a method that can be merged into "
        "the model's weights (lora, adalora, ia3) for these."
    )


def check_number(num_virtual_tokens: int) -> None:
    """There has to be a virtual token.

    Raises:
        InputError: there is none.
    """
    if num_virtual_tokens < 1:
        raise InputError(f"num_virtual_tokens is {num_virtual_tokens}; it has to be at least 1.")


def read_number(values: Mapping[str, Any], where: str) -> int:
    """`num_virtual_tokens` of an adapter_config.json of PEFT's.

    Raises:
        InputError: it is no number, or the settings are for a model with two halves.
    """
    number = values.get("num_virtual_tokens")
    if not isinstance(number, int) or values.get("num_transformer_submodules") not in (None, 1):
        raise InputError(
            f"{where}: num_virtual_tokens ({number!r}) has to be a whole number, and num_transformer_submodules 1."
        )
    return number
