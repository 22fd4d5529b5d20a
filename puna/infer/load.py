"""A model directory to a running engine."""

from pathlib import Path

import torch

from puna.compress.apply import fit
from puna.infer.config import EngineConfig as EngineConfig
from puna.infer.engine import Engine
from puna.runtime.devices import open_device
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model, resolve


def load_engine(model: Path, config: EngineConfig) -> Engine:
    """Load the model and the tokenizer of a model directory, or of a name on the hub (`puna.weights.load.resolve`).

    Raises:
        InputError: either cannot be read, or the engine cannot be opened as configured.
    """
    directory = resolve(model)
    device = open_device(config.device, config.num_threads)
    tokenizer = load_tokenizer(directory)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    transformer = load_model(directory, device=device, dtype=dtype, fit=fit).eval()
    return Engine(transformer, tokenizer, config)
