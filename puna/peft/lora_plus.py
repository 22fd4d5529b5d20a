"""A higher learning rate for B than for A (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""

from typing import Any

from puna.model.transformer import Transformer
from puna.peft.apply import adapted_maps
from puna.peft.low_rank import LoRALinear
from puna.runtime.errors import InputError


def lora_plus_groups(
    model: Transformer, learning_rate: float, ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups of all trained parameters for an optimiser: B learns `ratio` times as fast as A and the rest.

    Decay is for matrices only; a vector, such as DoRA's lengths, learns as fast as B, as in PEFT, and does not decay.

    Args:
        model: with a LoRA attached.
        learning_rate: of A.
        ratio: of the two learning rates; the authors recommend 16 (section 5).
        weight_decay: of the matrices.

    Raises:
        InputError: the model has no LoRA, or the ratio is below 1.
    """
    if ratio < 1:
        raise InputError(f"The ratio of LoRA+'s learning rates is {ratio}; it has to be at least 1.")
    fast = {id(part.lora_b) for part in adapted_maps(model).values() if isinstance(part, LoRALinear)}
    if not fast:
        raise InputError("LoRA+ is for models with a LoRA; attach one first.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    slow = [p for p in trained if id(p) not in fast and p.ndim > 1]
    matrices = [p for p in trained if id(p) in fast]
    vectors = [p for p in trained if p.ndim == 1]
    groups = [
        {"params": slow, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": matrices, "lr": learning_rate * ratio, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate * ratio, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
