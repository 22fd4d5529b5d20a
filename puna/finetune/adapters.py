"""What `peft` in a recipe makes of a model and of its training, and what is written in the end."""

from pathlib import Path

import torch

from puna.finetune.config import FinetuneConfig
from puna.model.transformer import Transformer
from puna.peft.apply import adapted_maps, attach, virtual_tokens
from puna.peft.files import save_adapter
from puna.peft.method import Training
from puna.runtime.manifest import Manifest
from puna.runtime.progress import say
from puna.runtime.seeds import derive_seed
from puna.tokenizer.base import Tokenizer
from puna.weights.load import save_model


def adapt(model: Transformer, config: FinetuneConfig) -> Training:
    """Attach the recipe's method, if it names one; return what it asks of the training.

    Raises:
        InputError: the method does not fit the model or the number of steps.
    """
    if config.peft is None:
        return Training()
    attach(model, config.peft, seed=derive_seed(config.train.seed, "adapters"))
    parameters = list(model.parameters())
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    say(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%}).")
    return config.peft.training(model, config.train.steps)


def has_adapters(model: Transformer) -> bool:
    """Whether something stands beside the model's own parameters."""
    return bool(adapted_maps(model)) or virtual_tokens(model) is not None


def save_tuned(model: Transformer, config: FinetuneConfig, tokenizer: Tokenizer, manifest: Manifest) -> Path:
    """Write the adapter directory, or the model directory where there are no adapters; returns which."""
    if config.peft is not None and has_adapters(model):
        written = config.output / "adapter"
        save_adapter(model, config.peft, written, base_model=str(config.model), manifest=manifest)
    else:
        written = config.output / "model"
        save_model(model, written, tokenizer=tokenizer, dtype=getattr(torch, config.dtype), manifest=manifest)
    say(f"Wrote {written}")
    return written
