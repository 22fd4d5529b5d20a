"""`puna average`: one model from several, parameter by parameter.

Averaging the last checkpoints of annealing takes out what the last steps wandered about (Polyak and Juditsky 1992;
Llama 3, arXiv:2407.21783, section 3.4.3).
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load

from puna.config import to_plain
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import progress, say
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model, read_config, save_model


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """The mean of several models' weights: of checkpoints of a training, or of model directories."""

    training: Path | None = None
    """Output folder of a finished `puna pretrain` or `puna finetune`: its newest checkpoints are averaged."""
    last: int = 4
    """With `training`: how many checkpoints. The training has to keep as many (`train.keep_checkpoints`)."""
    models: tuple[Path, ...] = ()
    """Model directories of one architecture and one tokenizer, in place of `training`."""
    output: Path
    """Gets the model directory."""

    def __post_init__(self) -> None:
        if (self.training is None) == (not self.models):
            raise ValueError("Set either training, or models.")
        if self.last < 1:
            raise ValueError(f"last is {self.last}; it has to be at least 1.")


def main(config: AverageConfig) -> None:
    """Write the averaged model, with the tokenizer of the first.

    Raises:
        InputError: there are fewer checkpoints than asked for, one cannot be read, or models do not fit together.
    """
    if config.training is not None:
        first = config.training / "model"
        sources = newest_checkpoints(config.training, config.last)
        model = mean_model(_empty(first), sources, read_checkpoint)
        note = f"steps {', '.join(str(int(path.name.removeprefix('step-'))) for path in sources)}"
    else:
        first, sources = config.models[0], list(config.models)
        _check_alike(sources)
        model = mean_model(_empty(first), sources, _read_model)
        note = f"{len(sources)} models"
    inputs = {str(path): content_hash(path) for path in (first, *sources)}
    manifest = Manifest("average", to_plain(config), inputs, {"num_averaged": len(sources)})
    save_model(model, config.output, tokenizer=load_tokenizer(first), dtype=torch.float32, manifest=manifest)
    say(f"Wrote {config.output}, the mean of {note}.")


@torch.no_grad()
def mean_model(model: Transformer, sources: Iterable[Path], read: Callable[[Transformer, Path], None]) -> Transformer:
    """Fill `model` with the mean, in float32, of what `read(model, source)` fills it with."""
    totals: list[Tensor] = []
    sources = list(sources)
    with progress("Averaging", total=len(sources)) as advance:
        for source in sources:
            read(model, source)
            if totals:
                torch._foreach_add_(totals, list(model.parameters()))
            else:
                totals = [parameter.clone() for parameter in model.parameters()]
            advance()
    for parameter, total in zip(model.parameters(), totals, strict=True):
        parameter.copy_(total / len(sources))
    return model


def newest_checkpoints(training: Path, count: int) -> list[Path]:
    """The `count` newest checkpoints of a training, oldest first.

    Raises:
        InputError: there are fewer.
    """
    found = sorted((training / "checkpoints").glob("step-*"))
    if len(found) < count:
        raise InputError(
            f"{training / 'checkpoints'} holds {len(found)} checkpoints, and {count} are to be averaged. Train with "
            f"train.keep_checkpoints = {count} or more and train.checkpoint_every set, or average fewer."
        )
    return found[-count:]


def read_checkpoint(model: Transformer, path: Path) -> None:
    """Copy the weights of a training's checkpoint into `model`, whatever layout it was written in.

    Raises:
        InputError: it cannot be read, or is of another model.
    """
    weights = get_model_state_dict(model)
    try:
        with warnings.catch_warnings():  # torch says that there is only one process, which we know
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            load({"model": weights}, checkpoint_id=path, no_dist=True)
    except (CheckpointException, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().rsplit("\n", 1)[-1]
        raise InputError(f"The checkpoint {path} cannot be read as this model ({reason}).") from error
    set_model_state_dict(model, weights)


def _empty(directory: Path) -> Transformer:
    return Transformer(read_config(directory))


def _read_model(model: Transformer, path: Path) -> None:
    model.load_state_dict(load_model(path, dtype=torch.float32).state_dict())


def _check_alike(models: Sequence[Path]) -> None:
    config, tokenizer = read_config(models[0]), load_tokenizer(models[0]).hash
    for path in models[1:]:
        if read_config(path) != config:
            raise InputError(f"{path} has another architecture than {models[0]}; their mean would be of no use.")
        if load_tokenizer(path).hash != tokenizer:
            raise InputError(f"{path} has another tokenizer than {models[0]}; their rows belong to other tokens.")
