"""A model directory to a running engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from puna.infer.engine import Engine
from puna.runtime.devices import DeviceName, open_device
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model, resolve


@dataclass(frozen=True)
class EngineConfig:
    """Where and in what precision a model computes, and how much room its cache takes."""

    device: DeviceName = "auto"
    """auto (a GPU where there is one), cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights, activations and cache; auto is the one in which the weights are stored."""
    num_threads: int = 0
    """CPU threads; 0 is every core that the process may run on."""
    max_rows: int = 8
    """How many texts are generated at once; each takes max_context tokens of cache memory."""
    max_context: int | None = None
    """Longest prompt and answer together, in tokens; absent is the model's own context, but at most 4096."""


def load_engine(model: Path, config: EngineConfig) -> Engine:
    """Load the model and the tokenizer of a model directory, or of a name on the hub (`puna.weights.load.resolve`).

    Raises:
        InputError: either cannot be read, or the engine cannot be opened as configured.
    """
    directory = resolve(model)
    device = open_device(config.device, config.num_threads)
    tokenizer = load_tokenizer(directory)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    transformer = load_model(directory, device=device, dtype=dtype).eval()
    return Engine(transformer, tokenizer, max_rows=config.max_rows, max_context=config.max_context)
