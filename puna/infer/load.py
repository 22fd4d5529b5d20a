"""A model directory to a running engine."""

import weakref
from functools import partial
from pathlib import Path

import torch

from puna.compress.apply import fit
from puna.infer.config import EngineConfig as EngineConfig
from puna.infer.disk import stream_model
from puna.infer.engine import Engine
from puna.infer.parallel import ParallelLayers, Team
from puna.model.transformer import Transformer
from puna.runtime.devices import available_cores, open_device
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model, resolve


def load_engine(model: Path, config: EngineConfig) -> Engine:
    """Load the model and the tokenizer of a model directory, or of a name on the hub (`puna.weights.load.resolve`).

    Raises:
        InputError: either cannot be read, or the model that guesses for it (`SpeculationConfig`) cannot or has another
            tokenizer, or the engine cannot be opened as configured.
    """
    directory = resolve(model)
    num_threads = config.num_threads or max(1, available_cores() // config.num_processes)
    device = open_device(config.device, num_threads)
    tokenizer = load_tokenizer(directory)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    guesser = _load_guesser(model, tokenizer, config, device, dtype)
    if config.num_processes == 1:
        load = stream_model if config.weights == "disk" else partial(load_model, map_embedding=True)
        return Engine(load(directory, device=device, dtype=dtype, fit=fit), tokenizer, config, guesser=guesser)
    team = Team(config.num_processes, device, num_threads)
    try:
        layout = {"num_parts": config.tensor_parallel, "num_stages": config.pipeline_parallel}
        transformer = team.load(directory, **layout, dtype=dtype)
        engine = Engine(transformer, tokenizer, config, guesser=guesser)
        (layers,) = transformer.layers
        assert isinstance(layers, ParallelLayers)
        layers.open_cache(engine.pool)
    except BaseException:
        team.close()
        raise
    weakref.finalize(engine, team.close)  # at the latest at the end of the program
    return engine


def _load_guesser(
    model: Path, tokenizer: Tokenizer, config: EngineConfig, device: torch.device, dtype: torch.dtype | None
) -> Transformer | None:
    """The smaller model that `config` names, if any."""
    if config.speculation.model is None:
        return None
    smaller = resolve(config.speculation.model)
    if load_tokenizer(smaller).hash != tokenizer.hash:
        raise InputError(
            f"{config.speculation.model} cannot guess for {model}: their tokenizers differ, so their ids mean "
            "different texts. Use a smaller model of the same family."
        )
    return load_model(smaller, device=device, dtype=dtype, fit=fit)
