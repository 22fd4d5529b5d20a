"""A smaller variant of a model beside the original: how much worse it predicts, and how often it says something else.

Shapes: B windows (one), T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from puna.model.transformer import Transformer
from puna.runtime.progress import progress
from puna.weights.stored import named_tensors


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a variant loses, measured on the same tokens as the original."""

    num_tokens: int
    """Tokens predicted."""
    perplexity_of_original: float
    """exp of the mean negative log-likelihood; smaller is better."""
    perplexity: float
    """The variant's."""
    mean_kl_nats: float
    """Mean over positions of KL(original || variant) of the next token's distribution."""
    greedy_agreement: float
    """Share of positions at which both hold the same token for the likeliest, 0 to 1."""
    size_bytes_of_original: int
    """Memory of its weights."""
    size_bytes: int
    """The variant's."""


@torch.inference_mode()
def compare(original: Transformer, variant: Transformer, documents: Sequence[Sequence[int]], window: int) -> Comparison:
    """Measure both models on documents.

    Args:
        documents: ids of each, beginning with BOS where there is one; at least two ids in one of them.
        window: longer documents are read in pieces of so many tokens, each by itself.
    """
    pieces = [ids[at : at + window + 1] for ids in documents for at in range(0, len(ids) - 1, window)]
    nats_of_original = nats = kl = agreed = 0.0
    num_tokens = sum(len(piece) - 1 for piece in pieces)
    device = original.embedding.weight.device
    with progress("Comparing the two", total=num_tokens) as advance:
        for piece in pieces:
            ids_BT = torch.tensor([piece], device=device)
            labels_T1 = ids_BT[0, 1:, None]
            one_TV, other_TV = (model(ids_BT[:, :-1])[0].float().log_softmax(-1) for model in (original, variant))
            nats_of_original -= one_TV.gather(1, labels_T1).sum().item()
            nats -= other_TV.gather(1, labels_T1).sum().item()
            kl += torch.nn.functional.kl_div(other_TV, one_TV, reduction="sum", log_target=True).item()
            agreed += (one_TV.argmax(-1) == other_TV.argmax(-1)).sum().item()
            advance(len(piece) - 1)
    return Comparison(
        num_tokens=num_tokens,
        perplexity_of_original=math.exp(nats_of_original / num_tokens),
        perplexity=math.exp(nats / num_tokens),
        mean_kl_nats=kl / num_tokens,
        greedy_agreement=agreed / num_tokens,
        size_bytes_of_original=_size(original),
        size_bytes=_size(variant),
    )


def _size(model: Transformer) -> int:
    return sum(tensor.nbytes for _, tensor in named_tensors(model))
