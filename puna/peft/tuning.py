"""What a recipe's method makes of a model and of its training, and what is written in the end."""

from pathlib import Path

import torch

from puna.model.transformer import Transformer
from puna.peft.apply import adapted_maps, attach, virtual_tokens
from puna.peft.files import save_adapter
from puna.peft.method import Method, Training
from puna.runtime.manifest import Manifest
from puna.runtime.progress import say
from puna.runtime.seeds import derive_seed
from puna.tokenizer.base import Tokenizer
from puna.weights.load import save_model


def adapt(model: Transformer, method: Method | None, steps: int, seed: int) -> Training:
    """Attach a method, if there is one; return what it asks of the training.

    Args:
        steps: of the training.
        seed: the training's.

    Raises:
        InputError: the method does not fit the model or the number of steps.
    """
    if method is None:
        return Training()
    attach(model, method, seed=derive_seed(seed, "adapters"))
    parameters = list(model.parameters())
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    say(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%}).")
    return method.training(model, steps)


def has_adapters(model: Transformer) -> bool:
    """Whether something stands beside the model's own parameters."""
    return bool(adapted_maps(model)) or virtual_tokens(model) is not None


def save_tuned(
    model: Transformer,
    method: Method | None,
    output: Path,
    *,
    base_model: Path,
    tokenizer: Tokenizer,
    dtype: str,
    manifest: Manifest,
) -> Path:
    """Write output/adapter, or output/model where there are no adapters; returns which.

    Args:
        method: that was attached.
        base_model: the model below adapters.
        dtype: of a model's weights, by torch's name.
    """
    if method is not None and has_adapters(model):
        written = output / "adapter"
        save_adapter(model, method, written, base_model=str(base_model), manifest=manifest)
    else:
        written = output / "model"
        save_model(model, written, tokenizer=tokenizer, dtype=getattr(torch, dtype), manifest=manifest)
    say(f"Wrote {written}")
    return written
