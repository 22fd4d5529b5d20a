"""A ladder of small trainings on this machine, to fit a law to, and a larger one, held out, to test it with."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from puna.config import to_plain
from puna.model.accounting import count_parameters, training_flops_per_token
from puna.model.config import LlamaConfig
from puna.pretrain.main import PretrainConfig
from puna.pretrain.main import main as pretrain
from puna.pretrain.scaling.runs import Runs
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_json
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.train.config import ScheduleConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """Small trainings that differ in size and length alone."""

    tokens: Path
    """Folder of token shards to train on; the longest run should not go over it much more than once."""
    held_out_tokens: Path
    """Folder of token shards to measure the loss on."""
    tokenizer: Path
    """The tokenizer that made them."""
    dims: tuple[int, ...] = (32, 48, 64, 96)
    """Widths of the ladder's models."""
    steps: tuple[int, ...] = (75, 150, 300)
    """Optimiser steps; every width is trained for each of these."""
    held_out_dim: int = 128
    """Width of the run that tests the law."""
    held_out_steps: int = 600
    """Its optimiser steps."""
    model: LlamaConfig = field(default_factory=LlamaConfig)
    """The shape that every width scales: layers, heads and feed-forward grow in proportion to the width."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Every training; its steps are replaced, and warm-up and decay keep their share of them."""

    def __post_init__(self) -> None:
        if len(set(self.dims)) < 2 or len(set(self.steps)) < 2 or len(self.dims) * len(self.steps) < 6:
            raise ValueError(
                f"{len(set(self.dims))} dims and {len(set(self.steps))} steps are too few runs to fit a law to: there "
                "have to be at least two of each, and six runs."
            )
        for what, value in (("dims", min(self.dims)), ("held_out_dim", self.held_out_dim)):
            if value < self.model.head_dim:
                raise ValueError(f"{what} has {value}, less than one head of model.head_dim ({self.model.head_dim}).")
        for dim in (*self.dims, self.held_out_dim):
            if dim % self.model.head_dim:
                raise ValueError(f"A width of {dim} is not a multiple of model.head_dim ({self.model.head_dim}).")


@dataclass(frozen=True)
class Trained:
    """A finished run of the ladder."""

    name: str
    """Its folder."""
    parameters: int
    """Without the input embedding, which takes part in no product."""
    tokens: int
    """Trained on."""
    compute: float
    """Training FLOPs, counted exactly."""
    loss: float
    """On the held-out tokens, nats per token."""


def model_of(shape: LlamaConfig, dim: int) -> LlamaConfig:
    """`shape` at another width: heads, layers and feed-forward in proportion, the head dimension kept."""
    heads = dim // shape.head_dim
    groups = shape.num_heads // shape.num_kv_heads
    hidden = max(8, round(shape.hidden_dim * dim / shape.dim / 8) * 8)
    return replace(
        shape,
        dim=dim,
        num_layers=max(1, round(shape.num_layers * dim / shape.dim)),
        num_heads=heads,
        num_kv_heads=heads // groups if heads % groups == 0 else heads,
        hidden_dim=hidden,
    )


def run_ladder(config: LadderConfig, output: Path) -> tuple[list[Trained], Trained]:
    """Train what is not trained yet; the rungs, and the held-out run.

    Every run is `puna pretrain` in a folder of its own under `output`, so an interrupted one goes on from its
    checkpoint.
    """
    inputs = {str(path): content_hash(path) for path in (config.tokens, config.held_out_tokens, config.tokenizer)}
    plan = [(dim, steps) for dim in config.dims for steps in config.steps]
    plan.append((config.held_out_dim, config.held_out_steps))
    done = [_train(config, dim, steps, output, inputs) for dim, steps in sorted(plan, key=lambda run: run[0] * run[1])]
    held_out = next(run for run in done if run.name == _name(config.held_out_dim, config.held_out_steps))
    return [run for run in done if run is not held_out], held_out


def to_runs(trained: list[Trained]) -> Runs:
    """The ladder as points to fit."""
    return Runs(
        np.array([float(run.parameters) for run in trained]),
        np.array([float(run.tokens) for run in trained]),
        np.array([run.loss for run in trained]),
        np.array([run.compute for run in trained]),
    )


def _name(dim: int, steps: int) -> str:
    return f"dim{dim}-steps{steps}"


def _train(config: LadderConfig, dim: int, steps: int, output: Path, inputs: dict[str, str]) -> Trained:
    folder, model = output / _name(dim, steps), model_of(config.model, dim)
    schedule = _stretched(config.train.schedule, steps / config.train.steps)
    run = PretrainConfig(
        tokens=config.tokens,
        held_out_tokens=config.held_out_tokens,
        tokenizer=config.tokenizer,
        output=folder,
        model=model,
        train=replace(config.train, steps=steps, schedule=schedule),
    )
    wanted = {"config": to_plain(run), "inputs": inputs}
    record = folder / "finished.json"
    if not record.exists() or read_json(record) != wanted:
        say(f"Ladder: {_name(dim, steps)}")
        pretrain(run)
        write_json(record, wanted)
    loss = Manifest.read(folder / "model").results["validation_loss"]
    if loss is None:
        raise InputError(f"{folder / 'model'} has no held-out loss; delete the folder to train it again.")
    tokens = steps * config.train.batch_rows * config.train.row_length
    flops = training_flops_per_token(model, mean_context=(config.train.row_length + 1) / 2)
    embedding = 0 if model.tie_embeddings else model.vocab_size * model.dim
    return Trained(folder.name, count_parameters(model) - embedding, tokens, tokens * flops, loss)


def _stretched(schedule: ScheduleConfig, ratio: float) -> ScheduleConfig:
    return replace(
        schedule,
        warmup_steps=round(schedule.warmup_steps * ratio),
        decay_steps=round(schedule.decay_steps * ratio),
    )
